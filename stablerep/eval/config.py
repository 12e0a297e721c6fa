"""The config of an evaluation; imports nothing heavy."""

from dataclasses import dataclass

from stablerep.eval.finetune_config import FinetuneConfig
from stablerep.runtime.config import key

PROTOCOLS = ("linear", "knn", "fewshot", "zeroshot", "finetune")


@dataclass
class SgdConfig:
    """The linear probe by SGD; defaults are those of the paper's official code."""

    epochs: int = key(90, "linear by SGD: epochs")
    batch: int = key(1024, "linear by SGD: pictures a step over all ranks")
    rates: list[float] = key(
        [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5],
        "linear by SGD: learning rates at 256 pictures, all at once",
    )
    crop_min: float = key(0.08, "linear by SGD: smallest crop, as a share of the area")


@dataclass
class KnnConfig:
    """The nearest-neighbour classifier: a number for each k and temperature."""

    k: list[int] = key([20], "knn: neighbours")
    temperature: list[float] = key([0.07], "knn: temperatures of the votes")


@dataclass
class FewshotConfig:
    """Episodes on the test split: a number for each shot."""

    way: int = key(5, "fewshot: classes an episode")
    shot: list[int] = key([5], "fewshot: labelled pictures a class")
    queries: int = key(15, "fewshot: pictures a class to be judged on")
    episodes: int = key(600, "fewshot: episodes")
    classifier: str = key("logistic", "fewshot: logistic | prototype")


@dataclass
class EvaluateConfig:
    """What is scored, and how."""

    checkpoint: list[str] = key([], "runs, safetensors files (config.json beside), or names of timm models")
    protocol: list[str] = key(["linear", "knn"], "linear | knn | fewshot | zeroshot | finetune")
    dataset: list[str] = key(
        ["fashion"],
        "fashion, fashion-probe (bundled), imagenet, cifar10, cifar100, aircraft, cars, dtd, flowers, pets, sun397, "
        "caltech101, food101, voc2007, or folders with train/<class>/ and test/<class>/",
    )
    data_root: str = key("data", "folder of the named data sets, laid out as torchvision does")
    labels: list[int] = key([10, 100, 0], "labelled pictures a class for linear and knn; 0 is all")
    resamples: int = key(5, "draws of the labelled pictures where not all are used")
    solver: str = key("auto", "linear: sgd | lbfgs | auto (sgd for all of imagenet)")
    random_encoders: int = key(3, "random initialisations scored beside the first checkpoint as a yardstick; 0 for none")
    out: str = key("", "folder of results.jsonl (default: each checkpoint's own)")
    cache: str = key("", "folder of computed features (default: features/ beside results.jsonl)")
    device: str = key("auto", "auto | cpu | cuda")
    workers: int = key(0, "processes that read pictures, a rank")
    sgd: SgdConfig = key(SgdConfig, "")
    knn: KnnConfig = key(KnnConfig, "")
    fewshot: FewshotConfig = key(FewshotConfig, "")
    finetune: FinetuneConfig = key(FinetuneConfig, "")

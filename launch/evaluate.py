"""Score encoders on real pictures: python launch/evaluate.py --checkpoint RUN"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import append_jsonl, read_json


@dataclass
class EvaluateConfig:
    """What is scored, and how."""

    checkpoint: list[str] = key([], "training runs, or encoder.safetensors files")
    protocol: list[str] = key(["linear", "knn"], "linear | knn")
    dataset: str = key("fashion", "fashion (bundled real pictures) or a folder with train/<class>/ and test/<class>/")
    labels: list[int] = key([10, 100, 0], "labelled pictures a class for the probe; 0 is all")
    resamples: int = key(5, "draws of the labelled pictures where not all are used")
    random_encoders: int = key(3, "random initialisations scored beside as a yardstick; 0 for none")
    out: str = key("", "folder of results.jsonl (default: that of the first checkpoint)")
    device: str = key("cpu", "cpu | cuda")


def score(encoder: Any, config: EvaluateConfig, splits: Any, device: str) -> list[dict[str, Any]]:
    """One record a protocol and label count: the mean over draws, and each value."""
    import numpy as np

    from stablerep.eval.features import extract
    from stablerep.eval.knn import knn_probe
    from stablerep.eval.linear import linear_probe

    train, test = splits[0], splits[1]
    features, test_features = extract(encoder, train.pictures, device), extract(encoder, test.pictures, device)
    records = []
    for protocol in config.protocol:
        for count in config.labels:
            values = []
            for draw in range(config.resamples if count else 1):
                rows = _sample(train.labels, count, draw)
                pair = (features[rows], train.labels[rows], test_features, test.labels)
                values.append(linear_probe(*pair, seed=draw) if protocol == "linear" else knn_probe(*pair))
            records.append(
                {"protocol": protocol, "labels_per_class": count or "all", "value": round(float(np.mean(values)), 2),
                 "values": [round(v, 2) for v in values], "n_test": len(test.labels), "metric": "top-1 %"}
            )  # fmt: skip
    return records


def _sample(labels: Any, count: int, seed: int) -> Any:
    """`count` rows of each class (0: all rows)."""
    import numpy as np

    if not count:
        return np.arange(len(labels))
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(np.flatnonzero(labels == c))[:count] for c in np.unique(labels)])


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Score every checkpoint and the random yardsticks; append each number to results.jsonl. Raises UsageError."""
    if not config.checkpoint:
        raise UsageError("--checkpoint RUN is missing: a finished training run")
    unknown = set(config.protocol) - {"linear", "knn"}
    if unknown:
        raise UsageError(f"--protocol {' '.join(sorted(unknown))} is none of linear, knn")
    if any(0 < n < 5 for n in config.labels) or min(config.labels, default=0) < 0:
        raise UsageError("--labels must be 0 (all) or at least 5 a class: a fifth of them chooses the regularisation")
    import torch

    from stablerep.arch import create, load_encoder
    from stablerep.eval.datasets import load

    first = Path(config.checkpoint[0])
    out = Path(config.out) if config.out else first.parent if first.is_file() else first
    encoders = [(name, load_encoder(name)) for name in config.checkpoint]
    folder = first.parent if first.is_file() else first if (first / "config.json").exists() else first / "final"
    description = read_json(folder / "config.json")
    for seed in range(config.random_encoders):
        torch.manual_seed(1000 + seed)
        encoders.append((f"random-{seed}", create(description)))
    splits = load(config.dataset, description["model_args"]["img_size"])
    everything = []
    for name, encoder in encoders:
        data = read_json(Path(name) / "train.json") if (Path(name) / "train.json").exists() else {}
        for record in score(encoder, config, splits, config.device):
            record = {"checkpoint": name, "dataset": config.dataset, **record, **data, "time": time.time()}
            append_jsonl(out / "results.jsonl", record)
            everything.append(record)
            labels = f"{record['labels_per_class']} labels a class"
            print(f"{name}  {record['protocol']}  {labels}: {record['value']:.2f} %", flush=True)
    return everything


def main(argv: list[str]) -> int:
    """Evaluate and print."""
    evaluate(parse(EvaluateConfig, argv, prog="evaluate.py", about="Probe encoders on real pictures."))
    return 0


if __name__ == "__main__":
    run_command(main)

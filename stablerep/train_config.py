"""The config of a training run; imports nothing heavy."""

from dataclasses import dataclass

from stablerep.runtime.config import key


@dataclass
class OptimConfig:
    """AdamW and its schedule; defaults are the paper's official recipe."""

    lr: float = key(1e-4, "learning rate at 256 images; scaled by global batch / 256")
    weight_decay: float = key(0.1, "AdamW weight decay of matrices")
    beta1: float = key(0.9, "AdamW beta 1")
    beta2: float = key(0.98, "AdamW beta 2")
    warmup_epochs: float = key(0.5, "linear warm-up, in epochs")
    clip: float = key(0.0, "gradient norm limit; 0 is none")


@dataclass
class TrainConfig:
    """What is trained."""

    data: list[str] = key([], "generation runs (each complete)")
    out: str = key("", "the run folder")
    method: str = key("stablerep", "stablerep | simclr")
    arch: str = key("vit_base", "vit_micro | vit_tiny | vit_small | vit_base | vit_large | any timm ViT")
    image_size: int = key(224, "pixels that the encoder sees")
    global_batch: int = key(8256, "images a step over all ranks")
    images_per_caption: int | None = key(None, "images of a caption in a batch (default: all that are stored)")
    epochs: float | None = key(None, "length in epochs (default 15 where --steps is not given)")
    steps: int | None = key(None, "length in steps; wins over --epochs")
    seed: int = key(0, "seed of initialisation, order, crops and colours")
    dtype: str = key("bf16", "bf16 | fp32")
    zero_stage: int = key(1, "DeepSpeed ZeRO stage, 1 or 2")
    temperature: float = key(0.1, "temperature of the contrastive loss")
    head_hidden: int = key(4096, "width of the head's hidden layers")
    head_out: int = key(256, "width of the head's output")
    crop_min: float = key(0.08, "smallest crop, as a share of the area")
    checkpoint_every: int = key(500, "steps between checkpoints")
    keep_every: int = key(0, "also keep every checkpoint at a multiple of this; 0 keeps the newest two")
    log_every: int = key(10, "steps between lines of metrics.jsonl")
    workers: int = key(4, "loader processes a rank")
    optim: OptimConfig = key(OptimConfig, "")

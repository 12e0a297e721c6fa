"""The config of a training run; imports nothing heavy."""

from dataclasses import dataclass

from stablerep.runtime.config import key


@dataclass
class OptimConfig:
    """AdamW and its schedule; defaults are the paper's official recipe."""

    lr: float = key(1e-4, "learning rate at 256 images; scaled by global batch / 256")
    weight_decay: float = key(0.1, "AdamW weight decay of matrices")
    weight_decay_end: float | None = key(None, "weight decay at the end, reached by a cosine (default: constant)")
    beta1: float = key(0.9, "AdamW beta 1")
    beta2: float = key(0.98, "AdamW beta 2")
    warmup_epochs: float = key(0.5, "linear warm-up, in epochs")
    clip: float = key(0.0, "gradient norm limit; 0 is none")


@dataclass
class TextConfig:
    """The text tower of clip and stablerep_plus; defaults are the paper's (width 512, 12 layers)."""

    width: int = key(512, "text tower: width")
    layers: int = key(12, "text tower: layers")
    heads: int = key(8, "text tower: attention heads")
    context: int = key(77, "text tower: tokens of a caption; longer ones are cut")
    embed: int = key(512, "width of the space that images and texts share")


@dataclass
class DINOConfig:
    """Head, temperatures and crops of dino; defaults are the paper's (arXiv 2104.14294)."""

    prototypes: int = key(65536, "dino: outputs of the head")
    teacher_temperature: float = key(0.07, "dino: temperature of the teacher, reached from 0.04")
    warmup_epochs: float = key(30.0, "dino: epochs until the teacher's temperature is reached")
    freeze_epochs: float = key(1.0, "dino: epochs in which the prototypes stand still")
    local_crops: int = key(8, "dino: small crops of an image, beside two large ones")
    local_size: int = key(96, "dino: pixels of a small crop")
    split: float = key(0.4, "dino: small crops are --crop-min to this share of the area, large ones this share to all")


@dataclass
class MAEConfig:
    """The masks and the decoder of mae; defaults are the paper's (arXiv 2111.06377)."""

    mask_ratio: float = key(0.75, "mae: share of the patches that the encoder does not see")
    decoder_width: int = key(512, "mae: width of the decoder")
    decoder_depth: int = key(8, "mae: layers of the decoder")
    decoder_heads: int = key(16, "mae: attention heads of the decoder")


@dataclass
class TrainConfig:
    """What is trained."""

    data: list[str] = key([], "generation runs, folders of WebDataset tars (img2dataset), or folders of pictures")
    data_weights: list[float] = key([], "share of each --data in a batch (default: by size)")
    out: str = key("", "the run folder")
    method: str = key("stablerep", "stablerep | stablerep_plus | simclr | clip | mae | byol | mocov3 | dino")
    arch: str = key("vit_base", "vit_micro | vit_tiny | vit_small | vit_base | vit_large | any timm ViT")
    image_size: int = key(224, "pixels that the encoder sees")
    global_batch: int = key(8256, "images a step over all ranks; constant, whatever the number of ranks")
    micro_batch: int | None = key(None, "images a rank encodes at once (default: what fits its memory)")
    images_per_caption: int | None = key(None, "images of a caption in a batch (default: all that are stored)")
    epochs: float | None = key(None, "length in epochs (default 15 where --steps is not given)")
    steps: int | None = key(None, "length in steps; wins over --epochs")
    seed: int = key(0, "seed of initialisation, order, crops and colours")
    dtype: str = key("bf16", "bf16 | fp16 (with loss scaling) | fp32")
    zero_stage: int = key(1, "DeepSpeed ZeRO stage, 1 or 2")
    activation_checkpointing: bool = key(False, "compute activations again in the backward pass: less memory, more time")
    compile: bool = key(False, "torch.compile the encoder")
    reproducible: int = key(0, "compute in N equal pieces: losses equal bit for bit at any rank count that divides N; 0: off")
    temperature: float | None = key(None, "temperature of the loss (default: 0.2 for mocov3, 0.1 for the others)")
    image_weight: float = key(1.0, "stablerep_plus: weight of the multi-positive loss")
    text_weight: float = key(1.0, "stablerep_plus: weight of the image-text loss")
    head_hidden: int = key(4096, "width of the head's hidden layers")
    head_out: int = key(256, "width of the head's output")
    momentum: float | None = key(
        None, "byol, mocov3, dino: momentum of the teacher at first, by a cosine to 1 (default: the paper's)"
    )
    crop_min: float = key(0.08, "smallest crop, as a share of the area")
    downsample_p: float = key(0.05, "share of the images that are first scaled down to 64 or 128 px and up again")
    max_broken: float = key(0.01, "stop when more than this share of the images is broken; fewer are replaced")
    checkpoint_every: int = key(500, "steps between checkpoints")
    keep_every: int = key(0, "also keep every checkpoint at a multiple of this; 0 keeps the newest two")
    log_every: int = key(10, "steps between lines of metrics.jsonl")
    workers: int = key(4, "loader processes a rank")
    hang_timeout_s: float = key(1800.0, "a rank that finishes no step for this long ends the job with its stacks")
    restarts_without_progress: int = key(3, "requeues in a row that may bring no newer checkpoint")
    wandb: str | None = key(None, "also log to this Weights & Biases project")
    optim: OptimConfig = key(OptimConfig, "")
    text: TextConfig = key(TextConfig, "")
    dino: DINOConfig = key(DINOConfig, "")
    mae: MAEConfig = key(MAEConfig, "")


# Keys that do not change what is computed: they may differ between two launches of one run.
FREE = {
    "out", "micro_batch", "checkpoint_every", "keep_every", "log_every", "workers", "max_broken", "hang_timeout_s",
    "restarts_without_progress", "wandb", "activation_checkpointing", "compile", "zero_stage",
}  # fmt: skip

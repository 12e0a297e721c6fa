"""The config of fine-tuning; imports nothing heavy."""

from dataclasses import dataclass

from stablerep.runtime.config import key


@dataclass
class FinetuneConfig:
    """MAE's fine-tuning (arXiv 2111.06377, table 9); erasing and the head's start are those of its official code
    (github.com/facebookresearch/mae, main_finetune.py). For ViT-B its FINETUNE.md takes lr 5e-4 and layer decay 0.65 instead,
    and it classifies the mean of the patches, where this takes what the encoder gives (ours: the CLS token)."""

    epochs: int = key(100, "fine-tuning: epochs (MAE: 100 for ViT-B, 50 for ViT-L)")
    batch: int = key(1024, "fine-tuning: pictures a step over all ranks; at most the training pictures that there are")
    micro_batch: int = key(256, "fine-tuning: pictures that a rank encodes at once, at most")
    lr: float = key(1e-3, "fine-tuning: learning rate at 256 pictures; scaled by batch / 256")
    layer_decay: float = key(0.75, "fine-tuning: each layer's learning rate as a share of that of the layer above")
    weight_decay: float = key(0.05, "fine-tuning: AdamW weight decay of matrices")
    warmup_epochs: float = key(5.0, "fine-tuning: linear warm-up, in epochs")
    drop_path: float = key(0.1, "fine-tuning: stochastic depth of the last block; rises linearly from 0")
    smoothing: float = key(0.1, "fine-tuning: label smoothing")
    mixup: float = key(0.8, "fine-tuning: mixup alpha; 0 is none")
    cutmix: float = key(1.0, "fine-tuning: cutmix alpha; 0 is none")
    augment: str = key("rand-m9-mstd0.5-inc1", "fine-tuning: RandAugment, as timm names it; empty is none")
    crop_min: float = key(0.08, "fine-tuning: smallest crop, as a share of the area")
    erase: float = key(0.25, "fine-tuning: share of the pictures of which a rectangle is erased")
    seed: int = key(0, "fine-tuning: seed of the head, order, augmentation and stochastic depth")
    workers: int = key(4, "fine-tuning: loader processes a rank")

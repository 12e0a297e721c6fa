"""The language side of CLIP and StableRep+: open_clip's tokenizer and text transformer, and the shared space."""

import math
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from stablerep import arch
from stablerep.engine import clamp_parameter
from stablerep.losses import clip_loss
from stablerep.runtime import dist
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json
from stablerep.train_config import TextConfig

LARGEST_SCALE = math.log(100)


@lru_cache(maxsize=1)
def _tokenizer(context: int) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context)


def tokenize(texts: list[str], context: int) -> Tensor:
    """CLIP's byte-pair tokens, int64 [len(texts), context]; a long caption is cut."""
    tokens: Tensor = _tokenizer(context)(texts)
    return tokens


class ImageText(nn.Module):
    """Text tower and the two linear projections into the space that images and texts share, with a learnt logit scale
    that starts at 1/0.07 (arXiv 2103.00020, section 2.5)."""

    def __init__(self, image_width: int, config: TextConfig) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        self.description = {"image_width": image_width, "text": asdict(config)}

        self.text = TextTransformer(
            context_length=config.context, width=config.width, heads=config.heads, layers=config.layers, output_dim=config.embed
        )
        self.image_projection = nn.Parameter(torch.randn(image_width, config.embed) * image_width**-0.5)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # DeepSpeed wants a dimension

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features [captions, embed] of tokens [captions, context]."""
        features: Tensor = self.text(tokens)
        return features

    def loss(self, image_features: Tensor, text_features: Tensor, ids: Tensor) -> Tensor:
        """CLIP's loss of this rank's images [B, width] and texts [B / m, embed], m rows a caption, over all ranks."""
        images = nn.functional.normalize((image_features @ self.image_projection.to(image_features.dtype)).float(), dim=1)
        texts = nn.functional.normalize(text_features.float(), dim=1)
        text_ids = ids[:: len(ids) // len(texts)].contiguous()
        return clip_loss(
            images, texts, ids, text_ids, self.logit_scale.float().exp(),
            all_images=dist.gather_features(images), all_texts=dist.gather_features(texts),
            all_image_ids=dist.gather_plain(ids), all_text_ids=dist.gather_plain(text_ids),
        )  # fmt: skip

    def clamp(self) -> None:
        """Keep the logit scale at 100 or less, as CLIP does."""
        clamp_parameter(self.logit_scale, 0.0, LARGEST_SCALE)


def load_image_text(path: str) -> ImageText:
    """The text tower and projections beside a finished encoder: a RUN of clip or stablerep_plus, its `final/` folder or a
    file in it. Raises UsageError."""
    folder = arch.final_folder(path)
    weights, config = folder / "image_text.safetensors", folder / "config.json"
    held = read_json(config) if config.exists() else {}
    if not weights.exists() or "image_text" not in held:
        raise UsageError(f"{path} holds no text tower: zeroshot needs a finished run of clip or stablerep_plus")
    description = held["image_text"]
    tower: ImageText = arch.load_weights(ImageText(description["image_width"], TextConfig(**description["text"])), weights)
    return tower

"""MAE (arXiv 2111.06377): an encoder sees a quarter of the patches, a small decoder paints the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stablerep.arch import sincos_positions
from stablerep.data.augment import View
from stablerep.losses import mae_loss
from stablerep.methods.base import Encoded, Method
from stablerep.runtime.errors import UsageError
from stablerep.train_config import TrainConfig


class MAE(Method):
    """Masked autoencoding of one crop an image; captions play no part.

    Which patches are seen is the beginning of the random order that the loader hands over with each row.
    """

    unit = "image"
    positions: Tensor  # of the decoder, fixed: [prefix + N, width]

    def __init__(self, encoder: Any, config: TrainConfig) -> None:
        from timm.models.vision_transformer import Block

        super().__init__(encoder, config)
        if getattr(encoder, "pos_embed", None) is None or not hasattr(encoder, "patch_drop"):
            raise UsageError(f"--method mae needs a ViT with position embeddings; --arch {config.arch} is none")
        self.patch, self.prefix = encoder.patch_embed.patch_size[0], encoder.num_prefix_tokens
        patches, grid = encoder.patch_embed.num_patches, encoder.patch_embed.grid_size
        self.seen = max(1, int(patches * (1 - config.mae.mask_ratio)))
        self.shuffles = [patches]
        width, decoder_width = encoder.num_features, config.mae.decoder_width

        encoder.patch_drop = self.keep = Keep(self.prefix)
        encoder.reset_classifier(0, global_pool="")  # all tokens come out
        self.into = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        heads = config.mae.decoder_heads
        self.decoder = nn.Sequential(*[Block(decoder_width, heads, qkv_bias=True) for _ in range(config.mae.decoder_depth)])
        self.norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.out = nn.Linear(decoder_width, 3 * self.patch**2)

        self.apply(_initialise)
        nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)
        if encoder.cls_token is not None:
            nn.init.normal_(encoder.cls_token, std=0.02)
        encoder.pos_embed.data.copy_(_positions(grid, width, encoder.pos_embed.shape[1] - patches))
        encoder.pos_embed.requires_grad_(False)
        self.register_buffer("positions", _positions(grid, decoder_width, self.prefix), persistent=False)

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Raise UsageError on masks that hide nothing or all, and on a decoder whose width does not divide."""
        mae = config.mae
        if not 0 < mae.mask_ratio < 1:
            raise UsageError(f"--mae.mask-ratio {mae.mask_ratio:g} must lie between 0 and 1")
        if min(mae.decoder_width, mae.decoder_depth, mae.decoder_heads) < 1:
            raise UsageError("--mae.decoder-width, --mae.decoder-depth and --mae.decoder-heads must be positive")
        if mae.decoder_width % mae.decoder_heads or mae.decoder_width % 4:
            raise UsageError(
                f"--mae.decoder-width {mae.decoder_width} must be a multiple of 4 and of the {mae.decoder_heads} heads"
            )

    @classmethod
    def views(cls, config: TrainConfig) -> list[View]:
        """One view, cropped and flipped, its colours as they are."""
        size, crop_min, downsample_p = config.image_size, config.crop_min, config.downsample_p
        return [View(size, crop_min, downsample_p=downsample_p, jitter_p=0.0, grey_p=0.0, blur_p=0.0)]

    def passes(self, config: TrainConfig) -> list[tuple[int, int, int]]:
        """The encoder on the patches that are seen, the decoder on all."""
        encoder = (self.seen + self.prefix, self.encoder.num_features, len(self.encoder.blocks))
        return [encoder, (len(self.positions), config.mae.decoder_width, len(self.decoder))]

    def forward(self, views: list[Tensor], tokens: Tensor | None) -> Encoded:
        """`error` [B]: the reconstruction error of each row, from images [B, 3, S, S] and orders [B, N]."""
        images, order = views
        seen = order[:, : self.seen]
        with self.keep.only(seen):
            latent = self.encoder(images)
        target = normalised(patchify(images.float(), self.patch))
        mask = torch.ones(order.shape, device=order.device).scatter(1, seen, 0.0)
        return {"error": mae_loss(self.decode(latent, seen), target, mask, per_row=True)}

    def decode(self, latent: Tensor, seen: Tensor) -> Tensor:
        """Values [B, N, 3 * patch^2] of all patches, from the encoder's tokens [B, prefix + V, width] of those at
        `seen` [B, V]."""
        from timm.models import checkpoint_seq

        x = self.into(latent)
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        canvas = self.mask_token.expand(len(x), *self.shuffles, -1)
        x = torch.cat([prefix, canvas.scatter(1, _across(seen, patches), patches)], 1) + self.positions.to(x.dtype)
        again = self.training and self.encoder.grad_checkpointing
        x = checkpoint_seq(self.decoder, x) if again else self.decoder(x)
        painted: Tensor = self.out(self.norm(x[:, self.prefix :]))
        return painted

    def loss(self, encoded: Encoded, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the masked patches of all rows, of which every row has as many."""
        return encoded["error"].mean(), {}


class Keep(nn.Module):
    """Where timm's ViT drops patches at random: leaves those that `only` names, or all. Token order is [prefix, patches]."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.seen: Tensor | None = None

    @contextmanager
    def only(self, seen: Tensor) -> Iterator[None]:
        """Within, the patches at `seen` [B, V] are left."""
        self.seen = seen
        try:
            yield
        finally:
            self.seen = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.seen is None:
            return tokens
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        return torch.cat([prefix, patches.gather(1, _across(self.seen, patches))], 1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, 3, S, S] -> [B, N, patch * patch * 3], patches row by row, and in a patch pixels row by row, colours last."""
    b, c, height, width = images.shape
    cut = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def normalised(patches: Tensor) -> Tensor:
    """Each patch [..., P] with mean 0 and variance 1 ("normalized pixels" of the paper's section 3)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def _positions(grid: tuple[int, int], width: int, others: int) -> Tensor:
    """Sine-cosine positions [others + N, width] of a grid of N patches; zeros for `others` tokens before them."""
    patches: Tensor = sincos_positions(*grid, width)[1:]
    return nn.functional.pad(patches, (0, 0, others, 0))


def _across(places: Tensor, tokens: Tensor) -> Tensor:
    """Index [B, V] for gather and scatter over tokens [B, N, D]."""
    return places[:, :, None].expand(-1, -1, tokens.shape[2])


def _initialise(module: nn.Module) -> None:
    """The official code's weights of linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

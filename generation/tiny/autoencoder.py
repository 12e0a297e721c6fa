"""Train the embedded pipeline's autoencoder: a stock AutoencoderKL, 32x32x3 <-> 8x8x16.

python generation/tiny/autoencoder.py --source FOLDER --minutes 15
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.rundir import REPO


@dataclass
class AutoencoderConfig:
    """Settings of the autoencoder's training."""

    source: str = key("", "folder with the four Fashion-MNIST .gz files")
    out: str = key(str(REPO / "build" / "tiny" / "vae"), "where the autoencoder goes")
    minutes: float = key(15.0, "length of the training; the learning rate's cosine ends there")
    lr: float = key(2e-3, "peak learning rate")
    batch: int = key(32, "pictures a step")


def standardise(vae: Any, latents: Any) -> None:
    """Fold a per-channel shift and scale into the two 1x1 convolutions around the latents, so that they come out with
    zero mean and about unit variance and `scaling_factor` is 1. `latents`: [N, C, h, w] means of training pictures."""
    import torch

    shift = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    scale = (std * std.mean()).sqrt()  # half-way to unit variance: weak channels stay weaker
    scale = scale * ((latents - shift[:, None, None]) / scale[:, None, None]).std()
    channels = len(shift)
    with torch.no_grad():
        vae.quant_conv.weight[:channels] /= scale[:, None, None, None]
        vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - shift) / scale
        vae.post_quant_conv.bias += (vae.post_quant_conv.weight[:, :, 0, 0] * shift).sum(1)
        vae.post_quant_conv.weight *= scale[None, :, None, None]


def main(argv: list[str]) -> int:
    """Train, standardise the latents, save, and print the held-out PSNR."""
    config = parse(AutoencoderConfig, argv, prog="autoencoder.py", about="Train the embedded autoencoder.")
    import numpy as np
    import torch
    from diffusers import AutoencoderKL

    from generation.tiny.data import COLOURS, generator_part, load, tint

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    pictures, _ = generator_part(Path(config.source))
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        sample_size=32,
        scaling_factor=1.0,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)

    def batch(source: np.ndarray, size: int) -> Any:
        rows = random.integers(len(source), size=size)
        return torch.from_numpy(tint(source[rows], random.integers(len(COLOURS), size=size)))

    start = time.monotonic()
    step = 0
    while (done := (time.monotonic() - start) / (60 * config.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * done))
        x = batch(pictures, config.batch)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = (y - x).square().mean() + 0.1 * (y - x).abs().mean() + 1e-5 * posterior.kl().mean() / 1024
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            psnr = 10 * torch.log10(4 / (y - x).square().mean()).item()
            print(f"step {step}  {100 * done:.0f} %  loss {loss.item():.4f}  PSNR {psnr:.1f} dB", flush=True)
    vae.eval()
    with torch.no_grad():
        standardise(vae, torch.cat([vae.encode(batch(pictures, 256)).latent_dist.mean for _ in range(8)]))
        held_out = batch(load(Path(config.source), "t10k")[0], 512)
        decoded = vae.decode(vae.encode(held_out).latent_dist.mean).sample
    psnr = 10 * torch.log10(4 / (decoded - held_out).square().mean()).item()
    print(f"{step} steps, {sum(p.numel() for p in vae.parameters())} parameters, held-out PSNR {psnr:.1f} dB")
    vae.save_pretrained(config.out)
    return 0


if __name__ == "__main__":
    run_command(main)

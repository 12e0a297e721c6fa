"""Train the embedded pipeline's text encoder and UNet, and save it as a stock StableDiffusionPipeline.

    python generation/tiny/train.py --source FOLDER --minutes 60

v-prediction (Salimans & Ho, arXiv 2202.00512), caption dropout for guidance (Ho & Salimans, arXiv 2207.12598).
"""

import json
import re
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
class TinyConfig:
    """Settings of the diffusion model's training."""

    source: str = key("", "folder with the four Fashion-MNIST .gz files")
    vae: str = key(str(REPO / "build" / "tiny" / "vae"), "the trained autoencoder")
    out: str = key(str(REPO / "assets" / "tiny"), "where the pipeline goes")
    minutes: float = key(60.0, "length of the training; the learning rate's cosine ends there")
    lr: float = key(1.2e-3, "peak learning rate")
    batch: int = key(32, "pictures a step")
    save_minutes: float = key(15.0, "save an early pipeline this often")


def build_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer: one token a byte, and merges that make every word of the captions one token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    from generation.tiny.data import CLASSES, COLOURS, TEMPLATES

    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(c + "</w>" for c in letters)]
    merges: list[str] = []
    text = " ".join([*TEMPLATES, *CLASSES, *COLOURS, "an pair of"]).lower()
    for word in sorted(set(re.findall("[a-z]+", text))):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.append(parts[0])
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def build_text_encoder(tokenizer: Any) -> Any:
    """A CLIPTextModel of width 96 and two layers, randomly initialised."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> Any:
    """A UNet2DConditionModel for 8x8x16 latents, randomly initialised."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(64, 72),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def encode_pictures(vae: Any, pictures: Any, labels: Any, colours_each: int, random: Any) -> tuple[Any, Any, Any]:
    """Latent means of every picture in `colours_each` tints: float16 [N, 16, 8, 8], colours [N], labels [N]."""
    import numpy as np
    import torch

    from generation.tiny.data import COLOURS, tint

    latents, colours, classes = [], [], []
    with torch.no_grad():
        for _ in range(colours_each):
            for i in range(0, len(pictures), 250):
                colour = random.integers(len(COLOURS), size=len(pictures[i : i + 250]))
                x = torch.from_numpy(tint(pictures[i : i + 250], colour))
                latents.append(vae.encode(x).latent_dist.mean.half())
                colours.append(colour)
                classes.append(labels[i : i + 250])
    return torch.cat(latents), np.concatenate(colours), np.concatenate(classes)


def save(out: Path, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
    """Write the pipeline in diffusers' format, in half precision."""
    import copy

    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    # Without a dtype diffusers loads float32 and transformers what the config says: they must agree.
    path = out / "text_encoder" / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def main(argv: list[str]) -> int:
    """Train and save; early pipelines replace each other at `out`."""
    config = parse(TinyConfig, argv, prog="train.py", about="Train the embedded text-to-image pipeline.")
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler

    from generation.tiny.data import TEMPLATES, caption, generator_part

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    vae: Any = AutoencoderKL.from_pretrained(config.vae).eval()
    vae.register_to_config(_name_or_path="")  # else a path of this machine goes into the published config
    latents, colours, labels = encode_pictures(vae, *generator_part(Path(config.source)), 2, random)
    print(f"{len(latents)} latents, mean {latents.float().mean():.3f}, std {latents.float().std():.3f}", flush=True)
    tokenizer = build_tokenizer(REPO / "build" / "tiny" / "tokenizer")
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    parameters = [*text_encoder.parameters(), *unet.parameters()]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)
    start = saved = time.monotonic()
    step = 0

    def save_averages() -> None:
        current = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, a in zip(parameters, averages, strict=True):
                p.copy_(a)
            save(Path(config.out), vae, text_encoder, tokenizer, unet, scheduler)
            for p, c in zip(parameters, current, strict=True):
                p.copy_(c)

    while (done := (time.monotonic() - start) / (60 * config.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / 200) * 0.5 * (1 + np.cos(np.pi * done))
        rows = random.integers(len(latents), size=config.batch)
        templates = random.integers(len(TEMPLATES), size=len(rows))
        texts = [caption(colours[r], labels[r], t) for r, t in zip(rows, templates, strict=True)]
        texts = ["" if random.random() < 0.1 else text for text in texts]
        tokens = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        x = latents[rows].float()
        noise = torch.randn_like(x)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x),))
        noisy = scheduler.add_noise(x, noise, t)
        states = text_encoder(tokens.input_ids)[0]
        prediction = unet(noisy, t, encoder_hidden_states=states).sample
        loss = (prediction - scheduler.get_velocity(x, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(0.9995, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        if step % 100 == 0:
            print(f"step {step}  {100 * done:.0f} %  loss {loss.item():.4f}", flush=True)
        if time.monotonic() - saved > 60 * config.save_minutes:
            saved = time.monotonic()
            save_averages()
    save_averages()
    print(f"{step} steps, {sum(p.numel() for p in parameters)} parameters in text encoder and UNet")
    return 0


if __name__ == "__main__":
    run_command(main)

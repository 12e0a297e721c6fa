"""Images a second of the worker's code, beside the plain pipeline call and beside what the device's matrix products allow:
python benchmarks/generate.py [--model tiny|sd15|FOLDER] [--resolution 256] [--steps 12] [--images 6] ...

The baseline (a) is what people write: `StableDiffusionPipeline(caption, num_images_per_prompt=m)` for one caption after
another, PNG files out; in fp16 with xformers on a GPU. Ours is what a worker does, from captions to a committed shard. On a
CPU both are measured on one core, and on the whole machine: the baseline as one process with all threads, ours as a worker a
core. The ceiling (b) is the images/s if every FLOP of UNet and autoencoder ran at the speed of a large matrix product of the
same dtype. `sd15` has the shapes of Stable Diffusion 1.5 and random weights, which are made here.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from generation.calibrate import device_name
from generation.identity import caption_id
from generation.pipeline import DTYPES, TextToImage, generate_captions
from generation.settings import TINY, GenerateConfig, public_settings, resolve
from generation.tuning import measure
from stablerep.data.shards import Sample, write_shard


def make_sd15(folder: Path) -> None:
    """Save a pipeline of Stable Diffusion 1.5's shapes with random weights, and the embedded pipeline's tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ends
    )
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512, **levels
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def clock() -> Callable[[], float]:
    """Time as it passes; on one core of a CPU the time that this process computes, which other processes do not disturb."""
    return time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter


def captions() -> Iterator[str]:
    """Captions, one after another, none twice."""
    for number in itertools.count():
        yield f"a photo of a bag, number {number}"


def plain(words: argparse.Namespace, config: GenerateConfig, device: str, folder: Path) -> Callable[[int], float]:
    """The baseline: a function of a number of captions that returns images/s."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(
        config.model, dtype=DTYPES[config.dtype], safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    if device != "cpu":
        pipe.enable_xformers_memory_efficient_attention()
    texts, size = captions(), config.resolution

    def run(count: int) -> float:
        now = clock()
        start = now()
        for k in range(count):
            generator = [torch.Generator(device).manual_seed(1000 * k + j) for j in range(words.images)]
            pictures = pipe(
                next(texts), height=size, width=size, num_inference_steps=config.steps, generator=generator,
                guidance_scale=config.guidance_scale, num_images_per_prompt=words.images,
            ).images  # fmt: skip
            for j, picture in enumerate(pictures):
                picture.save(folder / f"{k}-{j}.png")
        return count * words.images / (now() - start)

    return run


def ours(config: GenerateConfig, device: str, folder: Path) -> tuple[Callable[[int], float], TextToImage]:
    """What a worker does, tuned: a function of a number of captions (one shard) that returns images/s, and the model."""
    model = TextToImage(config, device)
    if device != "cpu":
        measure(model, images=10**6)
    texts = captions()

    def run(count: int) -> float:
        now = clock()
        start = now()
        chosen = [(caption_id(text), text) for text in itertools.islice(texts, count)]
        images = generate_captions(model, chosen)
        assert images is not None
        meta = public_settings(config)
        write_shard(folder, 0, [Sample(id, text, made, meta) for (id, text), made in zip(chosen, images, strict=True)], {})
        return count * config.images_per_caption / (now() - start)

    return run, model


def product_speed(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = 1024 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    times, now = [], clock()
    for _ in range(20):
        start = now()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(now() - start)
    return 2 * n**3 / statistics.median(times[5:])


def flop_an_image(model: TextToImage) -> float:
    """FLOP of the UNet's calls and the decoding of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    model.use(replace(model.tuning, attention="sdpa", compile=False))  # which the counter sees into
    rows, counts = model.tuning.batch_size, []
    for decode in (False, True):
        with FlopCounterMode(display=False) as counter:
            model.probe(decode)
        counts.append(counter.get_total_flops() / rows)
    step, decoding = counts[0], counts[1] - counts[0]
    return step * model.config.steps + decoding


def on_one_device(words: argparse.Namespace, config: GenerateConfig, device: str, folder: Path) -> dict[str, float]:
    """Medians of `--rounds` rounds, baseline and ours in turn."""
    a, (b, model) = plain(words, config, device, folder), ours(config, device, folder)
    rates: dict[str, list[float]] = {"plain": [], "ours": []}
    a(1), b(1)
    for _ in range(words.rounds):
        rates["plain"].append(a(words.captions))
        rates["ours"].append(b(words.captions))
    result = {name: statistics.median(values) for name, values in rates.items()}
    flop, speed = flop_an_image(model), product_speed(device, DTYPES[config.dtype])
    result |= {"ratio": statistics.median(o / p for o, p in zip(rates["ours"], rates["plain"], strict=True))}
    return {**result, "GFLOP": flop / 1e9, "GFLOP/s": speed / 1e9, "ceiling": speed / flop}


def on_all_cores(words: argparse.Namespace) -> dict[str, float]:
    """Images/s of the whole machine in turn: the baseline with all threads, ours as a worker a core."""
    cores = len(os.sched_getaffinity(0))

    def rate(role: str, processes: int, threads: int) -> float:
        command = [sys.executable, __file__, *sys.argv[1:], "--role", role]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
                   for _ in range(processes)]  # fmt: skip
        for process in started:  # all are loaded and warm before one begins
            assert process.stdout is not None and process.stdout.readline() == "ready\n", "the child failed"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(float(process.communicate()[0]) for process in started)

    rates = [(rate("plain", 1, cores), rate("ours", cores, 1)) for _ in range(words.rounds)]
    plains, owns = zip(*rates, strict=True)
    ratio = statistics.median(o / p for p, o in rates)
    return {"plain": statistics.median(plains), "ours": statistics.median(owns), "ratio": ratio}


def child(words: argparse.Namespace, config: GenerateConfig, folder: Path) -> None:
    """One process of `on_all_cores`."""
    run = plain(words, config, "cpu", folder) if words.role == "plain" else ours(config, "cpu", folder)[0]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run(1)
    print("ready", flush=True)
    sys.stdin.readline()
    print(run(words.captions))


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser()
    for name, default in {"steps": 12, "images": 6, "captions": 16, "rounds": 5, "batch-size": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    words = parser.parse_args()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if words.model == "sd15":
            words.model = str(folder / "sd15")
            make_sd15(Path(words.model))
            sys.argv[1:] = [word.replace("sd15", words.model) for word in sys.argv[1:]]
        chosen: dict[str, Any] = {name: getattr(words, name) for name in ("model", "steps", "resolution", "dtype", "compile")}
        batch = words.batch_size if device == "cpu" else "auto"
        config = resolve(
            GenerateConfig(
                out="-", images_per_caption=words.images, captions_per_shard=words.captions, batch_size=batch,
                guidance_scale=words.guidance_scale, **chosen,
            ),
            0 if device == "cpu" else 1,
        )  # fmt: skip
        if words.role:
            return child(words, config, folder)
        if device == "cpu":
            torch.set_num_threads(1)
        one = on_one_device(words, config, device, folder)
        where = "one core" if device == "cpu" else "one GPU"
        print(f"{device_name(device)}, {config.dtype}, {config.steps} steps, {words.images} images a caption")
        print(f"{where}: plain {one['plain']:.3g} images/s, ours {one['ours']:.3g} images/s, {one['ratio']:.2f}x (a)")
        shares = [f"{name} {100 * one[name] / one['ceiling']:.0f} %" for name in ("plain", "ours")]
        print(f"{one['GFLOP']:,.3g} GFLOP an image; a matrix product does {one['GFLOP/s']:,.0f} GFLOP/s")
        print(f"at most {one['ceiling']:.3g} images/s at that speed; of these {', '.join(shares)} (b)")
        if device == "cpu":
            all_cores = on_all_cores(words)
            print(f"all cores: plain {all_cores['plain']:.3g} images/s, ours {all_cores['ours']:.3g} images/s, "
                  f"{all_cores['ratio']:.2f}x (a)")  # fmt: skip


if __name__ == "__main__":
    main()

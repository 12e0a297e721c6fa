"""Captions to pictures: our own denoising loop on the modules of a diffusers Stable Diffusion pipeline."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.calibrate import device_name
from generation.identity import noise
from generation.settings import GenerateConfig
from generation.tuning import Tuning, default_tuning
from stablerep.runtime.errors import UsageError

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),  # arXiv 2010.02502, eta 0
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),  # arXiv 2211.01095
    "unipc": ("UniPCMultistepScheduler", {}),  # arXiv 2302.04867
}
COMPILER: dict[str, Any] = {"mode": "reduce-overhead"}  # Inductor, with CUDA graphs on a GPU
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TextToImage:
    """A loaded pipeline. Every UNet, VAE and text-encoder call has one number of rows (the last is padded), so that an
    image's bytes depend on nothing but its identity and the tuning. Raises UsageError where the folder does not hold a
    pipeline or the attention kernel does not run here."""

    def __init__(self, config: GenerateConfig, device: str) -> None:
        self.config = config
        self.device = torch.device(device)
        self.device_name = device_name(device) or device
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # the sum's order, and so the bytes, depend on the thread count
        self.pipe = self._load(config.dtype)
        self.scale = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        size = config.resolution or self.pipe.unet.config.sample_size * self.scale
        self.latent_shape = (self.pipe.unet.config.in_channels, size // self.scale, size // self.scale)
        self.retried = 0  # images whose latents or pixels were not finite and were made again in fp32
        self._fp32: Any = None
        self.use(default_tuning(config))

    def use(self, tuning: Tuning) -> None:
        """Work with this tuning from now on. Raises UsageError where its attention kernel does not run here."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        if tuning.attention == "xformers":
            try:
                self.pipe.enable_xformers_memory_efficient_attention()
            except Exception as error:  # no GPU, no wheel, no kernel for this card: each its own class
                raise UsageError(f"--attention xformers does not run here: {str(error).splitlines()[0]}") from None
        else:
            self.pipe.disable_xformers_memory_efficient_attention()
        self.tuning = tuning
        self._unet = self.pipe.unet
        if tuning.compile:
            self._unet = torch.compile(self.pipe.unet, dynamic=False, **COMPILER)
        self._empty = self.encode([""])

    def memory_used(self) -> float:
        """The largest share of a GPU's memory that was in use since the last `use`; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        return torch.cuda.max_memory_reserved(self.device) / torch.cuda.get_device_properties(self.device).total_memory

    @torch.no_grad()
    def probe(self, decode: bool) -> None:
        """One sampler step of a full batch of noise, and its decoding where asked; returns when the device is done."""
        rows = self.tuning.batch_size
        latents = self.denoise(self.pipe, self._empty.expand(rows, -1, -1), torch.randn(rows, *self.latent_shape), steps=1)
        if decode:
            self.decode(self.pipe, latents)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _load(self, dtype: str) -> Any:
        import diffusers
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging

        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(
                self.config.model, dtype=DTYPES[dtype], safety_checker=None, requires_safety_checker=False,
                local_files_only=True, disable_mmap=True,  # a mapped file comes page by page from a file server
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot load --model {self.config.model}: {str(error).splitlines()[0]}") from None
        name, settings = SAMPLERS[self.config.sampler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            module.to(self.device).eval().requires_grad_(False)
        for module in (pipe.unet, pipe.vae):
            module.to(memory_format=torch.channels_last)  # what tensor cores and oneDNN compute convolutions in
        return pipe

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Text-encoder states of captions, [len(texts), tokens, width]; a long caption is cut at the model's limit."""
        tokenizer, size, rows = self.pipe.tokenizer, self.tuning.batch_size, []
        for i in range(0, len(texts), size):
            chunk = texts[i : i + size]
            padded = chunk + [""] * (size - len(chunk))
            tokens = tokenizer(
                padded,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            rows.append(self.pipe.text_encoder(tokens.input_ids.to(self.device))[0][: len(chunk)])
        return torch.cat(rows)

    @torch.no_grad()
    def generate(self, states: Tensor, ids: list[str], numbers: list[int]) -> Tensor:
        """Pictures of up to a batch of images, uint8 [n, H, W, 3] on the CPU.

        `states` [n, tokens, width] belong to the captions `ids`; `numbers` are the images' numbers within them.
        """
        count, pad = len(ids), self.tuning.batch_size - len(ids)
        start = torch.stack([noise(self.config.seed, i, j, self.latent_shape) for i, j in zip(ids, numbers, strict=True)])
        states = torch.cat([states, self._empty.expand(pad, -1, -1)]) if pad else states
        start = torch.cat([start, torch.zeros(pad, *self.latent_shape)]) if pad else start
        latents = self.denoise(self.pipe, states, start, self.config.steps)
        pixels = self.decode(self.pipe, latents)
        bad = ~(torch.isfinite(latents).flatten(1).all(1) & torch.isfinite(pixels).flatten(1).all(1))
        if bad[:count].any():
            self.retried += int(bad[:count].sum())
            if self._fp32 is None:
                self._fp32 = self._load("fp32")
            again = self.decode(self._fp32, self.denoise(self._fp32, states.float(), start, self.config.steps))
            pixels = torch.where(bad[:, None, None, None], again.to(pixels.dtype), pixels)
        return self._finish(pixels)[:count]

    def denoise(self, pipe: Any, states: Tensor, start: Tensor, steps: int) -> Tensor:
        """The sampler's loop with classifier-free guidance (arXiv 2207.12598): float32 noise to latents."""
        scheduler, guided = pipe.scheduler, self.config.guidance_scale != 1
        unet = self._unet if pipe is self.pipe else pipe.unet
        dtype = pipe.unet.dtype
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.to(self.device)  # the scheduler's own stay on the CPU: to read one from a GPU waits for it
        start = start.to(self.device, memory_format=torch.channels_last)
        latents = (start * scheduler.init_noise_sigma).to(dtype)
        if guided:
            states = torch.cat([self._empty.to(dtype).expand(len(start), -1, -1), states])
        for t, time in zip(scheduler.timesteps, times, strict=True):
            both = torch.cat([latents, latents]) if guided else latents
            both = scheduler.scale_model_input(both, t)
            torch.compiler.cudagraph_mark_step_begin()
            prediction = unet(both, time, encoder_hidden_states=states, return_dict=False)[0]
            if guided:
                without, with_caption = prediction.chunk(2)
                prediction = without + self.config.guidance_scale * (with_caption - without)
            latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
        return latents

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1], [n, 3, H, W], so many at a time that the last call is padded least."""
        count = len(latents)
        calls = -(-count // min(self.config.vae_batch_size, count))
        size = -(-count // calls)
        latents = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        padded = torch.cat([latents, latents[: size * calls - count]])
        return torch.cat([pipe.vae.decode(part, return_dict=False)[0] for part in padded.split(size)])[:count]

    def _finish(self, pixels: Tensor) -> Tensor:
        size = self.config.image_size
        pixels = pixels.float()
        if size is not None and size != pixels.shape[-1]:
            pixels = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def encode_jpeg(picture: Tensor, quality: int) -> bytes:
    """A picture, uint8 [H, W, 3], as JPEG."""
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(picture.numpy(), quality=quality, colorspace="RGB", colorsubsampling="420")
    return data


def generate_captions(model: TextToImage, captions: list[tuple[str, str]], stopped: Any = None) -> list[list[bytes]] | None:
    """JPEGs of every image of every (id, text), or None where `stopped()` came true between two batches."""
    config = model.config
    states = model.encode([text for _, text in captions])
    wanted = [(c, j) for c in range(len(captions)) for j in range(config.images_per_caption)]
    jpegs: list[Future[list[bytes]]] = []
    with ThreadPoolExecutor(1) as pool:  # JPEGs are made while the next batch is denoised
        size = model.tuning.batch_size
        for i in range(0, len(wanted), size):
            if stopped is not None and stopped():
                return None
            chunk = wanted[i : i + size]
            rows = [c for c, _ in chunk]
            pictures = model.generate(states[rows], [captions[c][0] for c in rows], [j for _, j in chunk])
            jpegs.append(pool.submit(lambda batch: [encode_jpeg(p, config.jpeg_quality) for p in batch], pictures))
    made = [jpeg for batch in jpegs for jpeg in batch.result()]
    m = config.images_per_caption
    return [made[m * c : m * (c + 1)] for c in range(len(captions))]


def load(run: Path, device: str) -> TextToImage:
    """The pipeline of a planned run. Raises UsageError where the model's folder has changed since."""
    from generation.plan import check_model, load_plan
    from stablerep.runtime.config import from_yaml

    config = from_yaml(GenerateConfig, run / "config.yaml")
    model = TextToImage(config, device)
    check_model(config, load_plan(run))  # not before: of a folder that is gone the pipeline says so
    return model

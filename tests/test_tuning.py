"""Settings that change pixels, samplers against the stock pipeline, and what `auto` stands for on a device."""

from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from helpers import shard_bytes
from workers import plan

import generation.pipeline
from generation import tuning
from generation.identity import caption_id
from generation.pipeline import TextToImage, generate_captions, load
from generation.plan import FREE, load_plan, plan_hash
from generation.remake import remake, stored
from generation.settings import TINY, GenerateConfig, check, resolve
from generation.tuning import Tuning, agree, largest, step_down
from generation.worker import work
from stablerep.data.shards import read_sidecar
from stablerep.runtime.config import to_dict
from stablerep.runtime.errors import UsageError
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_json
from stablerep.runtime.stop import StopFlag

TEXTS = ["a photo of a red bag", "a blue coat"]
CAPTIONS = [(caption_id(text), text) for text in TEXTS]
CHANGES = {
    "images_per_caption": 3, "guidance_scale": 3.0, "sampler": "unipc", "steps": 4, "seed": 1, "resolution": 16,
    "image_size": 16, "dtype": "bf16", "attention": "sdpa", "batch_size": 5, "vae_batch_size": 3, "compile": "off",
    "jpeg_quality": 90, "captions_per_shard": 7, "revision": "abc",
}  # fmt: skip


def config(**changes):
    small = {"out": "-", "steps": 3, "images_per_caption": 2, "batch_size": 4}
    return resolve(GenerateConfig(**{**small, **changes}), 0)


def pixels(model):
    """What the captions' images look like, int [n, H, W, 3]."""
    return np.stack([simplejpeg.decode_jpeg(jpeg).astype(int) for made in generate_captions(model, CAPTIONS) for jpeg in made])


def test_the_plans_hash_holds_every_setting_that_can_change_a_byte():
    other = FREE | {"model", "limit", "caption_column"}  # the model's fingerprint and the captions' hash stand for these
    assert set(to_dict(config())) == set(CHANGES) | other
    hashes = [plan_hash(replace(config(), **{name: value}), "", "") for name, value in CHANGES.items()]
    assert len({plan_hash(config(), "", ""), *hashes}) == 1 + len(hashes)
    free = replace(config(), out="elsewhere", lease_timeout_s=7.0, attempts=9)
    assert plan_hash(free, "", "") == plan_hash(config(), "", "")


@pytest.mark.parametrize("name", ["seed", "guidance_scale", "sampler", "steps", "resolution", "image_size", "dtype"])
def test_settings_that_change_what_is_seen(name):
    assert not np.array_equal(pixels(TextToImage(config(), "cpu")), pixels(TextToImage(config(**{name: CHANGES[name]}), "cpu")))


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"vae_batch_size": 1}, {"dtype": "bf16"}])
def test_settings_that_change_rounding_at_most(changes):
    apart = np.abs(pixels(TextToImage(config(), "cpu")) - pixels(TextToImage(config(**changes), "cpu")))
    assert apart.mean() < (3 if "dtype" in changes else 0.1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "unipc"])
def test_latents_are_those_of_the_stock_pipeline(sampler, guidance):
    import diffusers

    model = TextToImage(config(sampler=sampler, guidance_scale=guidance, steps=6), "cpu")
    start = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.denoise(model.pipe, model.encode(TEXTS * 2), start, steps=6)
    stock = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, requires_safety_checker=False)
    kind = {"ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}[sampler]
    stock.scheduler = getattr(diffusers, kind).from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(TEXTS * 2, num_inference_steps=6, guidance_scale=guidance, latents=start, output_type="latent").images
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_what_is_no_batch_size_is_one_line():
    with pytest.raises(UsageError, match="--batch-size many is neither a number nor auto"):
        check(GenerateConfig(out="-", batch_size="many"))
    with pytest.raises(UsageError, match="--batch-size must be at least 1"):
        check(GenerateConfig(out="-", batch_size="0"))
    assert config(batch_size="8").batch_size == 8


@pytest.mark.parametrize(
    ("fits", "saturates", "images", "size"),
    [(200, 1000, 1000, 125), (70, 1000, 384, 64), (70, 1000, 160, 54), (200, 16, 384, 16), (3, 1000, 10, 1), (0, 1, 10, 1)],
)
def test_the_largest_batch_that_fits_and_is_faster_fills_the_shards(fits, saturates, images, size):
    asked = []

    def seconds_at(rows):
        asked.append(rows)
        return 1 / min(rows, saturates) if rows <= fits else None

    assert largest(seconds_at, images) == size
    assert sum(rows > fits for rows in asked) <= 1, "nothing above what did not fit is tried"


def test_the_first_worker_on_a_kind_of_device_decides(tmp_path, monkeypatch):
    model = TextToImage(config(attention="auto", batch_size="auto", compile="auto"), "cpu")
    assert agree(tmp_path, model, images=10) == Tuning("sdpa", tuning.CPU_BATCH, False), "a CPU needs no measurement"
    assert not (tmp_path / "tuning").exists()
    model.device, model.device_name = torch.device("meta"), "Some GPU (80 GB)"  # any that is not the CPU
    found = iter([Tuning("xformers", 48, True), Tuning("sdpa", 64, False)])

    def measured(*_):
        mine = next(found)
        if mine.batch_size == 48:  # while the first one measures, another worker does too, and ends earlier
            agree(tmp_path, model, images=10)
        return mine, {"sdpa": 1.0}

    monkeypatch.setattr(tuning, "measure", measured)
    assert agree(tmp_path, model, images=10) == Tuning("sdpa", 64, False) == agree(tmp_path, model, images=10)
    assert [file.name for file in (tmp_path / "tuning").iterdir()] == ["Some-GPU-80-GB-.json"]
    model.tuning = Tuning("sdpa", 64, False)
    assert step_down(tmp_path, model) == Tuning("sdpa", 32, False) == agree(tmp_path, model, images=10)
    model.tuning = Tuning("sdpa", 1, False)
    assert step_down(tmp_path, model) is None
    model.config = config(batch_size=4)
    model.tuning = Tuning("sdpa", 4, False)
    assert step_down(tmp_path, model) is None, "a batch size that was asked for is kept"


def test_measuring_leaves_the_model_as_it_says(monkeypatch):
    monkeypatch.setattr(tuning, "PROBE_S", 0.0)
    monkeypatch.setattr(tuning, "SIZES", (1, 2, 4))
    model = TextToImage(config(attention="auto", batch_size="auto", compile="auto", captions_per_shard=2), "cpu")
    found, measured = tuning.measure(model, images=10)
    assert found == model.tuning and found.attention == "sdpa" and not found.compile, "no xformers on a CPU, too few to compile"
    assert set(measured["seconds an image and step"]) == {"sdpa", "eager"} and len(measured) == 1
    tried, faults = [], iter([RuntimeError("no compiler here")])

    def use(self, wanted):
        tried.append(wanted.compile)
        self.tuning = wanted
        if wanted.compile and (fault := next(faults, None)):
            raise fault

    monkeypatch.setattr(TextToImage, "use", use)
    found, measured = tuning.measure(model, images=10**9)
    assert measured["not compiled"] == "RuntimeError: no compiler here"
    assert True in tried and found == model.tuning and not found.compile, "tried for many images, and done without"
    monkeypatch.setattr(tuning, "_seconds_an_image", lambda model: 1.0 if model.tuning.compile else 2.0)
    assert tuning.measure(model, images=10**9)[0].compile and model.tuning.compile, "the faster one is taken"


def test_a_batch_that_does_not_fit_is_halved_and_no_shard_is_lost(captions, tmp_path, monkeypatch):
    run = tmp_path / "run"
    plan(run, captions, batch_size="auto")
    real = TextToImage.denoise

    def small_memory(self, pipe, states, start, steps):
        if len(start) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, pipe, states, start, steps)

    monkeypatch.setattr(TextToImage, "denoise", small_memory)
    assert work(run, device="cpu", stop=StopFlag(), name="a", node="n1") == "done"
    sidecars = [read_sidecar(run / "shards", k) for k in range(4)]
    assert {s["batch_size"] for s in sidecars} == {4} and not (run / "failures").exists()
    events = [e for e in read_events(run) if e["event"] == "smaller batch"]
    assert [e["batch_size"] for e in events] == [8, 4]
    (file,) = (run / "tuning").iterdir()
    assert read_json(file)["batch_size"] == 4, "the next worker on such a device begins there"
    caption = stored(run, load_plan(run), 5)
    assert caption.tuning.batch_size == 4 and remake(load(run, "cpu"), [caption]) == [caption.images]
    whole = tmp_path / "whole"
    plan(whole, captions, batch_size=4)
    monkeypatch.undo()
    assert work(whole, device="cpu", stop=StopFlag(), name="a", node="n1") == "done"
    assert shard_bytes(run) == shard_bytes(whole)


def test_a_compiled_unet_makes_the_same_pictures(monkeypatch):
    # The graph is captured whole, as on a GPU; the code of Inductor takes a minute and is measured in benchmarks/generate.py.
    monkeypatch.setattr(generation.pipeline, "COMPILER", {"backend": "aot_eager", "fullgraph": True})
    compiled, calls = TextToImage(config(compile="on"), "cpu"), []
    real = compiled._unet
    compiled._unet = lambda *a, **k: calls.append(1) or real(*a, **k)
    apart = np.abs(pixels(compiled) - pixels(TextToImage(config(), "cpu")))
    assert apart.max() <= 2 and len(calls) == 3

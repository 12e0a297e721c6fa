"""Generation on this machine: identity, resume, refusals, the audit."""

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import REPO, command, shard_bytes
from workers import complete, generate, plan

from generation.identity import caption_id
from generation.plan import check_resume, renew
from generation.settings import GenerateConfig, public_settings, resolve
from generation.worker import work
from stablerep.data.shards import DatasetIndex
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import UsageError
from stablerep.runtime.stop import StopFlag


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_equal_bytes(captions, reference, tmp_path, nursery, workers):
    run = tmp_path / "run"
    plan(run, captions)
    complete(run, nursery.start(run, workers))
    assert shard_bytes(run) == shard_bytes(reference)
    assert (run / "dataset.json").read_text() == (reference / "dataset.json").read_text()


def test_shard_size_and_subset_do_not_change_an_image(captions, reference, tmp_path, nursery):
    run = tmp_path / "run"
    plan(run, captions, captions_per_shard=5, limit=7)
    complete(run, nursery.start(run, 1))
    old, new = DatasetIndex(reference), DatasetIndex(run)
    assert new.ids == old.ids[:7]
    assert all(new.read(i, j) == old.read(i, j) for i in range(7) for j in range(2))


def test_resume_with_other_pixels_is_refused(captions, reference):
    done = generate(captions, reference, "--guidance-scale", "4")
    assert done.returncode == 2 and "guidance_scale 2.0 -> 4.0" in done.stderr and done.stderr.count("\n") == 1
    assert generate(captions, reference, "--nodes", "3").returncode == 0


def test_installed_copy_works_from_any_folder(captions, tmp_path):
    source, site, run = tmp_path / "source", tmp_path / "site", tmp_path / "run"
    for name in ("launch", "generation", "stablerep", "assets", "configs"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    shutil.rmtree(source)
    done = subprocess.run(
        [sys.executable, "-m", "launch.generate", "--captions", captions, "--out", "run", "--cluster", "local", "--limit", "4",
         "--images-per-caption", "1", "--steps", "2"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0 and (run / "dataset.json").exists(), done.stderr
    assert from_yaml(GenerateConfig, run / "config.yaml").model == str(site / "stablerep" / "assets" / "tiny")


def test_captions_that_changed_since_the_plan_are_refused(captions, tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine.txt"
    shutil.copy(captions, mine)
    plan(run, mine)
    config = from_yaml(GenerateConfig, run / "config.yaml")
    check_resume(replace(config, captions=[str(captions)]))  # another name, the same content
    mine.write_text("something else\n")
    with pytest.raises(UsageError, match="not the captions"):
        check_resume(config)
    check_resume(replace(config, captions=[]))


def test_a_model_whose_files_changed_since_the_plan_is_refused(captions, tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(REPO / "assets" / "tiny", model)
    plan(run, captions, model=str(model))
    config = from_yaml(GenerateConfig, run / "config.yaml")
    check_resume(config)
    weights = next((model / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1  # of a small file every byte counts
    weights.write_bytes(data)
    with pytest.raises(UsageError, match="its files have changed"):
        check_resume(config)
    with pytest.raises(UsageError, match="its files have changed"):  # a job that was submitted before
        work(run, device="cpu", stop=StopFlag(), name="worker-1")
    assert not list(run.glob("shards/*"))


def test_settings_of_how_to_work_may_change_and_take_effect(captions, tmp_path):
    run = tmp_path / "run"
    plan(run, captions)
    config = replace(from_yaml(GenerateConfig, run / "config.yaml"), attempts=7, lease_timeout_s=9.0)
    check_resume(config)
    renew(replace(config, captions=[]))
    assert from_yaml(GenerateConfig, run / "config.yaml") == config


def test_settings_that_cannot_work_are_refused_before_anything_is_written(captions, tmp_path):
    bad = {"steps": 1001, "jpeg_quality": 0, "image_size": 0, "resolution": 30, "batch_size": 0, "dtype": "fp8"}
    for name, value in bad.items():
        with pytest.raises(UsageError, match=name.replace("_", "-")):
            plan(tmp_path / "run", captions, **{name: value})
    shutil.copytree(REPO / "assets" / "tiny", tmp_path / "model", ignore=shutil.ignore_patterns("unet"))
    with pytest.raises(UsageError, match="not a Stable Diffusion pipeline"):
        plan(tmp_path / "run", captions, model=str(tmp_path / "model"))
    assert not (tmp_path / "run").exists()


def test_a_hub_model_is_named_by_its_id_and_pinned(tmp_path, monkeypatch):
    import huggingface_hub

    cached = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    shutil.copytree(REPO / "assets" / "tiny", cached)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(cached))
    config = resolve(GenerateConfig(out="-", model="owner/name"), 0)
    assert config.revision == "0123abcd" and public_settings(config)["model"] == "owner/name"


def test_dry_run_writes_nothing(captions, tmp_path):
    done = generate(captions, tmp_path / "run", "--dry-run")
    assert done.returncode == 0 and "24 images in 4 shards" in done.stdout and "1 empty and 1 duplicates" in done.stdout
    assert not (tmp_path / "run").exists()


def test_broken_shard_is_found_and_made_again(captions, reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    tar = run / "shards" / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert command("generation/audit.py", run).returncode == 1
    assert "000001" in command("generation/audit.py", run, "--repair").stdout
    assert generate(captions, run).returncode == 0
    assert shard_bytes(run) == shard_bytes(reference)
    assert command("generation/audit.py", run, "--remake", "3").returncode == 0


def test_missing_model_and_folder_in_use_are_one_line(captions, tmp_path):
    done = generate(captions, tmp_path / "run", "--model", str(tmp_path))
    assert done.returncode == 2 and "model_index.json" in done.stderr and not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert generate(captions, tmp_path / "mine").returncode == 2
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_jpegs_are_made_while_the_next_batch_is_denoised(captions, tmp_path, monkeypatch):
    import generation.pipeline as pipeline

    plan(tmp_path / "run", captions)
    model, batches = pipeline.load(tmp_path / "run", "cpu"), []
    next_batch, denoise, encode = threading.Event(), model.generate, pipeline.encode_jpeg

    def generate(*words):
        batches.append(words)
        if len(batches) == 2:
            next_batch.set()
        return denoise(*words)

    def wait_and_encode(*words):
        assert next_batch.wait(120), "the second batch waits for the first one's JPEGs"
        return encode(*words)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(pipeline, "encode_jpeg", wait_and_encode)
    images = pipeline.generate_captions(model, [(caption_id(t), t) for t in ("a red bag", "a blue coat", "a green dress")])
    assert len(batches) == 2 and [len(i) for i in images] == [2, 2, 2]


def test_status_tells_from_files(reference, tmp_path):
    done = command("launch/status.py", reference)
    assert done.returncode == 0 and "complete, 24/24 images" in done.stdout
    assert command("launch/status.py", tmp_path).returncode == 2


def test_nonfinite_latents_are_made_again_in_fp32(captions, reference):
    import torch

    from generation.pipeline import load

    model = load(reference, "cpu")
    good = model.generate(model.encode(["a red bag", "a blue coat"]), ["00" * 8, "11" * 8], [0, 0])
    real = model.pipe.unet.forward

    def poisoned(*args, **kwargs):
        out = real(*args, **kwargs)
        out[0][1] = float("nan")
        return out

    model.pipe.unet.forward = poisoned
    again = model.generate(model.encode(["a red bag", "a blue coat"]), ["00" * 8, "11" * 8], [0, 0])
    assert model.retried == 1 and torch.equal(again, good)


def test_stock_diffusers_loads_the_embedded_pipeline():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(REPO / "assets" / "tiny")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a red bag", num_inference_steps=4, guidance_scale=2.0).images[0]
    assert image.size == (32, 32) and len(set(image.getdata())) > 50
    assert sum(p.stat().st_size for p in Path(REPO / "assets" / "tiny").rglob("*")) < 6e6

"""Generation on this machine: identity, leases, kills, resume."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import REPO, SMALL, command, kill_all, local_pids, shard_bytes, wait_for

from generation.lease import Leases
from stablerep.runtime.config import from_yaml
from stablerep.runtime.events import read_events
from stablerep.runtime.stop import StopFlag


def generate(captions, run, *more):
    return command("launch/generate.py", "--captions", captions, "--out", run, "--cluster", "local", *SMALL, *more)


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_equal_bytes(captions, reference, tmp_path, workers):
    done = generate(captions, tmp_path / "run", "--nodes", str(workers))
    assert done.returncode == 0, done.stderr
    assert shard_bytes(tmp_path / "run") == shard_bytes(reference)
    assert (tmp_path / "run" / "dataset.json").read_text() == (reference / "dataset.json").read_text()


def test_shard_size_batch_place_and_subset_do_not_change_an_image(captions, reference, tmp_path):
    from stablerep.data.shards import DatasetIndex

    small = [*SMALL[:2], "--captions-per-shard", "5", *SMALL[4:]]
    done = command(
        "launch/generate.py", "--captions", captions, "--out", tmp_path / "r", "--cluster", "local", *small, "--limit", "7"
    )
    assert done.returncode == 0, done.stderr
    old, new = DatasetIndex([reference]), DatasetIndex([tmp_path / "r"])
    assert new.ids == old.ids[:7]
    assert all(new.read(i, j) == old.read(i, j) for i in range(7) for j in range(2))


def test_sigkill_at_random_moments_loses_nothing(tmp_path):
    run, chance = tmp_path / "run", random.Random(0)
    words = [REPO / "assets" / "captions.txt", run, "--limit", "60", "--steps", "25", "--lease-timeout-s", "2", "--nodes", "2"]

    def committed():
        return len(list((run / "shards").glob("*.json")))

    try:
        for _ in range(3):
            before = committed()
            assert generate(*words, "--wait", "false").returncode == 0
            wait_for(lambda n=before: committed() > n, 120, "a shard")
            time.sleep(chance.uniform(0, 1.5))  # the moment of the kill, not a wait for something
            kill_all(run)
        assert 3 <= committed() < 20 and list((run / "leases").glob("*.lease")), "killed at work"
        whole = shard_bytes(run)
        done = generate(*words)
    finally:
        kill_all(run)
    assert done.returncode == 0, done.stderr
    ended = shard_bytes(run)
    assert len(ended) == 20 and all(ended[name] == whole[name] for name in whole), "what was committed stays"
    audit = command("generation/audit.py", run, "--remake", "5")
    assert audit.returncode == 0, audit.stdout


def test_term_releases_the_lease_and_the_same_command_resumes(tmp_path):
    run = tmp_path / "run"
    words = [REPO / "assets" / "captions.txt", run, "--limit", "60", "--steps", "25"]
    assert generate(*words, "--wait", "false").returncode == 0
    wait_for(lambda: any(e["event"] == "claimed" for e in read_events(run)), 60, "a claim")
    pid = int(next(e for e in read_events(run) if e["event"] == "claimed")["process"].rsplit("-", 1)[1])
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not local_pids(run), 60, "a clean stop")
    assert not list((run / "leases").glob("*.lease")) and not (run / "dataset.json").exists()
    assert [e["outcome"] for e in read_events(run) if e["event"] == "ended"] == ["stopped"]
    assert command("launch/status.py", run).returncode == 3
    assert generate(*words).returncode == 0
    assert command("generation/audit.py", run, "--remake", "2").returncode == 0


def test_resume_with_other_pixels_is_refused(captions, reference):
    done = generate(captions, reference, "--guidance-scale", "4")
    assert done.returncode == 2 and "guidance_scale 2.0 -> 4.0" in done.stderr and done.stderr.count("\n") == 1
    assert generate(captions, reference, "--nodes", "3").returncode == 0


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


def test_shard_that_fails_thrice_is_set_aside(captions, tmp_path, reference, monkeypatch):
    import generation.pipeline
    from generation.plan import GenerateConfig, make_plan
    from generation.worker import work

    run, real = tmp_path / "run", generation.pipeline.generate_captions
    make_plan(replace(from_yaml(GenerateConfig, reference / "config.yaml"), out=str(run)), write=True)

    def broken(model, chunk, stopped):
        if any("astronaut" in text for _, text in chunk):
            raise RuntimeError("no astronauts")
        return real(model, chunk, stopped=stopped)

    monkeypatch.setattr(generation.pipeline, "generate_captions", broken)
    assert work(run, device="cpu", stop=StopFlag(), name="test") == "incomplete"
    assert len(shard_bytes(run)) == 3 and not (run / "dataset.json").exists()
    assert "failed 3 times: RuntimeError: no astronauts" in command("launch/status.py", run).stdout
    assert generate(captions, run).returncode == 0, "a new launch gives it new attempts"
    assert shard_bytes(run) == shard_bytes(reference)


def test_model_that_does_not_load_is_one_line_and_no_fault_of_the_shards(captions, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(REPO / "assets" / "tiny", model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    done = generate(captions, run, "--model", str(model))
    assert done.returncode == 3 and "Traceback" not in done.stderr and not (run / "failures").exists()
    assert "cannot load" in next(iter(run.glob("logs/*_log.out"))).read_text()


def test_status_tells_from_files(reference, tmp_path):
    done = command("launch/status.py", reference)
    assert done.returncode == 0 and "complete, 24/24 images" in done.stdout
    assert command("launch/status.py", tmp_path).returncode == 2


def test_stale_lease_is_taken_over_and_a_fresh_one_is_not(tmp_path):
    mine, other = Leases(tmp_path, "mine", 2.0), Leases(tmp_path, "other", 2.0)
    try:
        assert mine.claim(1) == "claimed" and other.claim(1) is None
        old = time.time() - 100
        (tmp_path / "000002.lease").write_text(json.dumps({"name": "dead"}))
        os.utime(tmp_path / "000002.lease", (old, old))
        assert other.claim(2) == "taken over"
        (tmp_path / "000001.lease").write_text(json.dumps({"name": "thief"}))
        mine.release()
        assert (tmp_path / "000001.lease").exists(), "somebody else's lease is left alone"
    finally:
        mine.close()
        other.close()


def test_many_claimants_of_a_stale_lease_have_one_winner(tmp_path):
    (tmp_path / "000000.lease").write_text("{}")
    os.utime(tmp_path / "000000.lease", (0, 0))
    child = (
        f"import sys; sys.path.insert(0, {str(REPO)!r})\nfrom pathlib import Path\nfrom generation.lease import Leases\n"
        f"print(Leases(Path({str(tmp_path)!r}), sys.argv[1], 60.0).claim(0))"
    )
    children = [subprocess.Popen([sys.executable, "-c", child, str(k)], stdout=subprocess.PIPE, text=True) for k in range(8)]
    answers = [c.communicate()[0].strip() for c in children]
    assert len([a for a in answers if a != "None"]) == 1


def test_nonfinite_latents_are_made_again_in_fp32(captions, reference):
    import torch

    from generation.pipeline import load

    model = load(reference, "cpu")
    good = model.generate(model.encode(["a red bag", "a blue coat"]), ["00" * 8, "11" * 8], [0, 0])
    real = model.pipe.unet.forward

    def poisoned(*args, **kwargs):
        out = real(*args, **kwargs)
        out.sample[1] = float("nan")
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

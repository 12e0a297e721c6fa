"""What a generation costs: against numbers worked out by hand, and with the embedded pipeline really measured."""

import json
import shutil
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
from helpers import REPO, SMALL

from generation import cost
from generation.calibrate import _enough, device_name, measure
from generation.settings import TINY, GenerateConfig
from generation.worker import work
from launch import generate, status
from launch.calibrate import calibrate
from launch.cluster import ClusterConfig
from launch.estimate import compare_lines, estimate_lines, estimate_on
from launch.generation_status import read_status
from launch.progress import duration
from launch.sweep import main as sweep
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.rundir import read_json, write_json
from stablerep.runtime.stop import StopFlag

A100 = "NVIDIA A100-SXM4-80GB"
CONFIG = GenerateConfig(out="-", model=str(TINY), dtype="fp16", images_per_caption=3, captions_per_shard=4, batch_size=8)
SD15 = GenerateConfig(
    out="-", model="stable-diffusion-v1-5/stable-diffusion-v1-5", dtype="fp16", steps=50, resolution=512, images_per_caption=10,
    captions_per_shard=16, batch_size=16,
)  # fmt: skip


def test_hours_wall_time_and_money_by_hand():
    """7 captions: a shard of 4 (12 images in 2 batches of 8: 8 s at 2 images/s) and one of 3, on 2 workers."""
    speed = cost.Speed(2.0, 10.0, "said")
    two = cost.estimate(CONFIG, 7, 2, A100, speed, 3.0, "EUR")
    assert two.wall_s == 10 + 8 and two.hours == pytest.approx(2 * 18 / 3600) and two.images_per_s == pytest.approx(21 / 18)
    assert two.money == pytest.approx(3 * 36 / 3600) and two.currency == "EUR" and two.source == "said"
    one = cost.estimate(CONFIG, 7, 1, A100, speed, None, "")
    assert one.wall_s == 10 + 2 * 8 and one.hours == pytest.approx(26 / 3600) and one.money is None
    assert cost.estimate(CONFIG, 1, 1, A100, speed, None, "").wall_s == 10 + 4, "3 images are one batch"
    assert cost.estimate(CONFIG, 0, 1, A100, None, 3.0, "").hours == 0.0
    nobody = cost.estimate(CONFIG, 7, 2, "B300", None, 3.0, "EUR")
    assert nobody.hours is nobody.wall_s is nobody.money is None
    assert estimate_lines(nobody, True) == ["GPU hours and wall time: unknown for B300: --calibrate measures it"]


def test_the_published_speed_serves_its_setting_only(tmp_path):
    """8.3 million captions x 10 images at 1.25 images/s are 18,444 GPU hours."""
    found = cost.speed_of(SD15, A100, tmp_path / "none.json")
    assert found is not None and found.images_per_s == 1.25 and "published" in found.source
    cluster = ClusterConfig(device="A100", gpus_per_node=4, price_per_gpu_hour=1.5, currency="EUR")
    guess = estimate_on(cluster, SD15, 8_300_000, 32, str(tmp_path / "none.json"))
    assert guess.hours == pytest.approx(8.3e7 / 1.25 / 3600, rel=1e-3) and guess.workers == 128
    assert guess.wall_s == pytest.approx(8.3e7 / 1.25 / 128, rel=1e-3)
    assert "about 18,446 GPU hours, 27,6" in estimate_lines(guess, True)[0] and " EUR;" in estimate_lines(guess, True)[0]
    for change in (
        {"steps": 25},
        {"guidance_scale": 1.0},
        {"dtype": "fp32"},
        {"resolution": 768},
        {"model": "stabilityai/sdxl"},
    ):
        assert cost.speed_of(replace(SD15, **change), A100, tmp_path / "none.json") is None, change
    for device in ("NVIDIA A10", "NVIDIA H100 80GB HBM3", None):
        assert cost.speed_of(SD15, device, tmp_path / "none.json") is None, device
    assert estimate_on(replace(cluster, device=None), SD15, 9, 1, "none.json").source.startswith("unknown: the cluster file")


def entry(config, device, rate, date="2026-01-01"):
    return {"settings": cost.settings_of(config), "device": device, "date": date, "images_per_s": rate, "load_s": 1.0}


def test_a_calibration_is_used_where_it_matches_and_not_otherwise(tmp_path):
    path = tmp_path / "deep" / "calibration.json"
    cost.store(path, entry(CONFIG, A100, 7.0))
    cost.store(path, entry(CONFIG, "NVIDIA A10", 3.0))
    cost.store(path, entry(CONFIG, A100, 9.0, "2026-02-02"))
    assert [e["images_per_s"] for e in read_json(path)] == [3.0, 9.0], "the newer one of a device took the older one's place"
    for device in (A100, "A100", "a100-sxm4"):
        found = cost.speed_of(CONFIG, device, path)
        assert found == cost.Speed(9.0, 1.0, f"measured on {A100} on 2026-02-02"), device
    assert cost.speed_of(CONFIG, "A10", path).images_per_s == 3.0 and cost.speed_of(CONFIG, "H100", path) is None
    same = {"seed": 5, "guidance_scale": 8.0, "images_per_caption": 9, "resolution": 32, "jpeg_quality": 50}
    assert cost.speed_of(replace(CONFIG, **same), "A100", path).images_per_s == 9.0, "what does not change the speed"
    for change in ({"dtype": "fp32"}, {"steps": 13}, {"guidance_scale": 1.0}, {"batch_size": 4}, {"resolution": 64}):
        assert cost.speed_of(replace(CONFIG, **change), "A100", path) is None, change
    shutil.copytree(TINY, tmp_path / "other")
    (tmp_path / "other" / "more.json").write_text("{}")
    assert cost.speed_of(replace(CONFIG, model=str(tmp_path / "other")), "A100", path) is None, "another model"
    for text in ("not json", "[1]", '{"a": 1}', '[{"device": "x"}]'):
        path.write_text(text)
        with pytest.raises(UsageError, match="is not a file that --calibrate wrote"):
            cost.store(path, entry(CONFIG, A100, 9.0))
        assert path.read_text() == text


def test_measuring_ends_when_it_is_steady_or_late():
    assert not _enough([0.0], 60) and not _enough([0.0, 29.0], 60) and _enough([0.0, 31.0], 60)
    assert not _enough([float(k) for k in range(8)], 60) and _enough([float(k) for k in range(9)], 60)
    assert not _enough([0.0, 1, 3, 4, 6, 7, 9, 10, 12], 60), "times of 1 and 2 s are not known to 2 %"


def test_a_job_that_cannot_measure_says_why(tmp_path, monkeypatch):
    def submit(cluster, out, *_):
        assert cluster.minutes == 10
        (out / "logs" / "1_0_log.out").parent.mkdir()
        (out / "logs" / "1_0_log.out").write_text("error: cannot measure on cuda:0: no GPU\nsrun: error: node1: exited\n")
        return ["1"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.calibrate.submit", submit)
    monkeypatch.setattr("launch.calibrate.still_active", lambda *_: [])
    monkeypatch.setattr("launch.calibrate.SEEN_S", 0.0)
    with pytest.raises(WorkError, match=r"^job 1 ended without a result: cannot measure on cuda:0: no GPU$"):
        calibrate(CONFIG, ClusterConfig(gpus_per_node=4), tmp_path / "calibration.json")
    assert list(tmp_path.iterdir()) == [], "no calibration, and nothing left"


def test_calibrate_then_estimate_then_compare(tmp_path, capsys, monkeypatch):
    """The embedded pipeline on this CPU. The estimate is checked against the measured number, never against a clock."""
    monkeypatch.setattr("generation.calibrate.measure", partial(measure, longest_s=3.0))
    monkeypatch.setattr("launch.cluster.submit", lambda _, run, *__: [work(run, device="cpu", stop=StopFlag(), name="worker")])
    path, run = tmp_path / "calibration.json", tmp_path / "run"
    words = ["--cluster", "local", "--calibration", str(path), *SMALL]
    plan = [*words, "--captions", str(REPO / "assets" / "captions.txt"), "--limit", "12", "--out", str(run), "--dry-run"]
    assert generate.main(plan) == 0
    assert f"unknown for {device_name('cpu')}: --calibrate measures it" in capsys.readouterr().out
    assert generate.main(["--calibrate", *words]) == 0
    (made,) = read_json(path)
    assert made["device"] == device_name("cpu") and made["batches"] >= 1
    assert made["images_per_s"] == pytest.approx(made["batches"] * 4 / made["seconds"], rel=0.05)
    assert f"{made['images_per_s']:.2f} images/s" in capsys.readouterr().out

    assert generate.main(plan) == 0
    wall = made["load_s"] + 4 * 2 * 4 / made["images_per_s"]  # four shards of six images: two batches of four each
    said = capsys.readouterr().out
    assert "12 captions, 24 images in 4 shards, about 0.000 GB" in said
    assert f"about {wall / 3600:.4f} CPU hours; {duration(wall)} on 1 CPUs" in said and f"measured on {made['device']}" in said
    assert generate.main([*plan, "--steps", "4"]) == 0 and "unknown for" in capsys.readouterr().out
    assert not run.exists()

    assert generate.main(plan[:-1]) == 0
    said = capsys.readouterr().out
    kept = read_json(run / "plan.json")["estimate"]
    assert kept["wall_s"] == pytest.approx(wall, abs=1e-5) and f"images/s (estimate {24 / wall:,.2f}, " in said
    paid = read_status(run).paid_s
    assert paid > 0 and f"really {paid / 3600:.4f} worker hours (estimate {wall / 3600:.4f}, " in said
    assert status.main([str(run)]) == 0 and f"really {paid / 3600:.4f} worker hours" in capsys.readouterr().out


def test_what_was_estimated_is_kept_and_stands_beside_the_truth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("launch.cluster.submit", Mock(return_value=["1"]))
    monkeypatch.setattr("launch.estimate._device", lambda *_: A100)
    path, run = tmp_path / "calibration.json", tmp_path / "run"
    config = replace(CONFIG, dtype="fp32", steps=3, batch_size=4)
    cost.store(path, {**entry(config, A100, 2.0), "load_s": 6.0})
    words = [
        "--captions",
        REPO / "assets" / "captions.txt",
        "--limit",
        12,
        "--out",
        run,
        "--cluster",
        "local",
        "--wait",
        "false",
    ]
    assert generate.main([*map(str, words), "--calibration", str(path), *SMALL]) == 0
    kept = read_json(run / "plan.json")["estimate"]
    assert kept["wall_s"] == 6 + 4 * 2 * 4 / 2 and kept["hours"] == pytest.approx(22 / 3600, abs=1e-6) and kept["workers"] == 1
    (run / "dataset.json").write_text(json.dumps({"bytes": 50_000_000}))
    write_json(run / "plan.json", {**read_json(run / "plan.json"), "megabytes": 40.0})
    lines = compare_lines(run, Mock(paid_s=44.0, mean_rate=24 / 44))
    assert "0.0122 worker hours (estimate 0.0061, +100 %)" in lines[0] and "0.55 images/s (estimate 1.09, -50 %)" in lines[0]
    assert "0.050 GB (estimate 0.040, +25 %)" in lines[0] and f"measured on {A100}" in lines[1]
    write_json(run / "plan.json", {**read_json(run / "plan.json"), "estimate": None})
    assert "worker hours (no estimate)" in compare_lines(run, Mock(paid_s=44.0, mean_rate=1.0))[0], (
        "a run that was planned before"
    )


def test_a_sweep_costs_what_its_generations_cost(tmp_path, monkeypatch, capsys):
    grid, cluster, path = tmp_path / "grid.yaml", tmp_path / "mine.yaml", tmp_path / "calibration.json"
    made = {"model": "tiny", "captions": [str(REPO / "assets" / "captions.txt")], "limit": 12, "batch_size": 8,
            "images_per_caption": 3, "captions_per_shard": 4}  # fmt: skip
    train = {"config": "train/demo.yaml", "steps": 4, "global_batch": 6, "image_size": 16}
    grid.write_text(json.dumps({"generate": made, "train": train, "grid": [{"generate.guidance_scale": [2, 8]}]}))
    facts = {"kind": "slurm", "gpus_per_node": 1, "device": "A100", "price_per_gpu_hour": 2.0, "currency": "EUR"}
    cluster.write_text(json.dumps(facts))
    monkeypatch.setenv("PATH", str(tmp_path))
    words = [str(grid), "--out", str(tmp_path / "out"), "--cluster", str(cluster), "--calibration", str(path), "--dry-run"]
    assert sweep(words) == 0 and "unknown for A100: --calibrate measures it" in capsys.readouterr().out
    cost.store(path, {**entry(replace(CONFIG, steps=12), A100, 0.01), "load_s": 0.0})
    assert sweep(words) == 0
    hours = 3 * 16 / 0.01 / 3600  # three shards of two batches of eight
    said = capsys.readouterr().out
    assert f"2 to do, about {2 * hours:.1f} GPU hours; GPU hours: measured on {A100}" in said, said
    assert f"what is known: about {2 * hours:.1f} GPU hours, {4 * hours:.2f} EUR" in said, "training has no number here"

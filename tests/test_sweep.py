"""Sweeps: a grid becomes cells and shared stages; what is there is not run again, whatever ended the sweep before."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, command, kill_all, local_pids, wait_for

from launch.cluster import Shape, load_cluster, submit
from launch.grid import expand, load_spec
from launch.job import ScoreTask
from launch.sweep import main
from stablerep.runtime.errors import UsageError
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_jsonl

GENERATE = {"limit": 6, "images_per_caption": 2, "steps": 2, "batch_size": 4, "captions_per_shard": 3}
TRAIN = {"config": "train/demo.yaml", "steps": 4, "global_batch": 4, "head_hidden": 16, "head_out": 8, "image_size": 16}
KNN = {"protocol": "knn", "dataset": "fashion", "labels": 5, "resamples": 1}


def spec_of(**changes):
    generate = {"captions": ["assets/captions.txt"], **GENERATE}
    return {"generate": generate, "train": TRAIN, "evaluate": [KNN], "real": {"photos": "/data/photos"}, **changes}


def grid(**changes):
    return expand(spec_of(**changes), REPO)


def kinds(sweep):
    return [sum(stage.kind == kind for stage in sweep.stages.values()) for kind in ("real", "generate", "train", "evaluate")]


def write(path, spec):
    path.write_text(json.dumps(spec))
    return path


def test_a_grid_is_a_union_of_products_less_what_is_excluded():
    methods = ["simclr", "clip", "stablerep"]
    products = [
        {"generate.guidance_scale": [2, 8], "train.method": methods},
        {"data": "real", "train.method": methods},
        {"data": "real", "train.method": ["simclr"]},
    ]
    sweep = grid(grid=products, exclude=[{"train.method": "stablerep", "data": "real"}], seeds=[0, 1])
    cells = [(c.axes.get("data", "synthetic"), c.axes.get("generate.guidance_scale"), c.axes["train.method"], c.seed)
             for c in sweep.cells]  # fmt: skip
    wanted = {("synthetic", w, m, s) for w in (2, 8) for m in methods for s in (0, 1)}
    wanted |= {("real", None, m, s) for m in methods[:2] for s in (0, 1)}
    assert set(cells) == wanted and len(cells) == len(wanted)


def test_equal_stages_are_one_and_what_does_not_matter_makes_none():
    sweep = grid(
        grid=[
            {"generate.guidance_scale": [2, 8], "train.method": ["simclr", "stablerep"]},
            {"data": "real", "generate.guidance_scale": [2, 8], "train.method": "simclr"},
        ],
        seeds=[0, 1, 2],
    )
    assert kinds(sweep) == [0, 2, 15, 15] and len(sweep.cells) == 15
    assert len({c.images for c in sweep.cells}) == 3 and all((c.images is None) == ("data" in c.axes) for c in sweep.cells)
    stage = next(s for s in sweep.stages.values() if s.key.startswith("train/stablerep_w8_m2_n6_s1-"))
    assert stage.config.seed == 1 and stage.needs == stage.config.data == [
        k for k in sweep.stages if k.startswith("generate/w8")
    ]


def names(**changes):
    return list(grid(**changes).stages)


def test_names_know_what_decides_a_result_and_nothing_else(tmp_path):
    before = names()
    assert before == [
        "generate/w2_m2_n6-10e0a7f4", "train/stablerep_w2_m2_n6_s0-808045a1",
        "evaluate/stablerep_w2_m2_n6_s0-808045a1/knn_fashion-15fae84a",
    ], "names changed: sweeps that exist would run anew"  # fmt: skip
    moved = shutil.copy(REPO / "assets" / "captions.txt", tmp_path / "moved.txt")
    assert names(generate={"captions": [moved], "nodes": 4, "attempts": 9, **GENERATE}) == before
    assert names(train={**TRAIN, "workers": 7, "checkpoint_every": 1, "nodes": 2, "gpus_per_node": 8}) == before
    other = names(train={**TRAIN, "optim": {"lr": 1.0}})
    assert other[0] == before[0] and not set(other[1:]) & set(before)
    (tmp_path / "captions.txt").write_text("another caption\n")
    assert not set(names(generate={"captions": [str(tmp_path / "captions.txt")], **GENERATE})) & set(before)


def test_settings_follow_from_others():
    sweep = grid(
        grid=[{"size": ["small", "big"], "train.method": ["simclr", "clip"], "train.temperature": [0.1, 0.2]}],
        when=[
            {"if": {"size": "big"}, "set": {"generate.limit": 9}},
            {"if": {"train.method": "clip", "size": ["big", "huge"]}, "set": {"train.optim.lr": 0.5, "train.temperature": 9}},
        ],
        evaluate=[KNN, {**KNN, "labels": 10, "if": {"train.method": "clip"}}],
    )
    for cell in sweep.cells:
        train, big, clip = sweep.stages[cell.train].config, cell.axes["size"] == "big", cell.axes["train.method"] == "clip"
        assert sweep.stages[cell.images].config.limit == (9 if big else 6)
        assert train.optim.lr == (0.5 if big and clip else 5e-4), "the YAML of the config, or the rule"
        assert train.temperature == cell.axes["train.temperature"], "an axis wins over a rule"
        assert len(cell.evaluate) == (2 if clip else 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"metod": "simclr"}}, "unknown key 'metod' in train; did you mean method"),
        ({"grid": [{"train.optim.lrr": [1]}]}, "unknown key 'train.optim.lrr' in grid; did you mean train.optim.lr"),
        ({"grid": [{"guidance_scale": [1]}]}, "unknown key 'guidance_scale' in grid; did you mean generate.guidance_scale"),
        ({"train": {"data": "x"}}, "unknown key 'data' in train"),
        ({"evaluate": [{"protokol": "knn"}]}, "unknown key 'protokol' in evaluate; did you mean protocol"),
        ({"exclude": [{"train.methods": "x"}]}, "unknown key 'train.methods' in exclude; did you mean train.method"),
        ({"when": [{"if": {"train.method": "x"}, "sett": {}}]}, "unknown key 'sett' in when; did you mean set"),
        ({"train": {"steps": "many"}}, "train: key 'steps'"),
        ({"grid": [{"data": "real", "real": "films"}]}, "real data 'films': `real:` names photos"),
        ({"exclude": [{"data": "synthetic"}]}, "the grid is empty"),
        ({"train": {"config": "train/none.yaml"}}, "cannot read config file train/none.yaml"),
        ({"evaluate": 3}, "evaluate: must be a list"),
        ({"when": [3]}, "when: must be a list of mappings, and 3 is none"),
        ({"seeds": 3}, "seeds: must be a list"),
        ({"real": ["photos"]}, "real: must be a mapping"),
        ({"plots": {"x": 1}}, "plots: must be a list"),
        ({"cost": {"captoins": 1}}, "unknown key 'captoins' in cost; did you mean captions"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(changes, said):
    with pytest.raises(UsageError, match=said.replace("?", ".")):
        grid(**changes)


def test_quick_is_merged_over_the_rest(tmp_path):
    path = write(tmp_path / "grid.yaml", {**spec_of(), "quick": {"train": {"steps": 2}, "seeds": [5]}})
    whole, quick = (expand(load_spec(path, quick), tmp_path) for quick in (False, True))
    (cell,) = quick.cells
    assert quick.stages[cell.train].config.steps == 2 and cell.seed == 5 and whole.cells[0].seed == 0
    assert quick.stages[cell.train].config.global_batch == 4


@pytest.mark.parametrize("name", sorted(p.stem for p in (REPO / "configs" / "sweep").glob("*.yaml")))
def test_configs_that_come_along_are_planned_without_slurm(name, tmp_path, monkeypatch, capsys):
    cluster = write(tmp_path / "a100.yaml", {"kind": "slurm", "gpus_per_node": 8, "minutes": 1440})
    monkeypatch.setenv("PATH", str(tmp_path))
    path = REPO / "configs" / "sweep" / f"{name}.yaml"
    assert main([str(path), "--out", str(tmp_path / "out"), "--cluster", str(cluster), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "GPU hours" in said or "\ncost:" not in path.read_text()
    assert "nothing was written" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generate": {"captions": ["none.txt"]}}, "no caption file none.txt"),
        ({"evaluate": [{"protocol": "knn", "dataset": "cifar10", "data_root": "none"}]}, "cifar-10-batches-py is not there"),
        ({"grid": [{"data": "real", "train.method": "simclr"}]}, "no real data /data/photos"),
        ({"train": {**TRAIN, "nodes": 3}}, "does not divide into 3 ranks"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(changes, said, tmp_path):
    path = write(tmp_path / "grid.yaml", spec_of(**changes))
    with pytest.raises(UsageError, match=said):
        main([str(path), "--out", str(tmp_path / "out"), "--cluster", "local"])
    assert not (tmp_path / "out").exists()


def started(out):
    return [r["key"] for r in read_jsonl(out / "stages.jsonl") if r["event"] == "started"]


def run(path, out):
    return command("launch/sweep.py", path, "--out", out, "--cluster", "local")


def test_a_cell_that_fails_stops_no_other_and_a_deleted_result_is_one_cell(tmp_path):
    spec = spec_of(grid=[{"train.method": ["stablerep"], "train.global_batch": [4, 3]}])
    path, out = write(tmp_path / "grid.yaml", spec), tmp_path / "out"
    first = run(path, out)
    assert first.returncode == 1 and "--global-batch 3 is not a multiple of 2" in first.stderr, first.stdout + first.stderr
    assert "not run: train/stablerep_w2" in first.stderr
    (result,) = out.rglob("results.jsonl")
    score = next(read_jsonl(result))
    assert (out / "table.md").exists() and f"{score['value']:.1f}" in (out / "table.md").read_text()
    status = command("launch/status.py", out)
    assert status.returncode == 3 and "3/5 stages done" in status.stdout and "failed: train/" in status.stdout, status.stdout

    only = {**spec, "grid": [{"train.method": ["stablerep"], "train.global_batch": [4]}]}
    before, path = len(started(out)), write(path, only)
    result.unlink()
    again = run(path, out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (
        started(out)[before:] == [f"evaluate/{result.parents[1].name}"] and next(read_jsonl(result))["value"] == score["value"]
    )
    idle = run(path, out)
    assert idle.returncode == 0 and "nothing to run" in idle.stdout and len(started(out)) == before + 1

    result.unlink()  # two ranks of a job give the same number
    task = ScoreTask(str(out), result.parents[1].name, [result.parent.name], "two", 0)
    submit(load_cluster("local"), result.parents[1], Shape("evaluate", tasks_per_node=2), [task], fresh=False)
    wait_for(result.exists, 120, "the score of two ranks")
    assert abs(next(read_jsonl(result))["value"] - score["value"]) < 0.2


def begin(path, out):
    return subprocess.Popen(
        [sys.executable, str(REPO / "launch/sweep.py"), str(path), "--out", str(out), "--cluster", "local"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_killed_sweep_goes_on_and_a_stopped_one_saves(reference, tmp_path):
    train = {**TRAIN, "steps": 100000, "log_every": 1, "checkpoint_every": 100000}
    spec = spec_of(train=train, real={"photos": str(reference)}, grid=[{"data": "real"}], evaluate=[])
    path, out = write(tmp_path / "grid.yaml", spec), tmp_path / "out"
    sweep = begin(path, out)
    try:
        wait_for(lambda: list(out.glob("train/*/metrics.jsonl")), 120, "a step")
        (work,) = out.glob("train/*")
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
        waiter = next(read_jsonl(out / "stages.jsonl"))["pid"]
        wait_for(lambda: not alive(waiter), 20, "the command of the killed sweep to end")
        assert local_pids(work), "the training itself goes on"

        sweep = begin(path, out)
        wait_for(lambda: len(started(out)) == 2, 60, "the second sweep")
        assert command("launch/status.py", out).stdout.count("1 running") == 1
        other = run(path, out)
        assert other.returncode == 1 and "another sweep is at work" in other.stderr
        sweep.send_signal(signal.SIGTERM)
        assert sweep.wait(120) == 130 and not local_pids(work)
        (stopped,) = [e for e in read_events(work) if e["event"] == "stopped"]
        assert len(list(read_jsonl(work / "jobs.jsonl"))) == 1 and stopped["step"] > 0
        (saved,) = (work / "checkpoints").glob("step-*")
        assert int(saved.name.split("-")[1]) == stopped["step"]
    finally:
        sweep.kill()
        sweep.wait()
        for folder in out.glob("train/*"):
            kill_all(folder)

"""A sweep on a real Slurm: submitted at once, in order whatever comes between, and what never came fails clearly."""

import json

from helpers import command

from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_jsonl

SPEC = {
    "generate": {"captions": ["assets/captions.txt"], "limit": 6, "images_per_caption": 2, "steps": 2, "captions_per_shard": 3},
    "train": {
        "config": "train/demo.yaml", "steps": 4, "global_batch": 4, "head_hidden": 16, "head_out": 8, "image_size": 16,
        "nodes": 2,
    },
    "evaluate": [{"protocol": "knn", "dataset": "fashion", "labels": 5, "resamples": 1}],
}  # fmt: skip


def sweep(lab, folder, methods):
    path = folder / "grid.yaml"
    path.write_text(json.dumps({**SPEC, "grid": [{"train.method": methods}]}))
    words = ["launch/sweep.py", path, "--out", folder / "out", "--cluster", "test"]
    return command(*words, SLURM_CONF=str(lab.conf), PATH=lab.env["PATH"])


def queue(lab, *more):
    return lab.call("squeue", "-h", "-r", *more).stdout.split()


def idle(lab):
    """Nothing is queued; a controller that is too busy to answer has no empty queue."""
    said = lab.call("squeue", "-h")
    return said.returncode == 0 and not said.stdout.strip()


def test_a_requeued_generation_holds_the_trainings_back(lab, tmp_path):
    out = tmp_path / "out"
    lab.call("scontrol", "update", "partitionname=main", "state=down")  # it queues, and starts nothing
    try:
        first = sweep(lab, tmp_path, ["simclr", "stablerep"])
        assert first.returncode == 0, first.stdout + first.stderr
        jobs = queue(lab, "-o", "%i")
        second = sweep(lab, tmp_path, ["simclr", "stablerep"])
        assert len(jobs) == 5 and second.returncode == 0, second.stdout + second.stderr
        assert sorted(queue(lab, "-o", "%i")) == sorted(jobs), "what is queued is not submitted again"
        (generation,) = queue(lab, "-n", "generate", "-o", "%i")
    finally:
        lab.call("scontrol", "update", "partitionname=main", "state=up")
    lab.until(lambda: lab.call("scontrol", "requeue", generation).returncode == 0, 30, "a requeue")
    lab.until(lambda: idle(lab), 240, "the end of all jobs")

    (dataset,) = out.glob("generate/*/dataset.json")
    runs = sorted(out.glob("train/*"))
    for run in runs:
        (start, *_) = [e for e in read_events(run) if e["event"] == "started"]
        assert start["time"] > dataset.stat().st_mtime, "afterany waits for a job that comes back"
        assert [r["step"] for r in read_jsonl(run / "metrics.jsonl")][-1] == 4
    assert len(runs) == len(list(out.glob("evaluate/*/*/results.jsonl"))) == 2
    done = sweep(lab, tmp_path, ["simclr", "stablerep"])
    assert done.returncode == 0 and "nothing to run" in done.stdout, done.stdout + done.stderr
    assert (out / "table.md").exists() and command("launch/status.py", out).returncode == 0


def test_training_whose_data_never_came_fails_once(lab, tmp_path):
    assert sweep(lab, tmp_path, ["simclr"]).returncode == 0
    lab.call("scancel", *queue(lab, "-n", "generate", "-o", "%i"))
    lab.until(lambda: idle(lab), 120, "the end of all jobs")
    (run,) = (tmp_path / "out").glob("train/*")
    (failed,) = [e for e in read_events(run) if e["event"] == "failed" and e["final"]]
    assert "generation is not complete" in failed["why"] and len([e for e in read_events(run) if e["event"] == "started"]) == 2
    assert not [e for e in read_events(run) if e["event"] == "requeued"] and not (run / "train.json").exists()
    said = command("launch/status.py", tmp_path / "out", SLURM_CONF=str(lab.conf), PATH=lab.env["PATH"])
    assert "generation is not complete" in said.stdout and said.stdout.count("1 failed") == 3, said.stdout
    again = sweep(lab, tmp_path, ["simclr"])
    assert again.returncode == 0 and again.stdout.count("queued") == 3, again.stdout + again.stderr

"""Generation on a real Slurm: equal bytes, requeue, kill, node loss, MaxArraySize, refusals."""

import os
import signal
from pathlib import Path

import pytest
from helpers import REPO, SMALL, command, shard_bytes
from lab import Lab
from slurm_need import need

from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_jsonl


def ours(lab, *words):
    return command(*words, SLURM_CONF=str(lab.conf), PATH=lab.env["PATH"])


def generate(lab, captions, run, *more):
    return ours(lab, "launch/generate.py", "--captions", captions, "--out", run, "--cluster", "test", *SMALL, *more)


def idle(lab):
    return not lab.call("squeue", "-h").stdout.strip()


def test_array_over_four_nodes_equals_the_local_run(lab, captions, reference, tmp_path):
    done = generate(lab, captions, tmp_path / "run", "--nodes", "4", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert shard_bytes(tmp_path / "run") == shard_bytes(reference)
    (record,) = read_jsonl(tmp_path / "run" / "jobs.jsonl")
    assert [j.split("_")[1] for j in record["jobs"]] == ["0", "1", "2", "3"]
    assert generate(lab, captions, tmp_path / "run", "--nodes", "2").stdout.strip().endswith("nothing to do")


def test_requeue_kill_and_node_loss_lose_nothing(lab, tmp_path):
    captions = REPO / "assets" / "captions.txt"
    words = [captions, tmp_path / "run", "--limit", "42", "--steps", "40", "--lease-timeout-s", "3", "--nodes", "4"]
    run = tmp_path / "run"
    assert generate(lab, *words).returncode == 0

    def claims():
        return {e["process"] for e in read_events(run) if e["event"] == "loaded"}

    lab.until(lambda: len(claims()) >= 3, 180, "three workers at work")
    by_task = {p.split("_")[1].split("-")[0]: p for p in claims()}
    first, second, third = list(by_task)[:3]
    array = next(iter(by_task.values())).split("-")[2].split("_")[0]
    node = lab.call("squeue", "-h", "-r", "-j", f"{array}_{third}", "-o", "%N").stdout.strip()
    assert node
    lab.lose(node)
    assert lab.call("scontrol", "requeue", f"{array}_{first}").returncode == 0
    os.kill(int(by_task[second].rsplit("-", 1)[1]), signal.SIGKILL)
    lab.until(lambda: (run / "dataset.json").exists() and idle(lab), 300, "the dataset and an empty queue")
    again = {p.split("_")[1].split("-")[0] for p in (e["process"] for e in read_events(run)) if "-r1-" in p}
    assert {first, third} <= again, "the requeued and the lost element came back"
    audit = command("generation/audit.py", run, "--remake", "2")
    assert audit.returncode == 0 and "all sound (complete)" in audit.stdout, audit.stdout


def test_signalled_element_releases_and_requeues_itself(lab, tmp_path):
    run = tmp_path / "run"
    words = [REPO / "assets" / "captions.txt", run, "--limit", "30", "--steps", "40", "--nodes", "2"]
    assert generate(lab, *words).returncode == 0
    lab.until(lambda: any(e["event"] == "loaded" for e in read_events(run)), 120, "a claim")
    process = next(e["process"] for e in read_events(run) if e["event"] == "loaded")
    job = process.split("-")[2]
    lab.call("scancel", "--signal=USR2", job)
    lab.until(lambda: any(e["event"] == "requeued" for e in read_events(run)), 60, "the requeue")
    assert [e["job"] for e in read_events(run) if e["event"] == "requeued"] == [job]
    lab.until(lambda: (run / "dataset.json").exists() and idle(lab), 240, "the dataset")


def test_cancelled_job_stays_cancelled(lab, tmp_path):
    run = tmp_path / "run"
    words = [REPO / "assets" / "captions.txt", run, "--limit", "60", "--steps", "40", "--nodes", "2"]
    assert generate(lab, *words).returncode == 0
    lab.until(lambda: sum(e["event"] == "loaded" for e in read_events(run)) == 2, 120, "two workers at work")
    assert lab.call("scancel", next(read_jsonl(run / "jobs.jsonl"))["jobs"][0].split("_")[0]).returncode == 0
    lab.until(lambda: idle(lab), 60, "an empty queue")
    assert [e["event"] for e in read_events(run) if "requeued" in e["event"]] == ["not requeued"] * 2
    assert not list((run / "leases").glob("*.lease")) and not (run / "dataset.json").exists()


def test_capped_array_is_stopped_and_nothing_comes_back(lab, tmp_path):
    run = tmp_path / "run"
    words = [REPO / "assets" / "captions.txt", run, "--limit", "60", "--steps", "40", "--nodes", "6", "--max-running", "2"]
    assert generate(lab, *words).returncode == 0

    def queue(*states):
        return lab.call("squeue", "-h", "-r", "-o", "%i", *states).stdout.split()

    lab.until(lambda: sum(e["event"] == "loaded" for e in read_events(run)) == 2, 120, "two workers at work")
    assert len(queue("-t", "RUNNING")) == 2 and len(queue()) == 6
    done = ours(lab, "launch/generate.py", "--out", run, "--stop", "--wait", "--cluster", "test")
    assert done.returncode == 0 and not queue(), done.stderr
    assert [e["outcome"] for e in read_events(run) if e["event"] == "ended"] == ["halted"] * 2
    assert not any(e["event"] == "requeued" for e in read_events(run)) and not list((run / "leases").iterdir())


def test_arrays_are_split_at_max_array_size(lab, captions, tmp_path):
    one = ["--captions-per-shard", "1", "--nodes", "12"]
    done = generate(lab, captions, tmp_path / "run", *one, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "--array=0-10%" in done.stdout and done.stdout.count("#!/bin/bash") == 2
    assert "--signal=USR2@30" in done.stdout and "--requeue" in done.stdout
    assert generate(lab, captions, tmp_path / "run", *one).returncode == 0
    assert [len(r["jobs"]) for r in read_jsonl(tmp_path / "run" / "jobs.jsonl")] == [11, 1]
    assert len(lab.call("squeue", "-h", "-r", "-o", "%i").stdout.split()) == 12


@pytest.mark.parametrize(
    ("key", "words"), [("partition: nope", "partition"), ("constraint: h900", "eature"), ("exclude: nodule", "node name")]
)
def test_what_slurm_refuses_is_one_line(lab, captions, tmp_path, key, words):
    (tmp_path / "bad.yaml").write_text(f"kind: slurm\ngpus_per_node: 0\ncpus_per_task: 1\n{key}\n")
    done = generate(lab, captions, tmp_path / "run", "--cluster", str(tmp_path / "bad.yaml"))
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_gpu_nodes_run_a_worker_a_gpu(lab, captions, tmp_path):
    done = generate(lab, captions, tmp_path / "run", "--nodes", "2", "--gpus-per-node", "2", "--dry-run")
    assert "--gpus-per-node=2" in done.stdout and "--ntasks-per-node=2" in done.stdout and "fp16" in done.stdout


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="the GPUs of this machine are not broken")
def test_job_with_a_broken_gpu_leaves_its_node(lab, captions, tmp_path):
    """The lab's GPUs are names only: torch finds no driver, as on a node that lost its own."""
    run = tmp_path / "run"
    assert generate(lab, captions, run, "--nodes", "1", "--gpus-per-node", "1").returncode == 0
    lab.until(lambda: any("exclude" in e for e in read_events(run)), 120, "the requeue")
    (failed,) = (e for e in read_events(run) if e["event"] == "failed")
    (requeued,) = (e for e in read_events(run) if e["event"] == "requeued")
    assert failed["fault"] == "gpu" and requeued["exclude"] == [failed["node"]]
    lab.until(lambda: lab.call("squeue", "-h", "-o", "%T").stdout.split() == ["PENDING"], 60, "the job in the queue")
    shown = lab.call("scontrol", "show", "job", requeued["job"]).stdout
    assert f"ExcNodeList={failed['node']}\n" in shown and "Restarts=1" in shown, shown


def test_with_accounting(captions, reference, tmp_path):
    need(True)
    with Lab(nodes=2, accounting=True) as other:
        done = generate(other, captions, tmp_path / "run", "--nodes", "2", "--wait")
        assert done.returncode == 0, done.stdout + done.stderr
        assert shard_bytes(tmp_path / "run") == shard_bytes(reference)
        other.until(lambda: "COMPLETED" in other.call("sacct", "-X", "-n", "-o", "state").stdout, 60, "sacct")

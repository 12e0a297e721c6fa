"""Generation on a real Slurm: equal bytes, requeue, kill, node loss, MaxArraySize, refusals."""

import os
import signal
import statistics
from collections import Counter
from pathlib import Path

import pytest
from helpers import REPO, SMALL, command, shard_bytes, wait_for
from lab import Lab
from slurm_need import need
from workers import committed, complete, plan

from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_jsonl

CAPTIONS = REPO / "assets" / "captions.txt"
MANY = {"limit": 72, "captions_per_shard": 1, "images_per_caption": 2, "batch_size": 2, "steps": 10}


def ours(lab, *words):
    return command(*words, SLURM_CONF=str(lab.conf), PATH=lab.env["PATH"])


def generate(lab, captions, run, *more):
    return ours(lab, "launch/generate.py", "--captions", captions, "--out", run, "--cluster", "test", *SMALL, *more)


def idle(lab):
    return not lab.call("squeue", "-h").stdout.strip()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, nursery):
    """The run of `MANY` as two workers of this machine make it, without Slurm and undisturbed."""
    run = tmp_path_factory.mktemp("alone") / "run"
    plan(run, CAPTIONS, **MANY)
    complete(run, nursery.start(run, 2))
    return run


def generate_many(lab, run, *more):
    return generate(lab, CAPTIONS, run, *(word for k, v in MANY.items() for word in ("--" + k.replace("_", "-"), v)), *more)


def test_array_over_four_nodes_equals_the_local_run_and_ends_together(lab, alone, tmp_path):
    run = tmp_path / "run"
    done = generate_many(lab, run, "--nodes", "6", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert shard_bytes(run) == shard_bytes(alone)
    (record,) = read_jsonl(run / "jobs.jsonl")
    assert [j.split("_")[1] for j in record["jobs"]] == ["0", "1", "2", "3", "4", "5"]
    events = list(read_events(run))
    assert len({e["node"] for e in events if e["event"] == "started"}) == 4
    assert Counter(e["shard"] for e in events if e["event"] == "committed") == dict.fromkeys(range(MANY["limit"]), 1)
    assert tail(events) <= 1.1
    assert generate_many(lab, run, "--nodes", "2").stdout.strip().endswith("nothing to do")
    for name in ("dataset.json", "shards/000003.json", "shards/000007.json"):
        (run / name).unlink()
    assert "dry run: 2 jobs" in generate_many(lab, run, "--nodes", "6", "--dry-run").stdout, "no more jobs than shards"


def tail(events):
    """Wall time of a run, over what it is where all workers that came to the end run out of work together: the same work
    from the same starts, shared without rest. From the first start to the complete dataset; a worker's work ends with its
    last commit."""
    end = min(e["time"] for e in events if e["event"] == "completed")
    start = min(e["time"] for e in events if e["event"] == "started")
    living = {e["process"] for e in events if e["event"] == "ended" and e["outcome"] == "done"}
    last = {e["process"]: e["time"] for e in events if e["process"] in living and e["event"] in ("started", "committed")}
    return (end - start) / (statistics.fmean(min(end, t) for t in last.values()) - start)


def pid_of(event):
    return int(event["process"].rsplit("-", 1)[1])


def test_every_fault_in_one_run_loses_nothing(lab, alone, tmp_path):
    """The controller killed and restarted, a node lost, an element requeued, one killed, one warned while there is no
    controller, the partition preempted."""
    run = tmp_path / "run"
    assert generate_many(lab, run, "--nodes", "6", "--lease-timeout-s", "5").returncode == 0

    def of(kind):
        return [e for e in read_events(run) if e["event"] == kind]

    lab.until(lambda: len(of("loaded")) == 6, 240, "six workers at work")
    with lab.no_controller(signal.SIGKILL):  # while Slurm's state is as it was some seconds ago: it saves it every few
        pass
    first = {e["process"].split("-")[2]: e for e in of("started")}  # element -> its first life
    lost = next(iter(first.values()))["node"]
    by_node = {e["node"]: element for element, e in first.items() if e["node"] != lost}
    requeued, killed, *_ = by_node.values()
    lab.lose(lost)
    os.kill(pid_of(first[killed]), signal.SIGKILL)
    assert lab.call("scontrol", "requeue", requeued).returncode == 0
    warned, *preempted = set(first) - {e for e in first if first[e]["node"] == lost} - {requeued, killed}
    with lab.no_controller(signal.SIGTERM):  # SIGKILL would lose the requeue, and with it the element (not its work)
        os.kill(pid_of(first[warned]), signal.SIGTERM)
        wait_for(
            lambda: any(e["process"] == first[warned]["process"] for e in of("interrupted")), 120, "the warned element to end"
        )
    high = ["sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
    assert lab.call(*high).returncode == 0
    lab.until(lambda: {warned, *preempted} <= {e["job"] for e in of("requeued")}, 120, "the preempted elements to give way")
    assert committed(run) < MANY["limit"], "all that happened at work"
    lab.until(lambda: (run / "dataset.json").exists() and idle(lab), 300, "the dataset and an empty queue")

    assert shard_bytes(run) == shard_bytes(alone)
    again = {e["process"].split("-")[2] for e in of("started") if "-r0-" not in e["process"]}
    assert again == set(first) - {killed}, "who was lost, requeued or preempted came back"
    assert {e["fault"] for e in of("interrupted")} == {"preemption"}
    deaths = len(of("started")) - len(of("ended"))
    made = Counter(e["shard"] for e in of("committed"))
    assert deaths >= 2 and made.total() - len(made) <= deaths, "no shard is made more often than deaths explain"
    assert tail(list(read_events(run))) <= 1.1
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


def test_complete_run_leaves_no_job_in_the_queue(lab, captions, tmp_path):
    more = ["--nodes", "4", "--max-running", "1"]  # the first element makes all
    done = generate(lab, captions, tmp_path / "watched", *more, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    (array,) = {job.split("_")[0] for job in next(read_jsonl(tmp_path / "watched" / "jobs.jsonl"))["jobs"]}
    assert not lab.call("squeue", "-h", "-t", "PENDING,RUNNING", "-j", array).stdout
    assert generate(lab, captions, tmp_path / "run", *more).returncode == 0
    lab.until(lambda: (tmp_path / "run" / "dataset.json").exists() and idle(lab), 120, "the dataset and an empty queue")
    lives = [e["process"] for e in read_events(tmp_path / "run") if e["event"] == "started"]
    assert len(lives) == 2, "the second finds nothing to do, and cancels the other two"


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

"""Training on a real Slurm: whatever stops it, the same job comes back and goes on from its newest checkpoint."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

from helpers import REPO, command, wait_for

from launch.lives import read_lives
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_jsonl


def words(data, run, cluster, *more):
    return [
        "launch/train.py", "--config", str(REPO / "configs/train/demo.yaml"), "--data", str(data), "--out", str(run),
        "--cluster", str(cluster), "--nodes", "2", "--global-batch", "16", "--steps", "100000", "--log-every", "1",
        "--checkpoint-every", "20", "--head-hidden", "32", "--head-out", "16", *more,
    ]  # fmt: skip


def train(lab, *args, **kwargs):
    return command(*words(*args), SLURM_CONF=str(lab.conf), PATH=lab.env["PATH"], **kwargs)


def cluster_file(folder, **facts):
    path = folder / "cluster.yaml"
    base = {"kind": "slurm", "partition": "main", "minutes": 30, "signal_lead_s": 30, "gpus_per_node": 0, "cpus_per_task": 1}
    path.write_text(json.dumps({**base, "mem_gb": 1, **facts}))
    return path


def lives(run):
    return read_lives(read_events(run))


def wait_for_life(run, number, seconds=240):
    """Until life `number` (from 0) has logged a step and saved a checkpoint; no test's hand shortens Slurm's wait."""

    def there():
        seen = lives(run)
        return len(seen) > number and seen[number].of("first step") and seen[number].progressed

    wait_for(there, seconds, f"a checkpoint of life {number}: {[life.name for life in lives(run)]}")
    return lives(run)[number]


def check_history(run):
    """One job, every life resumed from the newest checkpoint, no gap in the steps, redone steps as they were."""
    seen = lives(run)
    saved = [max((x.saved or 0 for x in seen[:n]), default=0) for n in range(len(seen))]
    assert [life.first_step for life in seen] == saved
    (record,) = read_jsonl(run / "jobs.jsonl")
    assert {life.job for life in seen} == set(record["jobs"])
    steps = {}
    for r in read_jsonl(run / "metrics.jsonl"):
        assert steps.setdefault(r["step"], (r["loss"], r["ids"])) == (r["loss"], r["ids"])
    assert sorted(steps) == list(range(1, max(steps) + 1))


@contextmanager
def watched(lab, run):
    """A user's `status.py --watch`, which ends Slurm's wait before a requeued job."""
    said = run.with_name("watch.log")
    watcher = subprocess.Popen(
        [sys.executable, str(REPO / "launch/status.py"), str(run), "--watch"], env=lab.env,
        stdout=said.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield
        assert watcher.poll() is None, said.read_text()
    finally:
        watcher.kill()
        watcher.wait()


def test_node_failure_killed_rank_preemption_and_cancellation(lab, reference, tmp_path):
    run = tmp_path / "run"
    assert train(lab, reference, run, "test").returncode == 0
    (job,) = next(read_jsonl(run / "jobs.jsonl"))["jobs"]
    with watched(lab, run):
        node = wait_for_life(run, 0).of("started")[-1]["node"]
        assert lab.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test").returncode == 0

        process = next(e["process"] for e in wait_for_life(run, 1).of("started") if e["rank"] == 1)
        os.kill(int(process.rsplit("-", 1)[1]), signal.SIGKILL)
        wait_for(lambda: lives(run)[1].of("requeued"), 60, "the requeue after a rank's death")
        assert lives(run)[1].silent == [1] and lives(run)[1].of("step ended")

        wait_for_life(run, 2)
        high = lab.call("sbatch", "--parsable", "-p", "high", "-N4", "-c4", "-o", "/dev/null", "--wrap", "sleep 3600")
        wait_for(lambda: lives(run)[2].of("requeued"), 90, "the requeue at the preemption")
        lab.call("scancel", high.stdout.strip())
        stopped = lives(run)[2].of("stopped")[0]
        assert stopped["signal"] == "SIGTERM"

        assert wait_for_life(run, 3).first_step == stopped["step"], "warned of the preemption, it lost no step"
        assert lab.call("scancel", job).returncode == 0
        wait_for(lambda: not lab.call("squeue", "-h").stdout.strip(), 60, "an empty queue")
    assert not lives(run)[3].of("requeued")
    check_history(run)
    status = command("launch/status.py", run)
    assert "in 4 lives" in status.stdout and "steps that count" in status.stdout, status.stdout


def test_wall_time_ends_a_life_and_not_the_run(lab, reference, tmp_path):
    run = tmp_path / "run"
    assert train(lab, reference, run, cluster_file(tmp_path, minutes=2, signal_lead_s=60)).returncode == 0
    with watched(lab, run):
        wait_for(lambda: lives(run) and lives(run)[0].of("requeued"), 150, "the requeue ahead of the end")
        stopped = lives(run)[0].of("stopped")[0]
        assert stopped["signal"] in ("SIGUSR2", "walltime")
        assert wait_for_life(run, 1).first_step == stopped["step"]
    check_history(run)


def test_bad_node_is_named_and_left_out(lab, reference, tmp_path):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "node1").write_text("no folder")
    cluster = cluster_file(tmp_path, scratch=f"{scratch}/$SLURMD_NODENAME")
    lab.call("scontrol", "update", "nodename=node[3-4]", "state=drain", "reason=test")  # so that it begins on node1
    assert train(lab, reference, run, cluster, "--steps", "5").returncode == 0
    wait_for(lambda: lives(run) and lives(run)[0].of("requeued"), 120, "the requeue")
    lab.call("scontrol", "update", "nodename=node[3-4]", "state=resume")
    done = train(lab, reference, run, cluster, "--steps", "5", "--wait", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = lives(run)
    assert "node node1 failed its preflight" in first.of("failed")[0]["why"] and first.of("requeued")[0]["exclude"] == ["node1"]
    verdict = json.loads((run / "preflight" / first.name / "node1.json").read_text())
    assert not verdict["ok"] and "scratch" in verdict["problems"][0]
    assert "node1" not in {e["node"] for e in second.of("started")} and second.of("completed")
    assert first.job == second.job and "paid" in done.stdout


def test_lives_without_progress_are_counted_and_end(lab, reference, tmp_path):
    run = tmp_path / "run"
    assert train(lab, reference, run, "test", "--restarts-without-progress", "1").returncode == 0
    wait_for(lambda: lives(run) and 1 in lives(run)[0].ranks, 90, "a start")
    process = next(e["process"] for e in lives(run)[0].of("started") if e["rank"] == 1)
    os.kill(int(process.rsplit("-", 1)[1]), signal.SIGKILL)
    wait_for(lambda: not lab.call("squeue", "-h").stdout.strip(), 90, "the end of the job")
    (refused,) = lives(run)[0].of("not requeued")
    assert "1 lives of job" in refused["why"] and "made no progress" in refused["why"]
    assert "made no progress" in command("launch/status.py", run).stdout


def test_drill_passes_here(lab, reference, tmp_path):
    more = ["--drill", "--data", reference, "--out", tmp_path / "drill", "--cluster", "test", "--nodes", "2", "--steps", "300"]
    done = command("launch/train.py", *more, SLURM_CONF=str(lab.conf), PATH=lab.env["PATH"], timeout=600)
    assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("PASS") >= 9 and "one job: " in done.stdout, done.stdout
    assert not lab.call("squeue", "-h").stdout.strip()

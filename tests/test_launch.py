"""Stopping, the watchdog, the preflight and the rendezvous, with real processes and no Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from helpers import REPO, command, kill_all, local_pids, wait_for

from launch.preflight import BadNode, Report, check_node, judge, keep_caches_local, scratch_folder
from launch.rendezvous import meet
from launch.slurm import own_end
from stablerep.runtime.events import read_events
from stablerep.runtime.stop import MARGIN_S, StopFlag

ENV = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def test_wall_time_stops_ahead_by_what_a_save_was_measured_to_take():
    stop = StopFlag()
    assert stop.requested is None
    stop.end, stop.first_lead_s = time.time() + 100, 60.0
    assert stop.requested is None
    stop.save_s = 40.0
    assert stop.lead_s == 3 * 40.0 + MARGIN_S and stop.requested == "walltime"
    stop.save_s = 1.0
    assert stop.requested is None
    stop._remember(signal.SIGUSR2, None)
    stop._remember(signal.SIGTERM, None)
    assert stop.requested == "SIGUSR2"


def test_end_of_the_job_is_what_slurm_says_or_unknown(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert own_end() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert own_end() == 1.7e9


HANG = """
import sys, time
from pathlib import Path
from stablerep.runtime.events import Events
from stablerep.runtime.watchdog import Watchdog, last_words
run = Path(sys.argv[1])
dog = Watchdog(last_words(run, "7-0", 3), Events(run, "train-3", life="7-0", rank=3), 1.0, first_s=1.0)
for _ in range(20):
    dog.beat()
    time.sleep(0.1)
def the_line_that_hangs():
    time.sleep(600)
the_line_that_hangs()
"""


def test_watchdog_ends_a_process_that_hangs_and_keeps_its_stack(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], env=ENV, timeout=60)
    assert done.returncode == 70
    words = (tmp_path / "last_words/7-0/3.txt").read_text()
    assert "no step within 1 s" in words and "the_line_that_hangs" in words
    (event,) = read_events(tmp_path)
    assert event["event"] == "hung" and event["rank"] == 3


MEET = """
import os, sys
from pathlib import Path
from launch.preflight import BadNode, Report, agree
from launch.rendezvous import meet
run, life, rank, bound, problem = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]
store = meet(run, life, rank, 2, one_node=True, bound_s=60)
try:
    agree(store, run, life, Report(f"n{rank}", rank, None, problem), ["n0", "n1"], 2, bound_s=bound)
except BadNode as error:
    print(error, flush=True)
    os._exit(1)
"""


def ranks_meet(run, life, ranks=(0, 1), bound=60.0, problem=None):
    """Start ranks that meet; {rank: process}. `problem` is {rank: text}."""
    return {
        r: subprocess.Popen(
            [sys.executable, "-c", MEET, str(run), life, str(r), str(bound), *filter(None, [(problem or {}).get(r)])],
            env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for r in ranks
    }  # fmt: skip


def outcomes(processes):
    try:
        return {r: (p.communicate(timeout=240)[0], p.returncode) for r, p in processes.items()}
    finally:
        for process in processes.values():
            process.kill()


def test_ten_jobs_on_one_node_meet_their_own_ranks(tmp_path):
    """All at once, in three run folders; a thread stands for a rank."""

    def rank_of(job, rank):
        life = f"{job}-0"
        store = meet(tmp_path / str(job % 3), life, rank, 2, one_node=True, bound_s=60)
        store.set(f"life/{rank}", life)
        store.wait(["life/0", "life/1"], timedelta(seconds=60))
        return store, store.get(f"life/{1 - rank}").decode()  # the store must outlive the peer's look

    jobs = [(job, rank) for job in range(10) for rank in (0, 1)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        met = list(pool.map(lambda one: rank_of(*one), jobs))
    assert [life for _, life in met] == [f"{job}-0" for job, _ in jobs]


def test_a_bad_node_and_an_absent_one_are_named_on_every_rank(tmp_path):
    started = time.monotonic()
    said = outcomes(ranks_meet(tmp_path, "1-0", problem={1: "scratch /nope: Read-only file system"}, bound=600.0))
    assert all(code == 1 and "node n1 failed its preflight (rank 1: scratch /nope" in text for text, code in said.values())
    assert time.monotonic() - started < 200, "nobody waits for the bound"
    verdicts = {p.stem: json.loads(p.read_text())["ok"] for p in (tmp_path / "preflight/1-0").iterdir()}
    assert verdicts == {"n0": True, "n1": False}
    ((text, code),) = outcomes(ranks_meet(tmp_path, "2-0", ranks=[0], bound=1.0)).values()
    assert code == 1 and "node n1 failed its preflight (rank 1: did not come)" in text


def test_preflight_finds_what_is_wrong_with_a_node(tmp_path, monkeypatch):
    sound = check_node(tmp_path / "run", tmp_path / "scratch", "n1", 0, 0, gpus=0)
    assert sound.problems == [] and not list((tmp_path / "scratch").iterdir())
    (tmp_path / "file").write_text("in place of a folder")
    bad = check_node(tmp_path / "file", tmp_path / "file", "n1", 0, 0, gpus=0)
    assert [p.split(" ")[0] for p in bad.problems] == ["run", "scratch"]
    monkeypatch.setattr("torch.Tensor.__matmul__", lambda a, b: a.matmul(b) + (a.shape[1] > 1 and a.is_floating_point()))
    wrong = check_node(tmp_path / "run", tmp_path / "scratch", "n1", 0, 0, gpus=0)
    assert wrong.problems == ["matrix product: wrong result"]


def test_one_gpu_for_two_ranks_is_a_bad_node(tmp_path):
    reports = [Report("a", 0, "GPU-1"), Report("a", 1, "GPU-1"), Report("b", 2, "GPU-1")]
    assert judge(tmp_path, "1-0", reports) == ["node a failed its preflight (GPU GPU-1 was given to several ranks)"]
    assert issubclass(BadNode, Exception)


def test_scratch_is_the_node_s_own_and_holds_the_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node9")
    assert scratch_folder(f"{tmp_path}/$SLURMD_NODENAME") == tmp_path / "node9"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    keep_caches_local(tmp_path)
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR").startswith(str(tmp_path))


def begin_local_training(data, run, *more):
    """Two ranks on this machine, at work; the pids of both."""
    words = [
        "launch/train.py", "--config", str(REPO / "configs/train/demo.yaml"), "--data", data, "--out", run, "--cluster",
        "local", "--nodes", "2", "--global-batch", "16", "--steps", "100000", "--log-every", "1", "--wait", "false",
        "--head-hidden", "32", "--head-out", "16", *more,
    ]  # fmt: skip
    done = command(*words)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: any(e["event"] == "first step" for e in read_events(run)), 180, "a step")
    started = {e["rank"]: e["process"] for e in read_events(run) if e["event"] == "started"}
    return [int(started[rank].rsplit("-", 1)[1]) for rank in (0, 1)]


def test_killed_local_rank_takes_its_peer_along(reference, tmp_path):
    run = tmp_path / "run"
    try:
        os.kill(begin_local_training(reference, run)[1], signal.SIGKILL)
        wait_for(lambda: not local_pids(run), 90, "the other rank to end by itself")
    finally:
        kill_all(run)
    status = command("launch/status.py", run)
    assert status.returncode == 3 and "rank 1 ended without a word (killed?); rank 0: " in status.stdout, status.stdout
    assert "killed without a word" in status.stdout and "Error" in next((run / "last_words").rglob("0.txt")).read_text()


def test_local_rank_that_hangs_ends_the_job_and_says_where_it_waited(reference, tmp_path):
    run = tmp_path / "run"
    try:
        silent = begin_local_training(reference, run, "--hang-timeout-s", "20")[1]
        os.kill(silent, signal.SIGSTOP)
        wait_for(lambda: any(e["event"] == "hung" for e in read_events(run)), 120, "the watchdog of rank 0")
        os.kill(silent, signal.SIGCONT)
        wait_for(lambda: not local_pids(run), 90, "the rank that was stopped to end by itself")
    finally:
        kill_all(run)
    assert "no step within 20 s" in command("launch/status.py", run).stdout
    assert "train.py" in next((run / "last_words").rglob("0.txt")).read_text()

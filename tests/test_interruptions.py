"""Generation interrupted: kills, signals, full disks, failing shards, leases."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import pytest
from helpers import REPO, command, kill_all, local_pids, shard_bytes, wait_for
from workers import alive, committed, complete, generate, generate_line, holders, plan

from generation.lease import Leases
from generation.plan import check_folder, load_plan, make_plan
from generation.settings import GenerateConfig
from generation.worker import work
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import WorkError
from stablerep.runtime.events import Events, read_events
from stablerep.runtime.stop import StopFlag

KILLS = int(os.environ.get("KILLS", "12"))  # `make soak` sets more
BLOWS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP]


def test_random_kills_lose_nothing(tmp_path, nursery):
    """Three workers of which one after the other is killed, told to end, or frozen and woken, at random moments."""
    run, alone, chance = tmp_path / "run", tmp_path / "alone", random.Random(0)
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"a red circle, number {k}\n" for k in range(4 * KILLS)))
    small = {"captions_per_shard": 1, "batch_size": 2, "steps": 6}
    plan(alone, captions, **small)
    complete(alone, nursery.start(alone, 2))
    plan(run, captions, lease_timeout_s=2, **small)
    begun, workers, frozen, hit, at_work = time.monotonic(), nursery.start(run, 3), [], Counter(), 0
    while hit.total() < KILLS and not (run / "dataset.json").exists():
        before = committed(run)
        wait_for(lambda n=before, pids=tuple(workers): committed(run) > n or not any(map(alive, pids)), 240, "a shard")
        time.sleep(chance.uniform(0, 0.4))  # the moment of the kill, not a wait for something
        victim, how = chance.choice(workers), chance.choice(BLOWS)
        at_work += f"worker-{victim}" in holders(run).values()
        if not alive(victim):
            break
        hit[how.name] += 1
        os.kill(victim, how)
        workers.remove(victim)
        if how == signal.SIGSTOP:
            frozen.append(victim)
        if frozen and (len(frozen) > 2 or chance.random() < 0.5):  # whoever wakes works on, beside the one in its place
            workers.append(frozen.pop(0))
            os.kill(workers[-1], signal.SIGCONT)
        workers += nursery.start(run, max(0, 3 - len(workers)))
    assert hit.total() >= KILLS * 2 // 3 and at_work >= KILLS // 3, "killed that often, at work"
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    complete(run, [*workers, *frozen])
    assert shard_bytes(run) == shard_bytes(alone)
    audit = command("generation/audit.py", run, "--remake", "5")
    assert audit.returncode == 0 and "all sound (complete)" in audit.stdout, audit.stdout
    made = Counter(e["shard"] for e in read_events(run) if e["event"] == "committed")
    again = made.total() - len(made)
    print(f"{dict(hit)}, {at_work} of them at work; {len(made)} shards, {again} made twice, {time.monotonic() - begun:.0f} s")
    assert again <= hit.total(), "no shard is made more often than that explains"


def test_term_releases_the_lease(tmp_path, nursery):
    run = tmp_path / "run"
    plan(run, REPO / "assets" / "captions.txt", limit=60, steps=50)
    (pid,) = nursery.start(run, 1)
    wait_for(lambda: list((run / "leases").glob("*.lease")), 120, "a claim")
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid), 120, "a clean stop")
    assert not list((run / "leases").iterdir()) and not (run / "dataset.json").exists()
    assert [(e["outcome"], e["signal"]) for e in read_events(run) if e["event"] == "ended"] == [("stopped", "SIGTERM")]
    assert command("launch/status.py", run).returncode == 3


def test_ctrl_c_detaches_a_closed_terminal_stops_and_the_same_command_resumes(tmp_path):
    run = tmp_path / "run"  # too long to end within this test
    line = generate_line(REPO / "assets" / "captions.txt", run, "--steps", "50", "--nodes", "2")
    terminal = subprocess.Popen(
        [sys.executable, *map(str, line)], cwd=REPO, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in a terminal; pytest's workers ignore it
    )  # fmt: skip
    try:
        wait_for(lambda: committed(run), 240, "a shard")
        os.killpg(terminal.pid, signal.SIGINT)
        said, _ = terminal.communicate(timeout=120)
        assert terminal.returncode == 3 and f"detached; the work goes on. See: python launch/status.py {run}" in said
        assert "Traceback" not in said
        before = committed(run)
        wait_for(lambda: committed(run) > before, 120, "work after Ctrl-C")
        os.killpg(terminal.pid, signal.SIGHUP)
        wait_for(lambda: not local_pids(run), 120, "a clean stop")
        assert not list((run / "leases").iterdir()) and not (run / "dataset.json").exists()
        ends = [(e["outcome"], e["signal"]) for e in read_events(run) if e["event"] == "ended"]
        assert ends == [("stopped", "SIGHUP")] * 2
        stopped = shard_bytes(run)
        assert command(*line, "--wait", "false").returncode == 0
        wait_for(lambda: committed(run) > len(stopped), 240, "work after the same command")
    finally:
        kill_all(run)
    ended = shard_bytes(run)
    assert all(ended[name] == stopped[name] for name in stopped)


def test_an_interrupted_plan_is_made_again(captions, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for name in ("os.replace", "generation.plan.write_atomic", "generation.plan.write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(name, Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                plan(run, captions)
        assert not (run / "plan.json").exists() and not list(run.glob(".captions*"))
        check_folder(run)
    plan(run, captions)
    assert load_plan(run).captions == 12


def test_shard_that_fails_thrice_is_set_aside(captions, tmp_path, reference, monkeypatch):
    import generation.pipeline

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
    again = generate(captions, run)
    assert again.returncode == 3 and "1 shards are set aside" in again.stderr and "--retry-failed" in again.stderr
    assert generate(captions, run, "--retry-failed").returncode == 0
    assert shard_bytes(run) == shard_bytes(reference)


def test_full_disk_is_one_line_and_keeps_everything(captions, tmp_path, reference, monkeypatch):
    run = tmp_path / "run"
    plan(run, captions)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 5:  # the second shard's tar
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr("generation.triage.IO_WAITS_S", (0.01, 0.01))
        with pytest.raises(WorkError, match=r"cannot read or write .*No space left"):
            work(run, device="cpu", stop=StopFlag(), name="test")
    assert committed(run) == 1 and not (run / "failures").exists()
    assert not list((run / "leases").iterdir()) and not list(run.rglob("*.tmp"))
    assert work(run, device="cpu", stop=StopFlag(), name="test") == "done"
    assert shard_bytes(run) == shard_bytes(reference)


def test_model_that_does_not_load_is_one_line_and_no_fault_of_the_shards(captions, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(REPO / "assets" / "tiny", model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    done = generate(captions, run, "--model", str(model))
    assert done.returncode == 3 and "Traceback" not in done.stderr and not (run / "failures").exists()
    assert "cannot load" in done.stderr and "the same command resumes" in done.stderr
    assert "cannot load" in next(iter(run.glob("logs/*_log.out"))).read_text()


def test_stale_lease_is_taken_over_and_a_fresh_one_is_not(tmp_path):
    mine, other = Leases(tmp_path, "mine", 20.0), Leases(tmp_path, "other", 20.0)
    try:
        assert mine.claim(1) == "claimed" and other.claim(1) is None
        old = time.time() - 100
        (tmp_path / "000002.lease").write_text(json.dumps({"name": "dead"}))
        os.utime(tmp_path / "000002.lease", (old, old))
        assert other.claim(2) == "taken over"
    finally:
        mine.close()
        other.close()
    assert not list(tmp_path.iterdir())


def test_a_holder_that_slept_leaves_the_lease_of_its_successor_alone(tmp_path, monkeypatch):
    mine, other = Leases(tmp_path, "mine", 20.0), Leases(tmp_path, "other", 20.0)
    try:
        assert mine.claim(1) == mine.claim(2) == "claimed"
        old = time.time() - 100
        os.utime(tmp_path / "000001.lease", (old, old))
        assert other.claim(1) == "taken over"
        now = time.monotonic() + 100  # as after a suspended process wakes up
        monkeypatch.setattr("generation.lease.time.monotonic", lambda: now)
        mine.release(1)
        mine.release(2)
        assert [p.name for p in tmp_path.glob("*.lease")] == ["000001.lease"]
    finally:
        mine.close()
        other.close()


def test_all_leases_that_are_held_stay_fresh(tmp_path):
    mine, other = Leases(tmp_path, "mine", 0.5), Leases(tmp_path, "other", 0.5)
    try:
        assert mine.claim(1) == mine.claim(2) == mine.claim("survey") == "claimed"
        mine.release(2)
        first = {work: mine.path(work).stat().st_mtime for work in (1, "survey")}
        wait_for(lambda: all(mine.path(work).stat().st_mtime > first[work] + 1 for work in first), 60, "heartbeats")
        assert other.claim(1) is None and other.claim("survey") is None and other.claim(2) == "claimed"
    finally:
        mine.close()
        other.close()
    assert not list(tmp_path.iterdir())


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


def test_events_go_on_after_an_error_and_lines_that_are_torn_are_skipped(tmp_path, monkeypatch):
    events = Events(tmp_path, "w")
    events.write("first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
        with pytest.raises(OSError, match="Stale"):
            events.write("second")
    with open(events.path, "ab") as file:
        file.write(b'{"event": "torn \xe2\n[1, {"event\n')
    events.write("third", loss=float("nan"))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))  # what a full disk does
        with pytest.raises(OSError, match="No space"):
            events.write("lost")
    events.write("fourth")
    assert [e["event"] for e in read_events(tmp_path)] == ["first", "second", "third", "fourth"]

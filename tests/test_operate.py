"""Operating a generation run: stop, retry, status, remake, with real workers on this machine."""

import json
import os
import shutil
import time
from unittest.mock import Mock

import numpy as np
import pytest
import simplejpeg
from helpers import REPO, SMALL, shard_bytes, wait_for
from PIL import Image
from workers import alive, committed, complete, plan

from generation import failures, remake
from generation.plan import Plan
from generation.settings import GenerateConfig
from generation.worker import STOP, work
from launch import generate, status
from launch.cluster import ClusterConfig, Shape, render_scripts
from launch.generation_status import WatchedProgress, Worker, _union, _within, generation_progress, read_status
from launch.job import GenerateTask
from stablerep.data.shards import DatasetIndex, captions_of, read_sidecar
from stablerep.runtime.config import to_yaml
from stablerep.runtime.errors import UsageError, WorkError
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import append_jsonl, read_jsonl, write_json
from stablerep.runtime.stop import StopFlag


def launch(captions, run, *more):
    """generate.py in this process, on this machine, without waiting."""
    words = ["--captions", captions, "--out", run, "--cluster", "local", "--wait", "false", *SMALL, *more]
    return generate.main([*map(str, words)])


@pytest.fixture
def submitted(monkeypatch):
    """What would be submitted: nothing is."""
    submit = Mock(return_value=["1"])
    monkeypatch.setattr("launch.cluster.submit", submit)
    return submit


def test_stop_ends_workers_between_batches_and_the_next_launch_goes_on(tmp_path, nursery, submitted):
    run, captions = tmp_path / "run", REPO / "assets" / "captions.txt"
    plan(run, captions, limit=12, captions_per_shard=6, steps=70)
    pids = nursery.start(run, 2)
    wait_for(lambda: len(list((run / "leases").glob("0*.lease"))) == 2, 120, "two claims")
    assert generate.main(["--out", str(run), "--stop"]) == 0
    wait_for(lambda: not any(map(alive, pids)), 120, "a clean end")
    assert [(e["outcome"], e["signal"]) for e in read_events(run) if e["event"] == "ended"] == [("halted", None)] * 2
    assert any(e["event"] == "released" for e in read_events(run)) and committed(run) < 2
    assert not list((run / "leases").iterdir())
    assert work(run, device="cpu", stop=StopFlag(), name="late") == "halted", "a job that comes back ends at once"
    before = shard_bytes(run)
    assert launch(captions, run, "--limit", "12", "--captions-per-shard", "6", "--steps", "70", "--nodes", "2") == 0
    assert not (run / STOP).exists() and len(submitted.call_args.args[3]) == 2
    complete(run, nursery.start(run, 2))
    after = shard_bytes(run)
    assert all(after[name] == before[name] for name in before)
    assert generate.main(["--out", str(run), "--stop"]) == 0 and not (run / STOP).exists(), "nothing is left to stop"


def test_stop_wants_a_run_and_a_launch_waits_for_the_end(captions, tmp_path, monkeypatch, submitted):
    with pytest.raises(UsageError, match="not a generation run"):
        generate.main(["--out", str(tmp_path), "--stop"])
    run = tmp_path / "run"
    plan(run, captions)
    assert generate.main(["--out", str(run), "--stop"]) == 0
    monkeypatch.setattr("launch.cluster.still_active", lambda *_: ["1"])
    with pytest.raises(WorkError, match="told to stop and 1 jobs are ending"):
        launch(captions, run)
    assert (run / STOP).exists() and not submitted.called
    assert launch(captions, run, "--dry-run") == 0 and (run / STOP).exists(), "a dry run changes nothing"


def test_a_stopped_worker_is_not_requeued_and_a_signalled_one_is(captions, tmp_path, monkeypatch):
    run, requeue = tmp_path / "run", Mock()
    plan(run, captions)
    monkeypatch.setattr("submitit.JobEnvironment", lambda: Mock(local_rank=0))
    monkeypatch.setattr("launch.job.requeue_self", requeue)
    monkeypatch.setattr("launch.job.StopFlag", lambda: Mock(install=lambda: Mock(requested="SIGUSR2")))
    assert GenerateTask(str(run), 0)() == "stopped" and requeue.called
    requeue.reset_mock()
    (run / STOP).touch()
    assert GenerateTask(str(run), 0)() == "halted" and not requeue.called, "the person's word is the last"


def give_up(run, shard, why="RuntimeError: no luck"):
    for node in ("n1", "n2", "n4"):
        failures.record(run, shard, fault="shard", node=node, why=why, worker="w", trace="")


def test_only_retry_failed_tries_again_what_was_set_aside(captions, tmp_path, submitted, capsys):
    run = tmp_path / "run"
    plan(run, captions)
    assert launch(captions, run, "--retry-failed") == 0 and not submitted.called
    assert "no shard was set aside" in capsys.readouterr().out
    give_up(run, 1)
    assert list(failures.set_aside(run, 3)) == [1] and not failures.set_aside(run, 4)
    assert launch(captions, run) == 0 and submitted.called, "the others are left"
    assert list(failures.set_aside(run, 3)) == [1], "a launch forgets nothing"
    for k in (0, 2, 3):
        give_up(run, k)
    submitted.reset_mock()
    assert launch(captions, run) == 3 and not submitted.called
    assert "--retry-failed" in capsys.readouterr().err
    assert launch(captions, run, "--retry-failed") == 0 and submitted.called and not failures.set_aside(run, 3)
    assert len(list(read_jsonl(run / "failures" / "000001.before"))) == 3, "the record stays"


def test_a_cap_is_shared_by_the_arrays_of_a_launch(tmp_path):
    cluster = ClusterConfig(max_array_size=5, gpus_per_node=0)

    def lines(jobs, **more):
        scripts = render_scripts(cluster, tmp_path, Shape("generate", **more), jobs)
        return [line.split("=")[1] for script in scripts for line in script.splitlines() if "--array" in line]

    assert lines(12, at_most=7) == ["0-4%3", "0-4%2", "0-1%2"]
    assert lines(5, at_most=2) == ["0-4%2"]
    with pytest.raises(UsageError, match="--max-running 2 is less than the 3 arrays"):
        lines(12, at_most=2)


def test_on_this_machine_the_cap_is_the_number_of_workers(captions, tmp_path, submitted):
    assert launch(captions, tmp_path / "run", "--nodes", "4", "--max-running", "2") == 0
    assert len(submitted.call_args.args[3]) == 2
    with pytest.raises(UsageError, match="--max-running must be at least 1"):
        launch(captions, tmp_path / "run", "--max-running", "0")


def made_up_run(run, now):
    """Ten shards of six images: a fast worker, a slow one, a third that was killed, one that ended; shard 7 given up."""
    write_json(run / "plan.json", vars(Plan(30, 60, 10, 2, 3, "", "", {}, 0.0, "")))
    (run / "config.yaml").write_text(to_yaml(GenerateConfig(out=str(run), lease_timeout_s=120)))
    (run / "shards").mkdir()
    (run / "leases").mkdir()

    def add(name, at, event, **fields):
        append_jsonl(run / "events" / f"{name}.jsonl", {"time": now + at, "event": event, "process": name, **fields})

    def commit(name, at, shard, seconds):
        add(name, at, "committed", shard=shard, images=6, seconds=seconds)
        (run / "shards" / f"{shard:06d}.json").touch()

    add("fast", -1000, "started", node="n1")
    for shard, at in enumerate((-900, -250, -150, -50)):
        commit("fast", at, shard, 40.0)
    add("other", -200, "started", node="n2")
    commit("other", -100, 4, 50.0)
    add("slow", -400, "started", node="n3")
    commit("slow", -60, 5, 240.0)
    commit("slow", -40, 0, 20.0)  # made twice: harmless, and no good put
    add("gone", -1000, "started", node="n4")
    add("gone", -900, "taken over", shard=8)
    add("done", -500, "started", node="n5")
    add("done", -400, "ended", outcome="stopped")
    add("done", -400, "requeued", job="1")
    give_up(run, 7, "ValueError: a bad caption")
    for name, held in (("fast", "000006"), ("slow", "000009"), ("slow", "survey")):
        (run / "leases" / f"{held}.lease").write_text(json.dumps({"name": name}))
    (run / "leases" / "000008.lease").write_text(json.dumps({"name": "gone"}))
    os.utime(run / "leases" / "000008.lease", (now - 880, now - 880))


def test_status_counts_shards_rates_and_goodput(tmp_path, monkeypatch):
    """Against numbers worked out by hand from `made_up_run`."""
    now = time.time()
    (run := tmp_path / "run").mkdir()
    made_up_run(run, now)
    monkeypatch.setattr("launch.generation_status.time.time", lambda: now)
    state = read_status(run)
    assert (state.shards, state.committed, state.leased, state.left, list(state.aside)) == (10, 6, 2, 1, [7])
    assert {w.name: w.state for w in state.workers} == {
        "fast": "alive", "other": "alive", "slow": "alive", "gone": "silent", "done": "stopped"}  # fmt: skip
    assert {w.name: w.shard for w in state.alive} == {"fast": 6, "other": None, "slow": 9}
    assert [w.name for w in state.stragglers] == ["slow"], "12 images in 260 s against 0.15 and 0.12 images/s"
    assert state.rate == pytest.approx(5 * 6 / 300)
    assert state.mean_rate == pytest.approx(6 * 6 / 1000)
    assert state.eta_s == pytest.approx((60 - 36 - 6) / state.rate), "what was set aside is not waited for"
    assert state.goodput == pytest.approx((4 * 40 + 50 + 240) / (1000 + 200 + 400 + 120 + 100), rel=1e-3)
    assert state.counts == {"requeued": 1, "failed": 0, "taken over": 1}
    assert [w.node for w in state.alive] == ["n1", "n2", "n3"]


def test_time_in_which_somebody_lived_counts_once():
    spans = _union([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (6.0, 6.5)])
    assert spans == [(0.0, 3.0), (5.0, 7.0)]
    assert _within(spans, 2.0, 6.0) == 2.0 and Worker("w").rate is None


def test_status_says_it_in_words_and_as_json(tmp_path, capsys):
    (run := tmp_path / "run").mkdir()
    made_up_run(run, time.time())
    assert status.main([str(run)]) == 3
    said = capsys.readouterr().out
    for words in ("60.0 %, 36/60 images", "6/10 shards committed, 2 leased, 1 left, 1 set aside", "ETA", "goodput",
                  "straggler slow on n3", "shard 000007 failed 3 times: ValueError: a bad caption", "1 silent"):  # fmt: skip
        assert words in said, said
    assert "told to stop" not in said and generate.main(["--out", str(run), "--stop"]) == 0
    assert status.main([str(run)]) == 3 and "told to stop" in capsys.readouterr().out
    assert status.main([str(run), "--json"]) == 3
    plain = json.loads(capsys.readouterr().out)
    assert plain["committed"] == 6 and plain["stragglers"] == ["slow"] and plain["workers"][0]["node"] == "n1"
    assert plain["aside"] == [{"shard": 7, "attempts": 3, "nodes": ["n1", "n2", "n4"], "why": "ValueError: a bad caption"}]
    with pytest.raises(UsageError, match="not both"):
        status.main([str(run), "--json", "--watch"])


def test_a_watcher_lists_seldom_and_sees_the_end_at_once(tmp_path, monkeypatch):
    (run := tmp_path / "run").mkdir()
    made_up_run(run, time.time())
    clock, listings = [100.0], Mock(side_effect=lambda _: clock.__setitem__(0, clock[0] + 2.0))  # each takes two seconds
    monkeypatch.setattr("launch.generation_status.generation_progress", lambda run: listings(run) or generation_progress(run))
    monkeypatch.setattr("launch.generation_status.time.monotonic", lambda: clock[0])
    look = WatchedProgress(run)
    assert look().done == look().done == 36 and listings.call_count == 1
    (run / "shards" / "000006.json").touch()
    clock[0] += 90
    assert look().done == 36
    clock[0] += 10
    assert look().done == 42 and listings.call_count == 2, "a fiftieth of the time"
    (run / "dataset.json").touch()
    assert look().complete and look().done == 60


def test_the_contact_sheet_shows_the_latest_images(reference, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    monkeypatch.setattr(status, "read_status", read := Mock(wraps=read_status))
    assert status.main([str(run), "--pictures"]) == 0 and read.call_count == 1
    assert str(run / "contact.png") in capsys.readouterr().err
    with Image.open(run / "contact.png") as sheet:
        assert sheet.size == (2 * 132 + 4, 12 * 148 + 4), "twelve captions of two images"
        newest = read_status(run).newest[0]
        _, _, images = next(captions_of(read_sidecar(run / "shards", newest)))
        tar = (run / "shards" / f"{newest:06d}.tar").read_bytes()
        first = simplejpeg.decode_jpeg(tar[images[0][0] : sum(images[0])])
        shown = sheet.crop((4, 4 + 16, 132, 132 + 16)).resize(first.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(np.asarray(shown).astype(int) - first).mean() < 12


def test_remake_says_whether_an_image_is_the_stored_one(reference, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "dataset.json").unlink()  # a run need not be complete
    index = DatasetIndex(reference)
    id = index.ids[5]
    assert remake.main([str(run), id, "1"]) == 0
    assert f"{id}.1: equal, {len(index.read(5, 1))} bytes" in capsys.readouterr().out
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert remake.main([str(run), id, "1"]) == 1
    assert f"{id}.1: different; pixels differ by" in capsys.readouterr().out
    (run / "shards" / "000001.json").unlink()
    for words, why in (([str(run), "0" * 16, "1"], "no caption"), ([str(run), id, "2"], "2 images a caption"),
                       ([str(run), id], "RUN ID J"), ([str(run), id, "0"], "missing or torn")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            remake.main(words)

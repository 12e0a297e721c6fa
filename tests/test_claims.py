"""Which shard next: many claimants make each shard once and seldom list the folder; what was left behind is found."""

import errno
import os
import random
import signal
import time
from collections import defaultdict
from unittest.mock import Mock

import pytest
from claimants import claims_of, make, planned, start
from helpers import wait_for
from workers import alive, committed

from generation import claims as module
from generation import failures
from generation.plan import write_dataset
from generation.settings import GenerateConfig
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import read_json


def events_of(run, kind):
    return [e for e in read_events(run) if e["event"] == kind]


def makers(run):
    """The claimants that began to make each shard."""
    found = defaultdict(list)
    for event in events_of(run, "making"):
        found[event["shard"]].append(event["process"])
    return found


@pytest.fixture
def run(tmp_path):
    (folder := tmp_path / "run").mkdir()
    return folder


@pytest.fixture
def claimants(run):
    """Starts claimants on 2,000 shards, and kills what is left of them."""
    pids = []

    def more(count, timeout_s=60.0):
        pids.extend(found := start(run, 2000, count, timeout_s))
        return found

    yield more
    kill(pids)


def kill(pids):
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)), 60, "claimants to die")


def end(run, pids):
    wait_for(lambda: not any(map(alive, pids)), 120, "claimants to end")
    assert (run / "dataset.json").exists(), (run / "claimants.log").read_text()


def test_many_claimants_make_each_shard_once_with_few_looks_and_listings(run, claimants):
    pids = claimants(24)
    wait_for(lambda: committed(run) > 500, 60, "a quarter of the shards")
    late = claimants(1)
    end(run, pids + late)
    assert sorted(makers(run)) == list(range(2000)) and {len(m) for m in makers(run).values()} == {1}
    ended = events_of(run, "ended")
    assert [e["outcome"] for e in ended] == ["done"] * 25
    assert sum(e["looks"] for e in ended) < 3 * 2000, "each of 25 claimants looking at each shard would be 25 times"
    assert len(events_of(run, "surveyed")) <= 16 and len(events_of(run, "completed")) == 1
    assert not list((run / "leases").iterdir()) and len(read_json(run / "dataset.json")["shardlist"]) == 2000


def test_kills_at_random_moments_lose_nothing_and_only_the_dead_leave_work_to_do_twice(run, claimants):
    chance, killed, pids = random.Random(0), set(), claimants(6, timeout_s=4.0)
    for wave in range(4):
        wait_for(lambda n=400 * wave: committed(run) > n, 60, "some shards")
        time.sleep(chance.uniform(0, 0.1))  # the moment of the kill, not a wait for something
        dead = chance.sample(pids, 3) if wave < 3 else pids[1:]  # in the end all but one
        kill(dead)
        killed.update(f"claimant-{pid}" for pid in dead)
        pids = [pid for pid in pids if pid not in dead] + (claimants(3, timeout_s=4.0) if wave < 3 else [])
    end(run, pids)
    again = {shard: names for shard, names in makers(run).items() if len(names) > 1}
    assert sorted(makers(run)) == list(range(2000)) and len(again) <= len(killed)
    assert all(sum(name not in killed for name in names) <= 1 for names in again.values())


def claim_all(claims):
    """Make shards until there is none to be had; which."""
    made = []
    while (shard := claims.next()) is not None:
        make(claims, shard)
        made.append(shard)
    return made


def test_what_is_given_back_torn_or_failed_is_found_behind_a_walker(run):
    first, second = claims_of(run, 20, "first"), claims_of(run, 20, "second")
    held, torn, failed = first.next(), second.next(), second.next()
    make(second, torn)
    second.leases.release(failed)
    second.put_back(failed)
    made = claim_all(second)
    assert failed in made and sorted([*made, torn, held]) == list(range(20)) and second.outcome is None
    (run / "shards" / f"{torn:06d}.json").write_text('{"size": 5')
    first.leases.release(held)
    assert claim_all(second) == [held, torn] and second.outcome == "done" and (run / "dataset.json").exists()
    assert claim_all(first) == [] and first.outcome == "done"
    first.leases.close()
    second.leases.close()
    assert not list((run / "leases").iterdir())


def test_a_node_that_gave_a_shard_up_ends_and_another_makes_it(run):
    first, second = claims_of(run, 6, "first"), claims_of(run, 6, "second", node="n2")
    for _ in range(3):
        failures.record(run, 4, node="n1", why="")
    assert sorted(claim_all(first)) == [0, 1, 2, 3, 5] and first.outcome == "incomplete"
    assert claim_all(second) == [4] and second.outcome == "done"
    assert (claims_of(run, 6, "late")).next() is None


def test_an_old_list_is_where_a_worker_begins_and_not_what_it_believes(run):
    claim_all(claims_of(run, 6, "first"))
    (run / "dataset.json").unlink()  # as the audit forgets a shard
    (run / "shards" / "000002.json").unlink()
    assert (run / module.LEFT).read_text() == ""
    late = claims_of(run, 6, "late")
    assert claim_all(late) == [2] and late.outcome == "done" and late.leases.looks == 3, "a survey, the shard, a survey"
    (run / "dataset.json").unlink()
    (run / "shards" / "000003.json").unlink()
    (run / module.LEFT).write_text("3\n5\n")
    assert claim_all(claims_of(run, 6, "later")) == [3]


def test_a_survey_that_dies_or_fails_is_made_again(run, monkeypatch):
    first, second = claims_of(run, 3, "first"), claims_of(run, 3, "second")
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            claim_all(first)
    assert committed(run) == 3 and first.outcome is None and not (run / "leases" / "survey.lease").exists()
    (run / "dataset.json").unlink()
    assert second.leases.claim(module.SURVEY) == "claimed"
    assert first.next() is None and first.outcome is None, "another is at it"
    old = time.time() - 100
    os.utime(run / "leases" / "survey.lease", (old, old))  # it died
    assert first.next() is None and first.outcome == "done" and (run / "dataset.json").exists()


def test_a_full_disk_at_a_takeover_keeps_no_lease(run, monkeypatch):
    claims, old = claims_of(run, 1, "first"), time.time() - 100
    (run / "leases" / "000000.lease").write_text("{}")
    os.utime(run / "leases" / "000000.lease", (old, old))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            claims.next()
    assert not (run / "leases" / "000000.lease").exists() and claim_all(claims) == [0]


def test_a_disk_that_does_not_answer_is_no_torn_shard(run, monkeypatch):
    claims = claims_of(run, 3, "first")
    claim_all(claims)
    (run / "dataset.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("stablerep.data.shards.read_json", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            claims_of(run, 3, "second").next()
    assert committed(run) == 3
    (run / "shards" / "000001.tar").write_bytes(b"short")
    assert write_dataset(run, planned(3), GenerateConfig(out=str(run))) == [1] and not (run / "dataset.json").exists()

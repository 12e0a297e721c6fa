"""Generation in a hostile world: a full disk, frozen holders, two workers on one shard, torn files, clocks that differ."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from helpers import REPO, command, shard_bytes, wait_for
from workers import committed, complete, holders, plan

from generation import audit, remake
from generation.audit import check_shard
from generation.plan import load_plan
from launch.generation_status import describe_generation, read_status
from stablerep.data.shards import read_sidecar
from stablerep.runtime.errors import UsageError
from stablerep.runtime.events import read_events
from stablerep.runtime.rundir import append_jsonl, read_jsonl


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    if os.getuid():
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk, pages):
    """Take all space of a file system but so many pages."""
    page = os.statvfs(disk).f_bsize
    with open(disk / "ballast", "ab", buffering=0) as ballast:
        while os.statvfs(disk).f_bavail > pages:
            ballast.write(bytes(page))


def of(run, kind):
    return [e for e in read_events(run) if e["event"] == kind]


def test_full_disk_in_mid_shard_is_waited_out(captions, reference, small_disk, nursery):
    run = small_disk / "run"
    plan(run, captions)
    (pid,) = nursery.start(run, 1)
    wait_for(lambda: committed(run), 120, "a shard")
    fill(small_disk, 3)  # room for leases and events, not for a tar
    wait_for(lambda: of(run, "waiting"), 120, "an error")
    assert "No space left" in of(run, "waiting")[0]["why"] and not (run / "dataset.json").exists()
    assert len(shard_bytes(run)) == committed(run) < 4 and not list(run.rglob("*.tmp")), "no half of a shard is left"
    (small_disk / "ballast").unlink()
    complete(run, [pid])
    assert shard_bytes(run) == shard_bytes(reference) and not (run / "failures").exists()
    assert {e["process"] for e in of(run, "committed")} == {f"worker-{pid}"} and len(of(run, "committed")) == 4


def test_a_line_torn_by_a_full_disk_takes_no_other_with_it(small_disk):
    path, written = small_disk / "x.jsonl", []
    append_jsonl(path, {"n": -1})
    fill(small_disk, 0)
    for n in range(10_000):
        try:
            append_jsonl(path, {"n": n})
        except OSError:
            break
        written.append(n)
    (small_disk / "ballast").unlink()
    append_jsonl(path, {"n": 10_000})
    assert 0 < len(written) < 9_999, "the disk was full"
    assert [r["n"] for r in read_jsonl(path)] == [-1, *written, 10_000]


def freeze(run, pid):
    """SIGSTOP a worker while it makes a shard; the shards that it holds and that are not there."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "T", 60, "the freeze")
        held = [k for k, name in holders(run).items() if name == f"worker-{pid}" and read_sidecar(run / "shards", k) is None]
        if held:
            return held
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)


@pytest.mark.parametrize("woken", ["while another makes its shard", "when all is done"])
def test_frozen_holder_that_wakes_loses_and_doubles_nothing(captions, reference, tmp_path, nursery, woken):
    run = tmp_path / "run"
    plan(run, captions, lease_timeout_s=2)
    (frozen,) = nursery.start(run, 1)
    wait_for(lambda: of(run, "loaded"), 120, "a worker at work")
    held = freeze(run, frozen)
    (other,) = nursery.start(run, 1)
    if woken == "when all is done":
        complete(run, [other])
    else:  # two workers make one shard at the same time
        wait_for(lambda: any(holders(run).get(k) == f"worker-{other}" for k in held), 120, "the takeover")
    os.kill(frozen, signal.SIGCONT)
    complete(run, [frozen, other])
    assert shard_bytes(run) == shard_bytes(reference)
    assert {e["process"]: e["outcome"] for e in of(run, "ended")} == {f"worker-{p}": "done" for p in (frozen, other)}
    made = Counter(e["shard"] for e in of(run, "committed"))
    assert set(made) == set(range(4)) and {k for k, n in made.items() if n > 1} <= set(held) and max(made.values()) <= 2
    assert {e["shard"] for e in of(run, "committed") if e["process"] == f"worker-{other}"} & set(held)
    assert not list((run / "leases").iterdir())
    assert command("generation/audit.py", run).returncode == 0


WRITER = """
import sys
sys.path.insert(0, {repo!r})
from pathlib import Path
from stablerep.data.shards import Sample, write_shard
samples = [Sample(f"{{k:016x}}", "a caption", [bytes([k]) * 5000] * 2, {{}}) for k in range(8)]
for n in range(150):
    write_shard(Path({folder!r}), 0, samples, {{"made_by": sys.argv[1] * n}})
"""


def test_two_writers_of_one_shard_never_show_a_torn_one(tmp_path):
    code = WRITER.format(repo=str(REPO), folder=str(tmp_path))
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    wait_for(lambda: (tmp_path / "000000.json").exists(), 60, "a shard")
    makers = set()
    while any(w.poll() is None for w in writers):
        sidecar = read_sidecar(tmp_path, 0)
        assert sidecar is not None and sha256((tmp_path / "000000.tar").read_bytes()).hexdigest() == sidecar["sha256"]
        makers.add(sidecar["made_by"])
    assert [w.returncode for w in writers] == [0, 0] and len(makers) > 10 and set("".join(makers)) == {"a", "b"}
    assert len(list(tmp_path.iterdir())) == 2


def test_torn_shards_are_made_again_and_the_audit_finds_changed_ones(captions, reference, tmp_path, nursery):
    run, chance = tmp_path / "run", random.Random(0)
    shutil.copytree(reference, run)
    (run / "dataset.json").unlink()  # a crash before the end
    for name in ("000000.json", "000001.tar"):
        os.truncate(run / "shards" / name, chance.randrange((run / "shards" / name).stat().st_size))
    change_a_byte(run / "shards" / "000002.tar", chance)
    complete(run, nursery.start(run, 1))
    whole, now = shard_bytes(reference), shard_bytes(run)
    assert {name for name in whole if whole[name] != now[name]} == {"000002.tar"}, "its size is right: only a hash tells"
    found = command("generation/audit.py", run, "--repair")
    assert found.returncode == 1 and found.stdout.count("SHA-256") == 1 and "000002" in found.stdout, found.stdout
    complete(run, nursery.start(run, 1))
    assert shard_bytes(run) == whole and command("generation/audit.py", run).returncode == 0


def change_a_byte(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def test_remaking_an_image_whose_stored_bytes_are_no_jpeg_is_one_line(reference, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    name, offset, size = read_sidecar(run / "shards", 0)["members"][0]
    tar = bytearray((run / "shards" / "000000.tar").read_bytes())
    tar[offset : offset + size] = bytes(size)
    (run / "shards" / "000000.tar").write_bytes(tar)
    assert remake.main([str(run), name.split(".")[0], "0"]) == 1
    assert "different; the stored one does not decode" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--device nowhere is not there"):
        audit.main([str(run), "--remake", "1", "--device", "nowhere"])


def test_output_that_nobody_reads_any_more_is_no_error(reference):
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, str(REPO / "launch" / "status.py"), str(reference)]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


def test_no_cut_and_no_changed_bit_gets_past_the_audit(reference, tmp_path):
    planned, chance, run = load_plan(reference), random.Random(1), tmp_path / "run"
    shutil.copytree(reference, run)
    tar, sidecar = run / "shards" / "000001.tar", run / "shards" / "000001.json"
    good = {path: path.read_bytes() for path in (tar, sidecar)}
    content = ("samples", "images", "size", "sha256", "members")
    truth = json.loads(good[sidecar])
    for path in [tar, sidecar] * 40:
        os.truncate(path, chance.randrange(len(good[path])))
        assert check_shard(run, planned, 1) is not None
        path.write_bytes(good[path])
        change_a_byte(path, chance)
        seen = read_sidecar(run / "shards", 1)
        harmless = path == sidecar and seen is not None and all(seen.get(key) == truth[key] for key in content)
        assert harmless or check_shard(run, planned, 1) is not None
        path.write_bytes(good[path])
    assert check_shard(run, planned, 1) is None


def test_clocks_an_hour_apart_steal_nothing_and_status_stays_sane(tmp_path, nursery):
    run = tmp_path / "run"
    plan(run, REPO / "assets" / "captions.txt", limit=48, lease_timeout_s=4)
    begun = time.time()
    pids = {ahead: nursery.start(run, 1, ahead)[0] for ahead in (3600.0, 0.0, -3600.0)}
    for ahead in (3600.0, -3600.0):  # dies with a shard in its hands; whoever is left finds it
        wait_for(lambda a=ahead: any(e["process"] == f"worker-{pids[a]}" for e in of(run, "committed")), 120, "a shard")
        freeze(run, pids[ahead])
        sane(run, time.time() - begun)
        nursery.kill([pids[ahead]])
        pids[ahead] = nursery.start(run, 1, ahead)[0]
    complete(run, list(pids.values()))
    assert Counter(e["shard"] for e in of(run, "committed")) == dict.fromkeys(range(16), 1), "no lease was stolen"
    sane(run, time.time() - begun)
    assert command("generation/audit.py", run, "--remake", "2").returncode == 0


def sane(run, elapsed):
    """What status says is possible after so many seconds."""
    state = read_status(run)
    assert state.paid_s <= 5 * elapsed and 0 < state.goodput <= 1.1 and state.rate > 0 and state.mean_rate > 0
    assert state.images / elapsed * 0.9 <= state.mean_rate and (state.complete or state.eta_s > 0)
    assert all(0 <= w.seen - w.started <= elapsed + 5 for w in state.workers)
    assert "-" not in describe_generation(run, state)[2].split("ETA")[-1]

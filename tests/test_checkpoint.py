"""Checkpoints: killed in every phase, a full disk, other rank counts, other models, milestones."""

import itertools
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from ranks import Life, losses, prepare, run_to_end

from stablerep.checkpoint import complete_steps, step_folder
from stablerep.runtime.events import read_events


def events(run, kind):
    return [e for e in read_events(run) if e["event"] == kind]


@pytest.fixture(scope="module")
def unbroken(reference, tmp_path_factory):
    run = tmp_path_factory.mktemp("checkpoint") / "unbroken"
    prepare(reference, run, 2, steps=9)
    run_to_end(run, 2)
    return run


class Bomb:
    """Patch of a rank: SIGKILL before the k-th file operation of the checkpoint of step 8."""

    def __init__(self, rank, kill):
        self.rank, self.kill = rank, kill

    def __call__(self, run, rank):
        if rank != self.rank:
            return
        count, first = 0, step_folder(Path(run), 4) / "state.json"

        def armed(real):
            def call(*args, **kwargs):
                nonlocal count
                place = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
                if "checkpoints" in place and first.exists():
                    count += 1
                    if count == self.kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "rename"):
            setattr(os, name, armed(getattr(os, name)))


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_in_every_phase_of_a_save(reference, unbroken, tmp_path, rank):
    whole, kill, newest = losses(unbroken), 0, set()
    while True:
        kill += 1
        run = tmp_path / str(kill)
        shutil.copytree(unbroken / "index", run / "index")
        for name in ("config.yaml", "train.json"):
            shutil.copy(unbroken / name, run / name)
        life = Life(run, 2, Bomb(rank, kill))
        codes = life.wait()
        newest.add(complete_steps(run)[-1])
        if codes == [0, 0]:  # more operations than there are
            break
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] in (1, -signal.SIGABRT)
        run_to_end(run, 2)
        assert losses(run) == whole
        assert not list((run / "checkpoints").glob(".step-*")), "half-written ones are cleaned"
        assert (run / "final/encoder.safetensors").read_bytes() == (unbroken / "final/encoder.safetensors").read_bytes()
        shutil.rmtree(run)
    assert newest == {4, 8, 9} and kill > (9 if rank == 0 else 5)


def full_disk(run, rank):
    """Patch: files may not grow beyond 1 MB (the system's own limit) until a save has failed."""
    from stablerep.runtime.events import Events

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = Events.write

    def write(self, kind, **fields):
        if kind == "saved" and fields["step"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        if kind == "save failed":
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        real(self, kind, **fields)

    Events.write = write


def test_full_disk_does_not_stop_the_training_and_deletes_nothing(reference, tmp_path):
    run = tmp_path / "run"
    prepare(reference, run, 2, steps=13)
    run_to_end(run, 2, full_disk)
    (failed,) = events(run, "save failed")
    assert failed["step"] == 8 and "too large" in failed["why"]
    assert [e["step"] for e in events(run, "saved")] == [4, 12, 13]
    assert complete_steps(run) == [12, 13] and len(losses(run)) == 13


def test_two_are_kept_and_milestones(reference, tmp_path):
    run = tmp_path / "run"
    prepare(reference, run, 1, steps=14, checkpoint_every=2, keep_every=6)
    run_to_end(run, 1)
    assert complete_steps(run) == [6, 12, 14]
    state = json.loads((step_folder(run, 14) / "state.json").read_text())
    assert state["step"] == state["applied"] == 14 and state["parts"] == 1


def test_checkpoint_of_another_model_is_refused_in_one_line(reference, unbroken, tmp_path):
    run = tmp_path / "run"
    prepare(reference, run, 1, steps=9, head_out=8)
    shutil.copytree(unbroken / "checkpoints", run / "checkpoints")
    assert Life(run, 1).wait() == [1]
    last = (run / "log-0.txt").read_text().strip().splitlines()[-1]
    assert "was saved by another model" in last and "use another --out" in last
    assert complete_steps(run) == complete_steps(unbroken)


def test_parts_are_plain_safetensors_that_hold_every_element_once(unbroken):
    from safetensors.torch import load_file

    folder = step_folder(unbroken, 9)
    seen: dict[str, list[tuple[int, int]]] = {}
    for path in sorted(folder.glob("part-*-of-00002.safetensors")):
        for key, value in load_file(path).items():
            name, start = key.split("@")
            seen.setdefault(name, []).append((int(start), value.numel()))
    final = load_file(unbroken / "final/encoder.safetensors")
    assert len(seen) == 3 * len({n.split("/")[1] for n in seen})
    for name, weight in final.items():
        pieces = sorted(seen[f"param/encoder.{name}"])
        assert sum(n for _, n in pieces) == weight.numel() and pieces[0][0] == 0
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(pieces))

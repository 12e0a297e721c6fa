"""Faults of generation told apart, with real workers and injected faults; which node gives which shard up; shards' quality."""

import errno
import shutil
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import simplejpeg
import torch
from helpers import shard_bytes, wait_for
from workers import committed, complete, plan

from generation import failures, quality, triage
from generation.audit import check_run, check_shard
from generation.plan import load_plan
from generation.triage import Kind, WorkerEnds, kind_of
from generation.worker import work
from launch import slurm, status
from launch.generation_status import read_status
from launch.job import GenerateTask
from launch.requeue import requeue_elsewhere
from stablerep.data.shards import Sample, captions_of, encode_shard, read_sidecar, write_shard
from stablerep.runtime.errors import WorkError
from stablerep.runtime.events import Events, read_events
from stablerep.runtime.stop import StopFlag

ECC = RuntimeError("CUDA error: uncorrectable ECC error encountered")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "oom"),
        (torch.AcceleratorError("CUDA error: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "oom"),
        (MemoryError(), "oom"),
        (ECC, "gpu"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "gpu"),
        (RuntimeError("No CUDA GPUs are available"), "gpu"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "gpu"),
        (OSError(errno.EIO, "Input/output error"), "io"),
        (OSError(errno.ESTALE, "Stale file handle"), "io"),
        (OSError(errno.ENOSPC, "No space left on device"), "io"),
        (OSError("Corrupt snappy compressed data"), "shard"),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), "shard"),
        (ValueError("CUDA error: a caption that says so"), "shard"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_errors_are_told_apart(error, kind):
    assert kind_of(error) == kind


@pytest.fixture
def fault(monkeypatch):
    """Inject: `fault(f)` calls f(n, captions) before the n-th shard (from 0) is made; what it raises, the pipeline raises."""
    import generation.pipeline

    real, calls = generation.pipeline.generate_captions, []

    def inject(raises):
        def patched(model, captions, stopped):
            calls.append(captions)
            raises(len(calls) - 1, captions)
            return real(model, captions, stopped=stopped)

        monkeypatch.setattr(generation.pipeline, "generate_captions", patched)
        return calls

    return inject


def events_of(run, *kinds):
    return [e for e in read_events(run) if e["event"] in kinds]


def test_out_of_memory_ends_the_worker_and_names_a_batch_size(captions, tmp_path, fault, reference):
    run = tmp_path / "run"
    plan(run, captions)

    def once(call, _):
        if call == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    fault(once)
    with pytest.raises(WorkError, match=r"out of memory on cpu of n1 .*2\.00 GiB.*--batch-size 2,"):
        work(run, device="cpu", stop=StopFlag(), name="a", node="n1")
    assert committed(run) == 1 and not (run / "failures").exists() and not list((run / "leases").iterdir())
    (failed,) = events_of(run, "failed")
    assert (failed["fault"], failed["node"]) == ("oom", "n1")
    assert work(run, device="cpu", stop=StopFlag(), name="b", node="n2") == "done", "elsewhere it may fit"
    assert shard_bytes(run) == shard_bytes(reference)
    assert "a smaller --resolution" in triage.smaller_batch(1)


def test_io_errors_are_waited_out_and_bounded(captions, tmp_path, fault, reference, monkeypatch):
    run = tmp_path / "run"
    plan(run, captions)
    monkeypatch.setattr(triage, "IO_WAITS_S", (0.01, 0.02))

    def twice_then_works(call, _):
        if call in (1, 2):
            raise OSError(errno.EIO, "Input/output error")

    fault(twice_then_works)
    assert work(run, device="cpu", stop=StopFlag(), name="a", node="n1") == "done"
    assert shard_bytes(run) == shard_bytes(reference) and not (run / "failures").exists()
    assert [(e["fault"], e["node"], e["seconds"]) for e in events_of(run, "waiting")] == [
        ("io", "n1", 0.01),
        ("io", "n1", 0.02),
    ]
    assert read_status(run).faults == {"io": {"n1": 2}}

    shutil.rmtree(run)
    plan(run, captions)
    handle = OSError(errno.ESTALE, "Stale file handle")
    calls = fault(Mock(side_effect=handle))
    del calls[:]
    with pytest.raises(WorkerEnds, match="from n1: Stale file handle; mend it") as caught:
        work(run, device="cpu", stop=StopFlag(), name="a", node="n1")
    assert caught.value.kind is Kind.IO and len(calls) == 3, "two waits, then the end"
    assert triage.wait_s(OSError(errno.EACCES, "Permission denied"), 0) is None, "waiting gives no permission"


def test_a_stop_signal_ends_a_wait(captions, tmp_path, fault, monkeypatch):
    run, stop = tmp_path / "run", StopFlag()
    plan(run, captions)
    monkeypatch.setattr(triage, "IO_WAITS_S", (3600.0,))

    def told(call, _):
        stop.signal = "SIGTERM"
        raise OSError(errno.EIO, "Input/output error")

    fault(told)
    assert work(run, device="cpu", stop=stop, name="a", node="n1") == "stopped"


def test_a_broken_gpu_ends_the_worker_and_a_shard_is_set_aside_after_three_nodes(captions, tmp_path, fault, reference, capsys):
    run = tmp_path / "run"
    plan(run, captions)

    def hit(_, chunk):
        if any("astronaut" in text for _, text in chunk):
            raise ECC

    fault(hit)
    for node in ("n1", "n2", "n3"):
        with pytest.raises(WorkerEnds, match=f"cpu of {node} does not work any more .*ECC") as caught:
            work(run, device="cpu", stop=StopFlag(), name=f"w-{node}", node=node)
        assert caught.value.kind is Kind.GPU and not list((run / "leases").iterdir())
    assert work(run, device="cpu", stop=StopFlag(), name="w-n4", node="n4") == "incomplete", "n4 does not touch it"
    ((shard, records),) = failures.set_aside(run, 3).items()
    assert [(r["fault"], r["node"]) for r in records] == [("gpu", "n1"), ("gpu", "n2"), ("gpu", "n3")]
    assert committed(run) == 3
    assert status.main([str(run)]) == 3
    said = capsys.readouterr().out
    assert (
        f"shard {shard:06d} failed 3 times: RuntimeError: CUDA error: uncorrectable ECC" in said and "(on n1, n2, n3)" in said
    )
    assert "faults of kind gpu: 3 (1 on n1, 1 on n2, 1 on n3)" in said and "0.0 % black images" in said


def test_one_bad_node_withholds_nothing_from_the_others(captions, tmp_path, fault, reference):
    run = tmp_path / "run"
    plan(run, captions)
    calls = fault(Mock(side_effect=RuntimeError("bad luck")))
    assert work(run, device="cpu", stop=StopFlag(), name="a", node="bad") == "incomplete"
    assert len(calls) == 3 * 4 and len(events_of(run, "given up")) == 4, "three attempts at each of four shards"
    assert list(failures.set_aside(run, 3)) == [0, 1, 2, 3] and not failures.set_aside(run, 3, at_work=["bad", "good"])
    calls = fault(lambda *_: None)
    del calls[:]
    assert work(run, device="cpu", stop=StopFlag(), name="b", node="bad") == "incomplete" and not calls
    assert work(run, device="cpu", stop=StopFlag(), name="c", node="good") == "done"
    assert shard_bytes(run) == shard_bytes(reference) and not failures.set_aside(run, 3)


def test_who_gives_a_shard_up():
    def given_up(nodes, node=None):
        return failures.given_up([{"node": n} for n in nodes], 3, node)

    assert given_up("aaa", "a") and not given_up("aaa", "b") and given_up("aaa")
    assert given_up("abc", "a") and given_up("abc", "d") and given_up("abc")
    assert not given_up("aabb", "a") and not given_up("aabb") and not given_up("", "a")


def test_workers_with_failing_files_end_the_run_with_the_right_bytes(captions, tmp_path, nursery, reference):
    """Real processes: the folder of shards cannot be made for a while."""
    run = tmp_path / "run"
    plan(run, captions)
    (run / "shards").write_text("no folder")
    pids = nursery.start(run, 2)
    wait_for(lambda: len(events_of(run, "waiting")) >= 2, 120, "I/O errors")
    (run / "shards").unlink()
    complete(run, pids)
    assert shard_bytes(run) == shard_bytes(reference) and not (run / "failures").exists()


def test_a_nan_storm_is_recorded(captions, tmp_path, monkeypatch, reference):
    import generation.pipeline

    run, decode = tmp_path / "run", generation.pipeline.TextToImage.decode
    plan(run, captions)

    def storm(self, pipe, latents):
        pixels = decode(self, pipe, latents)
        return pixels if pipe is self._fp32 else pixels * float("nan")

    monkeypatch.setattr(generation.pipeline.TextToImage, "decode", storm)
    assert work(run, device="cpu", stop=StopFlag(), name="a", node="n1") == "done"
    assert {(e["fault"], e["node"], e["why"]) for e in events_of(run, "nan storm")} == {
        ("nan", "n1", "6 of 6 images were not finite in fp32")}  # fmt: skip
    assert read_sidecar(run / "shards", 0)["quality"]["retried"] == 1.0 and shard_bytes(run) == shard_bytes(reference)


@pytest.fixture
def in_slurm(monkeypatch):
    """The calls of Slurm's clients by a running job 7_1 on node n1; nothing is asked of a real one."""
    calls = []

    def client(*words):
        calls.append(words)
        answer = "RUNNING" if "%T" in words else "ExcNodeList=n9 \n" if "show" in words else ""
        return Mock(returncode=0, stdout=answer, stderr="")

    monkeypatch.setattr(slurm, "client", client)
    for name, value in {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("submitit.JobEnvironment", lambda: Mock(local_rank=0))
    return calls


def test_a_job_with_a_broken_gpu_comes_back_without_its_node(captions, tmp_path, fault, in_slurm, monkeypatch, capsys):
    run = tmp_path / "run"
    plan(run, captions)
    fault(Mock(side_effect=ECC))
    monkeypatch.setattr("launch.job.StopFlag", lambda: Mock(install=lambda: Mock(requested=None)))
    with pytest.raises(SystemExit) as end:
        GenerateTask(str(run), 0)()
    assert end.value.code == 1 and "cpu of n1 does not work any more" in capsys.readouterr().err
    assert ("scontrol", "requeue", "7_1") in in_slurm
    assert ("scontrol", "update", "jobid=7_1", "ExcNodeList=n9,n1") in in_slurm
    (requeued,) = events_of(run, "requeued")
    assert (requeued["job"], requeued["exclude"]) == ("7_1", ["n1"])
    events = Events(run, "later")
    for node in ("n2", "n3"):
        requeue_elsewhere(run, events, None, node)
    with pytest.raises(WorkError, match="job 7_1 met a broken GPU on n1, n2, n3, n4: it is not requeued"):
        requeue_elsewhere(run, events, None, "n4")


def test_preemption_and_wall_time_are_told_apart(captions, tmp_path, in_slurm, monkeypatch):
    run = tmp_path / "run"
    plan(run, captions)
    monkeypatch.setattr("launch.job.StopFlag", lambda: Mock(install=lambda: Mock(requested="SIGUSR2")))
    for left in (7200, 100):
        monkeypatch.setattr("launch.job.slurm.own_end", lambda s=left: time.time() + s)
        assert GenerateTask(str(run), 0)() == "stopped"
    assert [(e["fault"], e["node"], e["why"]) for e in events_of(run, "interrupted")] == [
        ("preemption", "n1", "SIGUSR2"), ("walltime", "n1", "SIGUSR2")]  # fmt: skip
    assert triage.interruption(0.0, None) is Kind.PREEMPTION


def jpeg(picture):
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=95, colorspace="RGB", colorsubsampling="420")


def test_quality_against_numbers_worked_out_by_hand():
    """32 x 32 pixels, decoded at half their size: a black image, a grey one, two halves that differ in one of two halves."""
    grey = np.full((32, 32, 3), 128, np.uint8)
    half = grey.copy()
    half[:, :16] = 0
    found = quality.measure([[jpeg(grey * 0), jpeg(grey)], [jpeg(half), jpeg(half)], [jpeg(half), jpeg(grey)]], retried=3)
    assert (found["black"], found["constant"], found["retried"]) == (round(1 / 6, 4), round(2 / 6, 4), 0.5)
    assert found["distance"] == pytest.approx(128 / 255 * (1 + 0 + 0.5**0.5) / 3, rel=0.02)
    assert found["jpeg_bytes"] == pytest.approx(
        np.mean([len(jpeg(p)) for p in (grey * 0, grey, half, half, half, grey)]), abs=1
    )
    assert quality.measure([[jpeg(grey)]], retried=0)["distance"] is None


def test_outliers_are_the_shards_far_from_the_median():
    chance = np.random.default_rng(0)
    shards = {
        k: {"black": 0.0, "constant": 0.0, "retried": 0.0, "distance": d, "jpeg_bytes": 9000 + 300 * d}
        for k, d in enumerate(chance.normal(0.3, 0.01, 200))
    }
    assert quality.outliers(shards) == []
    shards[3]["distance"], shards[7]["black"], shards[9]["jpeg_bytes"] = 0.1, 0.25, 900
    shards[11]["distance"] = 0.6  # more diversity than elsewhere is no fault
    assert [(k, name) for k, name, _, _ in quality.outliers(shards)] == [(3, "distance"), (7, "black"), (9, "jpeg_bytes")]
    assert quality.outliers({k: shards[k] for k in (3, 7, 9)}) == [], "three shards have no median to speak of"
    assert quality.outliers({}) == [] and quality.medians({}) == {}


def test_quality_is_the_same_whoever_made_the_shard(captions, tmp_path, nursery, reference):
    run = tmp_path / "run"
    plan(run, captions)
    complete(run, nursery.start(run, 2))
    state = read_status(run)
    for number in range(4):
        mine, theirs = (read_sidecar(folder / "shards", number)["quality"] for folder in (run, reference))
        assert mine == theirs == state.quality[number] and mine["distance"] > 0
    assert state.to_dict()["quality"]["median"]["jpeg_bytes"] > 0


def test_the_audit_finds_what_hashes_do_not(reference, tmp_path):
    """Shards that are whole and hash as their sidecars say, and hold something else than the plan."""
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    planned, folder = load_plan(run), run / "shards"
    tar = (folder / "000001.tar").read_bytes()
    rows = list(captions_of(read_sidecar(folder, 1)))
    good = [
        Sample(id, _cut(tar, text).decode(), [_cut(tar, image) for image in images], {"id": id}) for id, text, images in rows
    ]

    def found(*samples, **extra):
        write_shard(folder, 1, list(samples), extra)
        return check_shard(run, planned, 1)

    first, rest = good[0], good[1:]
    assert found(*good) is None
    assert f"{first.id}.0.jpg is missing (4 such members)" in found(*rest)
    assert f"{first.id}.2.jpg is not in the plan" in found(replace(first, images=first.images * 2), *rest)
    assert "their order" in found(*rest, first)
    assert "counts 3 captions and 7 images" in found(*good, images=7)
    assert "where the tar's members lie" in found(
        *good, members=[[n, at + 1, size] for n, at, size in encode_shard(good)[1]["members"]]
    )
    assert f"caption {first.id} differs" in found(replace(first, text="another"), *rest)
    assert f"{first.id}.json names another caption" in found(replace(first, meta={"id": "0"}), *rest)
    torn = replace(first, images=[first.images[0], first.images[1][:-200]])
    assert f"{first.id}.1.jpg does not decode" in found(torn, *rest)
    assert "dataset.json has another SHA-256 for shards/000001.tar" in check_run(run, planned)
    assert "of another plan" in check_run(run, replace(planned, images=23))
    (run / "captions.parquet").write_bytes(b"")
    assert "not the one that was planned" in check_run(run, planned)


def _cut(data, place):
    return data[place[0] : sum(place)]

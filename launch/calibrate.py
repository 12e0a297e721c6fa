"""Measure a model's speed on a cluster's device: `generate.py --calibrate`, here or as a job of one node."""

import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from generation.cost import store
from generation.settings import GenerateConfig
from launch import slurm
from launch.cluster import ClusterConfig, Shape, still_active, submit, within
from launch.progress import Every, last_word
from stablerep.runtime.config import from_yaml, to_yaml
from stablerep.runtime.errors import WorkError
from stablerep.runtime.rundir import read_json, write_atomic, write_json

JOB = "calibrate"
MINUTES = 10  # wall time of the job: to load the model, and two to measure
BOUND_S = 120.0
MANY = 10**6  # images a worker makes in the runs that the speed is measured for: it pays to compile
SEEN_S = 35.0  # NFS may remember for 30 s that a file is not there


@dataclass
class CalibrateTask:
    """Measure on one device; `out` holds config.yaml, and then result.json."""

    out: str
    gpus: int

    def __call__(self) -> None:
        """Measure, within two minutes of the model being loaded; ends the process where they are over."""
        start, device = time.perf_counter(), "cuda:0" if self.gpus else "cpu"
        try:
            from generation import tuning
            from generation.calibrate import measure
            from generation.pipeline import TextToImage

            model = TextToImage(from_yaml(GenerateConfig, Path(self.out) / "config.yaml"), device)
            if self.gpus:
                tuning.measure(model, images=MANY)
            load_s = time.perf_counter() - start
            bound = threading.Timer(BOUND_S, _give_up, [model.tuning.batch_size])
            bound.daemon = True
            bound.start()
            result = measure(model, load_s)
            bound.cancel()
        except Exception as error:  # no GPU, too little memory, a broken model: each its own class
            print(f"error: cannot measure on {device}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        write_json(Path(self.out) / "result.json", result)


def calibrate(config: GenerateConfig, cluster: ClusterConfig, calibration: Path) -> str:
    """Measure and add the result to the calibration file; what was found, and what else estimates need. Ctrl-C cancels the job.

    Raises WorkError where the job brings no result, UsageError where Slurm refuses it or the calibration file is another.
    """
    out = Path(tempfile.mkdtemp(prefix="calibrate-", dir="." if cluster.kind == "slurm" else None)).resolve()
    task = CalibrateTask(str(out), cluster.gpus_per_node)
    try:
        write_atomic(out / "config.yaml", to_yaml(replace(config, captions=[], out=str(out))))
        if cluster.kind == "local":
            task()
        else:
            _run_job(cluster, out, task)
        result = read_json(out / "result.json")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    store(calibration, result)
    named = cluster.device or cluster.kind == "local"
    return (
        f"{result['model']} on {result['device']}: {result['images_per_s']:.2f} images/s ({result['batches']} batches of "
        f"{result['batch_size']} in {result['seconds']:.0f} s, {result['attention']}), loaded in {result['load_s']:.0f} s"
        + ("" if named else f"\nfor estimates with this speed, write into the cluster file: device: {result['device']}")
    )


def _run_job(cluster: ClusterConfig, out: Path, task: CalibrateTask) -> None:
    """Submit the job and wait for its result, or until it has gone."""
    job = submit(within(cluster, MINUTES), out, Shape(JOB, gpus_per_node=min(1, task.gpus)), [task], False)[0]
    print(f"job {job} measures; Ctrl-C cancels it", flush=True)
    gone = Every(1.0, lambda: not still_active(out, JOB))
    try:
        while not (out / "result.json").exists() and not gone():
            time.sleep(0.5)
        until = time.monotonic() + SEEN_S
        while not (out / "result.json").exists():
            if time.monotonic() > until:
                why = last_word(sorted((out / "logs").glob("*.out")), "it left no log that this machine sees")
                raise WorkError(f"job {job} ended without a result: {why}")
            time.sleep(0.5)
    except BaseException:
        slurm.client("scancel", job)
        raise
    finally:  # the folder goes when nothing of the job writes there any more
        until = time.monotonic() + SEEN_S
        while not gone() and time.monotonic() < until:
            time.sleep(0.5)


def _give_up(batch_size: int) -> None:
    why = f"a batch of {batch_size} takes longer than {BOUND_S:.0f} s here; measure (and run) a smaller --batch-size"
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(1)

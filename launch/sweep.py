"""A grid over all stages: python launch/sweep.py GRID.yaml --out DIR"""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from generation.cost import CALIBRATION
from stablerep.runtime.config import key, parse, run_command
from stablerep.runtime.errors import UsageError, WorkError

ABOUT = "Generate, train and evaluate over a grid; what exists is not made again. configs/sweep/ has examples."


@dataclass
class SweepCommand:
    """All flags of sweep.py."""

    grid: list[str] = key([], "the YAML of the grid")
    out: str = key("", "folder of the sweep")
    quick: bool = key(False, "merge the YAML's mapping `quick` over the rest")
    cluster: str = key("auto", "auto (Slurm if sbatch is there, else this machine) | local | NAME in configs/cluster | FILE")
    parallel: int | None = key(None, "this machine: stages at once (default: cores / ranks of a stage)")
    calibration: str = key(CALIBRATION, "--dry-run: the file of measured speeds, of generate.py --calibrate")
    dry_run: bool = key(False, "print the tree of stages and an estimate of GPU hours, do nothing")
    wait: bool = key(False, "Slurm: stay to the end and write the table; Ctrl-C detaches (on this machine it always stays)")


def main(argv: list[str]) -> int:
    """Expand, run or submit what is missing, write the table; see the exit codes in the README."""
    command = parse(SweepCommand, argv, prog="sweep.py", about=ABOUT, positional="grid")
    if len(command.grid) != 1 or not command.out:
        raise UsageError("which grid, and where to? python launch/sweep.py GRID.yaml --out DIR")
    if command.parallel is not None and command.parallel < 1:
        raise UsageError("--parallel must be at least 1")
    from launch.cluster import load_cluster
    from launch.grid import expand, load_spec
    from launch.stages import check_done, is_done, works

    path, out = Path(command.grid[0]), Path(command.out).resolve()
    sweep = expand(load_spec(path, command.quick), path.resolve().parent)
    _check(sweep)
    cluster = load_cluster(command.cluster, submitting=not command.dry_run)
    _check_ranks(sweep, cluster)
    absent = missing_inputs(sweep, out)
    if command.dry_run:
        from launch.cost import describe

        tree = describe(sweep, out, cluster, command.calibration)
        print("\n".join([*tree, *(f"not there yet: {what}" for what in absent)]))
        return 0
    if absent:
        raise UsageError("; ".join(absent))
    with _alone(out):
        check_done(sweep, out)
        _remember(sweep, out)
        todo, started = works(sweep, out), time.time()
        resumed = any(is_done(out, stage) for stage in sweep.stages.values())
        if not todo:
            print(f"{out}: complete, nothing to run")
        failed = _run_here(command, out, todo) if cluster.kind == "local" else {}
        if todo and cluster.kind == "slurm":
            from launch.submission import submit_all, wait_for_all

            failed = submit_all(command.cluster, cluster, out, todo)
            if command.wait:
                try:
                    wait_for_all(out, todo)
                except KeyboardInterrupt:
                    print(f"\ndetached; the jobs go on. See: python launch/status.py {out}")
                    return 3
            elif not failed:
                print(f"the same command later makes the table; until then: python launch/status.py {os.path.relpath(out)}")
                return 0
        for name, why in failed.items():
            print(f"error: {name}: {why}", file=sys.stderr)
        _write_table(sweep, out, None if resumed else time.time() - started)
    left = sum(not is_done(out, stage) for stage in sweep.stages.values())
    if left:
        from launch.overview import sweep_lines

        print("\n".join(sweep_lines(out)))
        print(f"error: {left} of {len(sweep.stages)} stages are missing; the same command goes on", file=sys.stderr)
    return 1 if failed else 3 if left else 0


def _run_here(command: SweepCommand, out: Path, todo: list[Any]) -> dict[str, str]:
    """Run on this machine; what failed, by key."""
    from launch.stages import Here

    ranks = max((work.ranks for work in todo), default=1)
    here = Here(out, todo, command.parallel or max(1, (os.cpu_count() or 1) // ranks))
    here.run()
    return here.failed


def _check(sweep: Any) -> None:
    """What the commands would refuse is refused before anything runs. Raises UsageError."""
    from dataclasses import replace

    from generation.settings import check as check_images
    from launch import table
    from launch.evaluate import check as check_scoring
    from stablerep.plan import check as check_training

    table.check(sweep.spec)
    for stage in sweep.stages.values():
        try:
            if stage.kind == "generate":
                check_images(replace(stage.config, out=stage.name))
            elif stage.kind == "train":
                check_training(stage.config)
            elif stage.kind == "evaluate":
                check_scoring(replace(stage.config, checkpoint=stage.needs))
        except UsageError as error:
            raise UsageError(f"{stage.key}: {error}") from None


def _check_ranks(sweep: Any, cluster: Any) -> None:
    """Refuse now, not when its images are made, a batch that does not divide into its job's ranks. Raises UsageError."""
    from stablerep.methods import method_class
    from stablerep.plan import check_ranks

    for stage in sweep.stages.values():
        if stage.kind == "train":
            config = stage.config
            gpus = cluster.gpus_per_node if config.gpus_per_node is None else config.gpus_per_node
            method = method_class(config.method)
            unit = method.rows_per_unit(config.images_per_caption or 1) if method.reads_text else 1
            try:
                check_ranks(config, config.nodes * max(1, gpus), unit)
            except UsageError as error:
                raise UsageError(f"{stage.key}: {error}") from None


def missing_inputs(sweep: Any, out: Path) -> list[str]:
    """What stages that are not done need and do not find: captions, real pictures, labelled data sets; a line each."""
    from generation.caption_files import expand as caption_files
    from launch.stages import is_done
    from stablerep.eval.datasets import check_there

    found: dict[str, None] = {}  # in order, each once
    for stage in sweep.stages.values():
        if is_done(out, stage):
            continue
        try:
            if stage.kind == "generate":
                caption_files(stage.config.captions)
            elif stage.kind == "train":
                found |= {f"no real data {d}": None for d in stage.config.data if d not in stage.needs and not Path(d).exists()}
            elif stage.kind == "evaluate":
                for name in stage.config.dataset:
                    check_there(name, stage.config.data_root)
        except UsageError as error:
            found[str(error)] = None
    return list(found)


def _remember(sweep: Any, out: Path) -> None:
    """OUT/sweep.json: the stages, for status.py, and the grid that they come from."""
    from stablerep.runtime.rundir import write_json

    stages = [{"key": s.key, "needs": s.needs} for s in sweep.stages.values()]
    write_json(out / "sweep.json", {"spec": sweep.spec, "stages": stages})


def rows_of(sweep: Any, out: Path) -> list[dict[str, Any]]:
    """Every number of the sweep: a flat record a cell, evaluation and metric."""
    from stablerep.runtime.rundir import read_jsonl

    names = ("protocol", "dataset", "metric", "value", "low", "high", "n", "values")
    return [
        {"axes": cell.axes, "seed": cell.seed, "setting": record.get("setting", {}),
         **{name: record.get(name) for name in names},
         "train": str(out / cell.train), "images": str(out / cell.images) if cell.images else None}
        for cell in sweep.cells
        for score in cell.evaluate
        for record in read_jsonl(out / score / "results.jsonl")
    ]  # fmt: skip


def _write_table(sweep: Any, out: Path, seconds: float | None) -> None:
    from launch import table

    if rows := rows_of(sweep, out):
        print("\n".join(table.write(rows, sweep.spec, out, seconds)))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No two sweeps work in one folder at once. Raises WorkError."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkError(f"another sweep is at work in {out}") from None
        yield


if __name__ == "__main__":
    run_command(main)

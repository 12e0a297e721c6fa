"""Score encoders on real pictures: python launch/evaluate.py --checkpoint RUN"""

import dataclasses
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.options import PlaceConfig
from stablerep.eval.config import PROTOCOLS, EvaluateConfig
from stablerep.runtime.config import parse, part, run_command
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import append_jsonl, read_jsonl

ABOUT = "Score encoders on real pictures: here, or as a Slurm array of one element a checkpoint and data set."
JOB = "evaluate"


@dataclass
class EvaluateCommand(PlaceConfig, EvaluateConfig):
    """All flags of evaluate.py."""


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Score every checkpoint, and the random yardsticks, on every data set; append each number to results.jsonl and return
    all. A number that is there already is not computed again. Collective. Raises UsageError, WorkError."""
    check(config)
    import torch

    from stablerep.eval.datasets import load
    from stablerep.eval.encoders import open_encoder, random_encoder
    from stablerep.eval.features import Features
    from stablerep.eval.protocols import Subject, numbers

    device = device_of(config.device)
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    encoders = [open_encoder(name) for name in config.checkpoint]
    home = results_folder(config, config.checkpoint[0])
    encoders += [random_encoder(config.checkpoint[0], seed) for seed in range(config.random_encoders)]
    loaded = {(name, e.size): load(name, e.size, config.data_root) for e in encoders for name in config.dataset}
    work, note = [], functools.cache(_say)  # a note is said once
    for encoder in encoders:
        out = results_folder(config, encoder.name) if encoder.folder else home
        features = Features(encoder, Path(config.cache or out / "features"), device, config.workers)
        for name in config.dataset:
            data = loaded[name, encoder.size]
            subject = Subject(encoder, data, features, config, device, out / "probes", _say, note)
            for protocol in config.protocol:
                work.append((subject, protocol, out, list(numbers(protocol, subject))))
    return [r for subject, protocol, out, wanted in work for r in _score(subject, protocol, out, wanted)]


def _score(subject: Any, protocol: str, out: Path, wanted: list[Any]) -> Iterator[dict[str, Any]]:
    """Compute the numbers that are not in results.jsonl yet; yield a record of each, on rank 0."""
    from launch.results import is_same, make_record
    from stablerep.runtime import dist

    encoder, data = subject.encoder, subject.data
    held = list(read_jsonl(out / "results.jsonl"))
    for number in wanted:
        known = dist.broadcast(next((r for r in held if is_same(r, encoder, protocol, data, number)), None))
        if known is not None:
            yield known
            _say(f"{_line(known)} (was there)")
            continue
        for name in number.needs:
            if name in data.splits:
                subject.features.of(data.splits[name])
        if dist.rank() and number.needs:
            continue
        score = number.compute()
        if dist.rank() == 0:
            record = make_record(encoder, protocol, data, dataclasses.replace(score, setting=number.setting))
            append_jsonl(out / "results.jsonl", record)
            if number.scratch is not None:
                shutil.rmtree(number.scratch, ignore_errors=True)
            _say(_line(record))
            yield record


def _line(r: dict[str, Any]) -> str:
    named = "  ".join(f"{k} {v}" for k, v in r["setting"].items() if k in SHOWN)
    value = f"{r['value']:.2f} %  ({r['low']:.2f} to {r['high']:.2f}, n {r['n']})"
    return f"{r['checkpoint']}  {r['dataset']}  {r['protocol']}  {named}{'  ' * bool(named)}{r['metric']} {value}"


SHOWN = ("labels_per_class", "solver", "k", "temperature", "way", "shot", "classifier", "epochs")


def _say(line: str) -> None:
    from stablerep.runtime import dist

    if dist.rank() == 0:
        print(line, flush=True)


def check(config: EvaluateConfig) -> None:
    """Raise UsageError on a value that cannot work."""
    if not config.checkpoint:
        raise UsageError("--checkpoint RUN is missing: a finished training run")
    if unknown := sorted(set(config.protocol) - set(PROTOCOLS)):
        raise UsageError(f"--protocol {' '.join(unknown)} is none of {', '.join(PROTOCOLS)}")
    if config.solver not in ("auto", "sgd", "lbfgs"):
        raise UsageError(f"--solver {config.solver} is none of auto, sgd, lbfgs")
    if any(0 < n < 5 for n in config.labels) or min(config.labels, default=0) < 0:
        raise UsageError("--labels must be 0 (all) or at least 5 a class: a fifth of them chooses the regularisation")
    if config.resamples < 1 or min([1, *config.knn.k]) < 1 or min([1.0, *config.knn.temperature]) <= 0:
        raise UsageError("--resamples, --knn.k and --knn.temperature must be positive")
    if config.sgd.epochs < 1 or config.sgd.batch < 2 or not config.sgd.rates or min(config.sgd.rates) <= 0:
        raise UsageError("--sgd.epochs, --sgd.batch and --sgd.rates must be positive")
    if "fewshot" in config.protocol:
        from stablerep.eval import fewshot

        few = config.fewshot
        for shot in few.shot:
            fewshot.check(few.way, shot, few.queries, few.episodes, few.classifier)


def device_of(name: str) -> str:
    """`auto` is the GPU of this rank where there is one. Raises UsageError."""
    import torch

    there = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not there):
        raise UsageError(f"--device {name} is {'not there' if name == 'cuda' else 'none of auto, cpu, cuda'}")
    return f"cuda:{torch.cuda.current_device()}" if there and name != "cpu" else "cpu"


def results_folder(config: EvaluateConfig, checkpoint: str) -> Path:
    """Where a checkpoint's results go: --out, or the folder that it lies in; a timm name has none. Raises UsageError."""
    place = Path(checkpoint)
    if config.out:
        return Path(config.out)
    if not place.exists():
        raise UsageError(f"--out FOLDER is missing: {checkpoint} is no folder that could hold results.jsonl")
    folder = place.parent if place.is_file() else place
    return folder.parent if folder.name == "final" else folder


def elements(config: EvaluateConfig) -> list[EvaluateConfig]:
    """One config a checkpoint and data set, paths made absolute; the random yardsticks go with the first checkpoint."""

    def absolute(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    config = dataclasses.replace(
        config, data_root=str(Path(config.data_root).resolve()), out=config.out and str(Path(config.out).resolve()),
        cache=config.cache and str(Path(config.cache).resolve()),
    )  # fmt: skip
    return [
        dataclasses.replace(
            config, checkpoint=[absolute(checkpoint)], dataset=[absolute(dataset)],
            random_encoders=0 if i else config.random_encoders,
        )
        for i, checkpoint in enumerate(config.checkpoint) for dataset in config.dataset
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    """Score here, or submit the array and wait if asked."""
    command = parse(EvaluateCommand, argv, prog="evaluate.py", about=ABOUT)
    config = part(EvaluateConfig, command)
    check(config)
    from launch.cluster import Shape, load_cluster, render_scripts, still_active, submit
    from launch.job import EvaluateTask
    from stablerep.eval import datasets, encoders

    cluster = load_cluster(command.cluster, command.gpus_per_node)
    parts = elements(config)
    print(f"plan: {len(config.checkpoint)} checkpoints x {len(config.dataset)} data sets, {' '.join(config.protocol)}")
    gpus = cluster.gpus_per_node
    if cluster.kind == "local" and gpus <= 1:
        if command.dry_run:
            print("dry run: nothing was written")
        else:
            evaluate(config)
        return 0
    for checkpoint in config.checkpoint:
        encoders.check_there(checkpoint)
        results_folder(config, checkpoint)
    for dataset in config.dataset:
        datasets.check_there(dataset, config.data_root)
    run = results_folder(config, config.checkpoint[0]).resolve() / "evaluations"
    shape = Shape(JOB, tasks_per_node=max(1, gpus), gpus_per_node=gpus)
    if command.dry_run:
        for script in render_scripts(cluster, run, shape, len(parts)):
            print(script)
        print(f"dry run: {len(parts)} jobs of one node; nothing was written")
        return 0
    if still_active(run, JOB):
        print("evaluations of this run are already queued or running")
        return 0
    names = [f"{int(time.time())}-{i}" for i in range(len(parts))]
    tasks: list[Callable[[], Any]] = [
        EvaluateTask(str(run), name, element, gpus) for name, element in zip(names, parts, strict=True)
    ]
    ids = submit(cluster, run, shape, tasks, fresh=False)
    print(f"submitted {len(ids)} jobs: {' '.join(ids[:4])}{' ...' if len(ids) > 4 else ''}")
    if not (command.wait if command.wait is not None else cluster.kind == "local"):
        print(f"results go to results.jsonl, logs to {os.path.relpath(run / 'logs')}")
        return 0
    return _wait(run, names)


def _wait(run: Path, names: list[str]) -> int:
    from launch.cluster import watch_jobs
    from launch.progress import Every, Progress, watch
    from stablerep.runtime.events import read_events

    def look() -> Progress:
        done = {e["element"] for e in read_events(run) if e["event"] == "evaluated"} & set(names)
        return Progress(len(done), len(names), len(done) == len(names))

    try:
        complete = watch(look, Every(5.0, lambda: watch_jobs(run, JOB)), "evaluations")
    except KeyboardInterrupt:
        print("\ndetached; the work goes on")
        return 3
    if complete:
        return 0
    failed = [e for e in read_events(run) if e["event"] == "failed" and e.get("element") in names]
    for why in sorted({e["why"] for e in failed}):
        print(why, file=sys.stderr)
    print(f"error: not all was scored and no job is left; {run}/logs says more; the same command goes on", file=sys.stderr)
    return 3


if __name__ == "__main__":
    run_command(main)

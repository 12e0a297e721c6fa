"""Images to an encoder: python launch/train.py --data RUN... --out RUN"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.options import LaunchConfig
from stablerep.runtime.config import from_yaml, parse, part, run_command, to_dict, to_yaml
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import read_json, write_atomic, write_json
from stablerep.train_config import TrainConfig

ABOUT = "Submit training (one process a GPU), resume where RUN exists."
JOB = "train"


@dataclass
class TrainCommand(LaunchConfig, TrainConfig):
    """All flags of train.py."""


def check(config: TrainConfig) -> None:
    """Raise UsageError on a value that cannot work."""
    if not config.out:
        raise UsageError("--out RUN is missing: the folder that the run goes to")
    if not config.data:
        raise UsageError("--data RUN is missing: one or several complete generation runs")
    for name, values in (("dtype", ("bf16", "fp32")), ("zero_stage", (1, 2))):
        if getattr(config, name) not in values:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)} is none of {values}")
    for name in ("global_batch", "checkpoint_every", "log_every", "image_size"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")


def plan(config: TrainConfig) -> int:
    """Check config against data; the number of steps. Raises UsageError."""
    from stablerep.data.order import Order
    from stablerep.methods import method_class

    sizes = []
    for name in config.data:
        path = Path(name) / "dataset.json"
        if not path.exists():
            raise UsageError(f"{name} has no dataset.json: generation is not complete; see launch/status.py {name}")
        sizes.append(read_json(path))
    stored = {d["images_per_caption"] for d in sizes}
    if len(stored) != 1:
        raise UsageError(f"--data runs hold different numbers of images per caption: {sorted(stored)}")
    method_class(config.method)
    from stablerep.train import make_order, total_steps

    order: Order = make_order(config, sum(d["captions"] for d in sizes), stored.pop())
    return total_steps(config, order)


def main(argv: list[str]) -> int:
    """Freeze the config, submit one job, wait if asked."""
    command = parse(TrainCommand, argv, prog="train.py", about=ABOUT)
    config = part(TrainConfig, command)
    check(config)
    from launch.cluster import Shape, load_cluster, render_scripts, still_active, submit
    from launch.job import TrainTask

    cluster = load_cluster(command.cluster, command.gpus_per_node)
    run = Path(config.out).resolve()
    config.data = [str(Path(d).resolve()) for d in config.data]
    gpus = cluster.gpus_per_node
    ranks = command.nodes * max(1, gpus)
    if config.global_batch % ranks:
        raise UsageError(f"--global-batch {config.global_batch} does not divide into {ranks} ranks")
    steps = plan(config)
    if (run / "train.json").exists():
        old, new = to_dict(from_yaml(TrainConfig, run / "config.yaml")), to_dict(config)
        free = {"out", "checkpoint_every", "keep_every", "log_every", "workers"}
        changed = [f"{k} {old[k]} -> {new[k]}" for k in new if k not in free and old[k] != new[k]]
        if changed:
            raise UsageError(f"{run} was trained with other settings ({'; '.join(changed)}): use another --out")
        print(f"{run}: resuming, {steps} steps")
    elif run.exists() and not command.dry_run and any(run.iterdir()):
        raise UsageError(f"{run} exists and is not a training run: choose another --out")
    if (run / "final" / "encoder.safetensors").exists():
        print(f"{run}: complete, nothing to do")
        return 0
    local = cluster.kind == "local"
    shape = Shape(JOB, 1 if local else command.nodes, ranks if local else max(1, gpus), gpus)
    print(f"plan: {steps} steps of {config.global_batch} images on {ranks} ranks")
    if command.dry_run:
        for script in render_scripts(cluster, run, shape, 1):
            print(script)
        print("dry run: nothing was written")
        return 0
    fresh = not run.exists()
    write_atomic(run / "config.yaml", to_yaml(config))
    write_json(run / "train.json", {"steps": steps, "ranks": ranks})
    if still_active(run, JOB):
        print("the job is already queued or running")
    else:
        print(f"submitted job {submit(cluster, run, shape, [TrainTask(str(run), gpus)], fresh)[0]}")
    wait = command.wait if command.wait is not None else local
    if not wait:
        print(f"follow it with: python launch/status.py {os.path.relpath(run)} --watch")
        return 0
    from launch.progress import watch
    from launch.status import training_progress

    try:
        complete = watch(lambda: training_progress(run), lambda: bool(still_active(run, JOB)), "steps")
    except KeyboardInterrupt:
        print(f"\ndetached; the work goes on. See: python launch/status.py {run}")
        return 3
    print(f"{run}: complete" if complete else _why(run), file=sys.stdout if complete else sys.stderr)
    return 0 if complete else 3


def _why(run: Path) -> str:
    from stablerep.runtime.events import read_events

    failed = [e for e in read_events(run) if e["event"] == "failed"]
    reason = f" ({max(failed, key=lambda e: e['time'])['why']})" if failed else ""
    return f"error: {run} is incomplete and no job is left{reason}; {run}/logs says more, the same command resumes"


if __name__ == "__main__":
    run_command(main)

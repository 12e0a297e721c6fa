"""The evaluations of one training run of a sweep, in one process: python launch/scores.py SWEEP TRAINING ENTRY...

SWEEP/evaluate/TRAINING/ENTRY/results.jsonl is complete or absent; what to do is in SWEEP/configs/evaluate.
"""

import os
import shutil
import sys
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.evaluate import evaluate
from stablerep.eval.config import EvaluateConfig
from stablerep.runtime import dist
from stablerep.runtime.config import from_yaml, run_command
from stablerep.runtime.errors import UsageError, WorkError


def score_all(sweep: Path, training: str, entries: list[str]) -> int:
    """Score a training run entry by entry; how many there are. Collective where there are several ranks.

    Raises WorkError with the reasons of those that failed: on one rank these do not keep the others from their turn.
    """
    failed = []
    for entry in entries:
        try:
            score(sweep, training, entry)
        except (UsageError, WorkError, OSError) as error:
            if dist.world() > 1:
                raise
            failed.append(f"{entry}: {error}")
    if failed:
        raise WorkError("; ".join(failed))
    return len(entries)


def score(sweep: Path, training: str, entry: str) -> None:
    """One entry, unless its results are there; what a killed process had scored of it is not computed again."""
    home, run = sweep / "evaluate" / training, sweep / "train" / training
    results, partial = home / entry / "results.jsonl", home / entry / "partial"
    if dist.broadcast(results.exists()):
        return
    if not (run / "final" / "encoder.safetensors").exists():
        raise WorkError(f"{run} is not trained to its end; status.py says why")
    config = from_yaml(EvaluateConfig, sweep / "configs" / "evaluate" / training / f"{entry}.yaml")
    config.checkpoint, config.out, config.cache = [str(run)], str(partial), str(home / "features")
    found = evaluate(config)
    if dist.rank() == 0:
        if not found:
            raise WorkError(f"it asks for no number that {' '.join(config.dataset)} can give")
        os.replace(partial / "results.jsonl", results)
        shutil.rmtree(partial)


def main(argv: list[str]) -> int:
    """0 where all entries are scored. Raises WorkError."""
    if len(argv) < 3 or argv[0].startswith("-"):
        raise UsageError("sweep.py calls this: python launch/scores.py SWEEP TRAINING ENTRY...")
    score_all(Path(argv[0]), argv[1], argv[2:])
    return 0


if __name__ == "__main__":
    run_command(main)

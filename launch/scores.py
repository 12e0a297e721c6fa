"""The evaluations of one training run of a sweep, in one process: python launch/scores.py SWEEP TRAINING ENTRY...

SWEEP/evaluate/TRAINING/ENTRY/results.jsonl is complete or absent; what to do is in SWEEP/configs/evaluate.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: sys.path[0] is this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.evaluate import evaluate
from stablerep.eval.config import EvaluateConfig
from stablerep.runtime.config import from_yaml
from stablerep.runtime.errors import UsageError, WorkError


@dataclass
class ScoreTask:
    """Scores a training run entry by entry; one that fails does not keep the others from theirs."""

    sweep: str
    training: str
    entries: list[str]

    def __call__(self) -> str:
        """`done`, or SystemExit 1 where an entry failed."""
        failed = 0
        for entry in self.entries:
            try:
                self.score(entry)
            except (UsageError, WorkError, OSError) as error:
                print(f"error: {entry}: {error}", file=sys.stderr, flush=True)
                failed += 1
        if failed:
            raise SystemExit(1)
        return "done"

    def score(self, entry: str) -> None:
        """One entry, unless its results are there; what a killed process had scored of it is not computed again."""
        home = Path(self.sweep) / "evaluate" / self.training
        results, partial = home / entry / "results.jsonl", home / entry / "partial"
        if results.exists():
            return
        run = Path(self.sweep) / "train" / self.training
        if not (run / "final" / "encoder.safetensors").exists():
            raise WorkError(f"{run} is not trained to its end; status.py says why")
        config = from_yaml(EvaluateConfig, Path(self.sweep) / "configs" / "evaluate" / self.training / f"{entry}.yaml")
        config.checkpoint, config.out, config.cache = [str(run)], str(partial), str(home / "features")
        evaluate(config)
        os.replace(partial / "results.jsonl", results)
        shutil.rmtree(partial)


if __name__ == "__main__":
    ScoreTask(sys.argv[1], sys.argv[2], sys.argv[3:])()

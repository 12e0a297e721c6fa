"""Evaluation on a real Slurm: an array of one element a checkpoint and data set."""

import torch
from helpers import command

from stablerep import arch
from stablerep.runtime.rundir import read_jsonl


def test_an_array_scores_each_checkpoint_into_its_own_folder(lab, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    description = arch.describe("vit_micro", 32)
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        arch.save_final(folder, description, {"encoder": arch.create(description).state_dict()})
    words = ["launch/evaluate.py", "--checkpoint", *folders, "--dataset", "fashion-probe", "--protocol", "knn", "--labels", "0"]
    words += ["--random-encoders", "1", "--cluster", "test"]
    slurm = {"SLURM_CONF": str(lab.conf), "PATH": lab.env["PATH"]}
    dry = command(*words, "--dry-run", **slurm)
    assert dry.returncode == 0 and "--array=0-1" in dry.stdout and not (folders[0] / "results.jsonl").exists(), dry.stderr
    wrong = command(*words, "--dataset", "cars", "--data-root", tmp_path, **slurm)
    assert wrong.returncode == 2 and "stanford_cars is not there" in wrong.stderr and not (folders[0] / "evaluations").exists()
    done = command(*words, "--wait", **slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = ([r["checkpoint"] for r in read_jsonl(f / "results.jsonl")] for f in folders)
    assert first == [str(folders[0]), "random-0"] and second == [str(folders[1])]
    assert command(*words, "--wait", **slurm).returncode == 0
    assert len(list(read_jsonl(folders[0] / "results.jsonl"))) == 2, "nothing is scored twice"

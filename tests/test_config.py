"""Flags, files and their errors."""

from dataclasses import dataclass

import pytest
from helpers import command

from stablerep.runtime.config import from_yaml, key, merge, parse, to_yaml
from stablerep.runtime.errors import UsageError


@dataclass
class Inner:
    lr: float = key(1e-3, "rate")


@dataclass
class Outer:
    steps: int = key(3, "steps")
    names: list[str] = key([], "names")
    flag: bool = key(False, "flag")
    maybe: int | None = key(None, "maybe")
    inner: Inner = key(Inner, "")


def test_flags_win_over_files_over_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 5\ninner: {lr: 0.5}\n")
    config = parse(Outer, ["--config", str(tmp_path / "a.yaml"), "--steps", "7", "--flag"], prog="x", about="")
    assert (config.steps, config.inner.lr, config.flag) == (7, 0.5, True)
    assert parse(Outer, ["--inner.lr=2e-4", "--names", "a", "b"], prog="x", about="").names == ["a", "b"]


def test_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="--steps"):
        parse(Outer, ["--stps", "3"], prog="x", about="")
    (tmp_path / "a.yaml").write_text("inner: {lrr: 1}\n")
    with pytest.raises(UsageError, match=r"inner\.lr"):
        merge(Outer, [str(tmp_path / "a.yaml")], {})


def test_wrong_type_and_broken_yaml_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="steps"):
        parse(Outer, ["--steps", "many"], prog="x", about="")
    (tmp_path / "a.yaml").write_text("steps: [1\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        merge(Outer, [str(tmp_path / "a.yaml")], {})


def test_frozen_config_reads_back(tmp_path):
    config = Outer(steps=9, names=["ü"], maybe=4)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert from_yaml(Outer, tmp_path / "c.yaml") == config


HEAVY = {"torch", "numpy", "omegaconf", "duckdb", "pyarrow", "submitit", "diffusers", "transformers", "deepspeed", "timm"}


@pytest.mark.parametrize("name", ["generate", "train", "evaluate", "status", "demo"])
def test_help_is_complete_and_imports_nothing_heavy(name):
    shown = command(f"launch/{name}.py", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert shown.returncode == 0 and "--" in shown.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in shown.stderr.splitlines() if "|" in line}
    assert "dataclasses" in imported and not imported & HEAVY

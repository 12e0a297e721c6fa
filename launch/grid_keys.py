"""The keys that a sweep's YAML may have, and what is said of one that is wrong."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from generation.settings import GenerateConfig
from stablerep.eval.config import EvaluateConfig
from stablerep.runtime.config import walk
from stablerep.runtime.errors import UsageError
from stablerep.train_config import TrainConfig

TOP = ("about", "generate", "real", "train", "evaluate", "grid", "when", "exclude", "seeds", "cost", "quick", "plots", "claims")
LISTS = ("evaluate", "grid", "when", "exclude", "seeds", "plots", "claims")  # of mappings, but for `seeds`
COST = ("captions", "train")


@dataclass
class GenerateStage(GenerateConfig):
    """Keys of `generate:`."""

    nodes: int = 1
    gpus_per_node: int | None = None


@dataclass
class TrainStage(TrainConfig):
    """Keys of `train:`."""

    nodes: int = 1
    gpus_per_node: int | None = None


@dataclass
class RealStage:
    """Keys of a data set of `real:` that is made of the bundled pictures (generation/tiny/real.py)."""

    captions: int | None = None
    images_per_caption: int | None = None


CONFIGS: dict[str, type] = {"generate": GenerateStage, "train": TrainStage, "evaluate": EvaluateConfig, "real": RealStage}
OURS = {  # keys that the sweep itself fills in
    "generate": ("out",),
    "train": ("out", "data", "data_weights", "seed"),
    "evaluate": ("checkpoint", "out", "cache", "random_encoders"),
    "real": (),
}


def check_spec(spec: dict[str, Any]) -> set[str]:
    """Raise UsageError on an unknown key anywhere, or a value of the wrong shape; returns the axes that are labels."""
    for place in LISTS:
        value = spec.get(place)
        if value is not None and not isinstance(value, list):
            raise UsageError(f"{place}: must be a list")
        for entry in value or []:
            if place != "seeds" and not isinstance(entry, dict):
                raise UsageError(f"{place}: must be a list of mappings, and {entry!r} is none")
    axes = spec.get("grid") or []
    dotted = ["data", "real", *(f"{stage}.{k}" for stage in ("generate", "train") for k in known_keys(stage))]
    labels = {k for product in axes for k in product if k not in dotted and "." not in k}

    def keys(place: str, tree: Any, valid: list[str]) -> None:
        if not isinstance(tree, dict):
            raise UsageError(f"{place}: must be a mapping")
        check_keys(flat(tree), valid, place)

    for stage in ("generate", "train"):
        keys(stage, spec.get(stage) or {}, known_keys(stage))
    for product in axes:
        keys("grid", product, [*dotted, *labels])
    if not isinstance(sets := spec.get("real") or {}, dict):
        raise UsageError("real: must be a mapping from names to paths")
    for name, value in sets.items():
        if not isinstance(value, str):
            keys(f"real: {name}", value or {}, known_keys("real"))
    for rule in spec.get("when") or []:
        check_keys(rule, ("if", "set"), "when")
        keys("when: if", rule.get("if"), [*dotted, *labels])
        keys("when: set", rule.get("set"), dotted)
    for rule in spec.get("exclude") or []:
        keys("exclude", rule, [*dotted, *labels])
    for entry in spec.get("evaluate") or []:
        keys("evaluate", {k: v for k, v in entry.items() if k != "if"}, known_keys("evaluate"))
        keys("evaluate: if", entry.get("if", {}), [*dotted, *labels])
    if not all(isinstance(seed, int) for seed in spec.get("seeds") or []):
        raise UsageError("seeds: must be whole numbers")
    cost = spec.get("cost") or {}
    keys("cost", dict.fromkeys(cost) if isinstance(cost, dict) else cost, list(COST))
    if not isinstance(cost.get("train") or {}, dict):
        raise UsageError("cost: train: must be a mapping from architectures to crops/s")
    return labels


def known_keys(stage: str) -> list[str]:
    """The keys of a stage that a sweep may set."""
    return ["config"] * (stage in ("generate", "train")) + [name for name, _ in walk(CONFIGS[stage]) if name not in OURS[stage]]


def check_keys(tree: Iterable[str], valid: Sequence[str], place: object) -> None:
    """Raise UsageError on a name that is not valid."""
    for name in tree:
        if name not in valid:
            raise UsageError(unknown(name, place, valid))


def unknown(name: str, place: object, valid: Sequence[str] = ()) -> str:
    """What is said of an unknown key, with the nearest of the valid ones (of all keys of stages where none are given)."""
    every = valid or [f"{stage}.{k}" for stage in ("generate", "train") for k in known_keys(stage)]
    close = difflib.get_close_matches(str(name), every, n=2, cutoff=0.5)
    return f"unknown key '{name}' in {place}" + (f"; did you mean {' or '.join(close)}?" if close else "")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found

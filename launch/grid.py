"""A sweep's YAML becomes cells, and cells become stages; equal stages are one.

configs/sweep/guidance.yaml explains the keys.
"""

import difflib
import functools
import hashlib
import itertools
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generation.plan import FREE as GENERATE_FREE
from generation.settings import GenerateConfig
from stablerep.eval.config import EvaluateConfig
from stablerep.runtime.config import default_of, merge, walk
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import data_folder
from stablerep.train_config import FREE as TRAIN_FREE
from stablerep.train_config import TrainConfig

TOP = ("about", "generate", "real", "train", "evaluate", "grid", "when", "exclude", "seeds", "cost", "quick", "plots", "claims")
Settings = dict[str, Any]  # dotted keys: generate.*, train.*, `data`, `real`, and labels that `when` gives a meaning


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
EVALUATE_FREE = {"checkpoint", "out", "cache", "data_root", "workers"}
PLACE = {"nodes", "gpus_per_node", "device"}  # where it runs: not a part of what it is


@dataclass
class Stage:
    """One run of one command: its folder is OUT/kind/name; `needs` are the keys (kind/name) of stages that come before."""

    kind: str  # real | generate | train | evaluate
    name: str
    config: Any
    needs: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def ranks(self) -> int:
        """Processes that it takes on this machine."""
        return int(getattr(self.config, "nodes", 1))


@dataclass
class Cell:
    """One point of the grid at one seed, and the keys of its stages."""

    axes: dict[str, Any]
    seed: int
    images: str | None  # the generation, or None
    train: str
    evaluate: list[str]


@dataclass
class Sweep:
    """What a YAML expands to; `stages` by key, those that others need first."""

    spec: dict[str, Any]
    stages: dict[str, Stage] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)


def load_spec(path: Path, quick: bool) -> dict[str, Any]:
    """Read a sweep's YAML; `quick` merges its mapping `quick` over the rest. Raises UsageError."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error.__class__.__name__}") from None
    except YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    spec: Any = OmegaConf.to_container(loaded)
    if not isinstance(spec, dict):
        raise UsageError(f"{path} must hold a mapping")
    _check_keys(spec, TOP, path)
    over = spec.pop("quick", None)
    if quick and not over:
        raise UsageError(f"{path} has no variant `quick:`")
    if quick:
        _check_keys(over, TOP, path)
        spec = OmegaConf.to_container(OmegaConf.merge(spec, over))
    return spec


def expand(spec: dict[str, Any], folder: Path) -> Sweep:
    """All cells and stages of a grid whose YAML lies in `folder`. Raises UsageError, one line, on what cannot be."""
    axes = spec.get("grid") or [{}]
    if not isinstance(axes, list) or not all(isinstance(product, dict) for product in axes):
        raise UsageError("grid: must be a list of mappings from keys to lists of values")
    labels = _check(spec, axes)
    base = {f"{stage}.{k}": v for stage in ("generate", "train") for k, v in _flat(spec.get(stage) or {}).items()}
    sweep, seen = Sweep(spec), set()
    for product in axes:
        for values in itertools.product(*(v if isinstance(v, list) else [v] for v in product.values())):
            axis = dict(zip(product, values, strict=True))
            settings = {"data": "synthetic", **base, **axis}
            for rule in spec.get("when") or []:
                if _matches(rule["if"], settings):
                    settings |= {**_flat(rule["set"]), **axis}  # an axis wins over a rule
            if any(_matches(rule, settings) for rule in spec.get("exclude") or []):
                continue
            if settings["data"] == "real":  # what is not generated has no guidance
                axis = {k: v for k, v in axis.items() if not k.startswith("generate.")}
            for seed in spec.get("seeds") or [0]:
                if (cell := json.dumps([axis, seed], sort_keys=True)) not in seen:
                    seen.add(cell)
                    sweep.cells.append(_cell(sweep, axis, settings, seed, folder))
    if not sweep.cells:
        raise UsageError("the grid is empty: everything is excluded")
    unused = labels - {k for rule in spec.get("when") or [] for k in rule["if"]}
    if unused:
        raise UsageError(_unknown(min(unused), "grid"))
    return sweep


def _cell(sweep: Sweep, axis: dict[str, Any], settings: Settings, seed: int, folder: Path) -> Cell:
    """A cell; its stages are added to the sweep where they are new."""
    if settings["data"] not in ("synthetic", "real"):
        raise UsageError(f"data: {settings['data']} is neither synthetic nor real")

    def add(kind: str, name: str, config: Any, needs: list[str]) -> str:
        stage = Stage(kind, name, config, needs)
        sweep.stages.setdefault(stage.key, stage)
        return stage.key

    def real(name: str) -> tuple[str, str | None]:
        """Where a data set of `real:` lies: its path; or the stage that makes it of the bundled pictures, twice."""
        sets = sweep.spec.get("real") or {}
        if name not in sets:
            raise UsageError(f"real data {name!r}: `real:` names {', '.join(sets) or 'none'}")
        if isinstance(sets[name], str):
            return str(find(sets[name], folder)), None
        key = add("real", f"{name}-{_digest(sets[name] or {})}", _merge("real", [], sets[name] or {}), [])
        return key, key

    where: str
    if settings["data"] == "real":
        sets = list(sweep.spec.get("real") or {})
        name = settings.get("real", sets[0] if len(sets) == 1 else None)
        if name is None:
            raise UsageError(f"data: real: which of {', '.join(sets) or '`real:`, which is missing'}? set the key `real`")
        where, made = real(name)
        images, of, data, needs = None, name, where, [made] if made else []
    else:
        config = _config("generate", settings, folder)
        config.captions = [str(find(c, folder)) for c in config.captions]
        digest = _digest({**_fixed(config, GENERATE_FREE), "captions": [_content(c) for c in config.captions]})
        of = f"w{config.guidance_scale:g}_m{config.images_per_caption}" + (f"_n{config.limit}" if config.limit else "")
        images = data = add("generate", f"{of}-{digest}", config, [])
        needs = [images]
    config = _config("train", {**settings, "train.seed": seed}, folder)
    config.data = [data]
    digest = _digest(_fixed(config, TRAIN_FREE))
    train = add("train", f"{config.method}_{of}_s{seed}-{digest}", config, needs)
    entries = [e for e in sweep.spec.get("evaluate") or [] if _matches(e.get("if", {}), settings)]
    scores = [(f"{train[6:]}/{name}", config) for name, config in (_evaluate(entry, folder) for entry in entries)]
    return Cell(axis, seed, images, train, [add("evaluate", name, config, [train]) for name, config in scores])


def _evaluate(entry: dict[str, Any], folder: Path) -> tuple[str, EvaluateConfig]:
    """The name and config of an entry of `evaluate:`."""
    config: EvaluateConfig = _merge("evaluate", [], _flat({k: v for k, v in entry.items() if k != "if"}))
    config.random_encoders, config.data_root = 0, str(Path(config.data_root).resolve())
    config.dataset = [str(find(name, folder)) for name in config.dataset]
    sets = [Path(name).name for name in config.dataset]
    words = [*config.protocol, *(sets if len(sets) <= 2 else [f"{len(sets)}sets"])]
    return f"{'_'.join(words)}-{_digest(_fixed(config, EVALUATE_FREE))}", config


def _config(stage: str, settings: Settings, folder: Path) -> Any:
    values = {k.partition(".")[2]: v for k, v in settings.items() if k.startswith(f"{stage}.")}
    files = values.pop("config", [])
    return _merge(stage, [str(find(f, folder)) for f in ([files] if isinstance(files, str) else files)], values)


def _merge(stage: str, files: list[str], values: dict[str, Any]) -> Any:
    lists = {name for name, f in walk(CONFIGS[stage]) if typing.get_origin(f.type) is list}
    try:
        return merge(
            CONFIGS[stage], files, {k: [v] if k in lists and not isinstance(v, list) else v for k, v in values.items()}
        )
    except UsageError as error:
        raise UsageError(f"{stage}: {error}") from None


def find(name: str, folder: Path) -> Path:
    """A file that a sweep names: from the working folder, the YAML's, configs/, or the repository; as given where none is."""
    for place in (Path.cwd(), folder, data_folder("configs"), data_folder("configs").parent):
        if (place / name).exists():
            return (place / name).resolve()
    return Path(name)


def _matches(wanted: dict[str, Any], settings: Settings) -> bool:
    """Whether every key has the value asked for, or one of a list of them."""
    return all(settings.get(k) in (v if isinstance(v, list) else [v]) for k, v in _flat(wanted).items())


def _flat(tree: dict[str, Any], prefix: str = "") -> Settings:
    """Nested mappings as dotted keys."""
    found: Settings = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _fixed(config: Any, free: set[str]) -> dict[str, Any]:
    """What of a config decides the result: a key at its default is left out, so that a new key changes no old name."""
    found = {}
    for name, key in walk(type(config)):
        value = functools.reduce(getattr, name.split("."), config)
        if name.split(".")[0] not in free | PLACE and value != default_of(key):
            found[name] = value
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@functools.cache
def _content(path: str) -> str:
    """The SHA-256 of a file; of what is not there (or is a glob) its name."""
    if not Path(path).is_file():
        return path
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_keys(stage: str) -> list[str]:
    """The keys of a stage that a sweep may set."""
    return ["config"] * (stage in ("generate", "train")) + [name for name, _ in walk(CONFIGS[stage]) if name not in OURS[stage]]


def _check(spec: dict[str, Any], axes: list[dict[str, Any]]) -> set[str]:
    """Raise UsageError on an unknown key anywhere; returns the axes that are labels."""
    dotted = ["data", "real", *(f"{stage}.{k}" for stage in ("generate", "train") for k in known_keys(stage))]
    labels = {k for product in axes for k in product if k not in dotted and "." not in k}

    def keys(place: str, tree: Any, valid: list[str]) -> None:
        if not isinstance(tree, dict):
            raise UsageError(f"{place}: must be a mapping")
        for name in _flat(tree):
            if name not in valid:
                raise UsageError(_unknown(name, place, valid))

    for stage in ("generate", "train"):
        keys(stage, spec.get(stage) or {}, known_keys(stage))
    for product in axes:
        keys("grid", product, [*dotted, *labels])
    for name, value in (spec.get("real") or {}).items():
        if not isinstance(value, str):
            keys(f"real: {name}", value or {}, known_keys("real"))
    for rule in spec.get("when") or []:
        _check_keys(rule, ("if", "set"), "when")
        keys("when: if", rule.get("if"), [*dotted, *labels])
        keys("when: set", rule.get("set"), dotted)
    for rule in spec.get("exclude") or []:
        keys("exclude", rule, [*dotted, *labels])
    for entry in spec.get("evaluate") or []:
        keys("evaluate", {k: v for k, v in entry.items() if k != "if"}, known_keys("evaluate"))
        keys("evaluate: if", entry.get("if", {}), [*dotted, *labels])
    if not all(isinstance(seed, int) for seed in spec.get("seeds") or []):
        raise UsageError("seeds: must be whole numbers")
    return labels


def _check_keys(tree: dict[str, Any], valid: tuple[str, ...], place: object) -> None:
    for name in tree:
        if name not in valid:
            raise UsageError(_unknown(name, place, list(valid)))


def _unknown(name: str, place: object, valid: list[str] | None = None) -> str:
    every = valid or [f"{stage}.{k}" for stage in ("generate", "train") for k in known_keys(stage)]
    close = difflib.get_close_matches(name, every, n=2, cutoff=0.5)
    return f"unknown key '{name}' in {place}" + (f"; did you mean {' or '.join(close)}?" if close else "")

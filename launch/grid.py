"""A sweep's YAML becomes cells, and cells become stages; equal stages are one.

configs/sweep/guidance.yaml explains the keys.
"""

import functools
import hashlib
import itertools
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from generation.plan import FREE as GENERATE_FREE
from launch.grid_keys import CONFIGS, TOP, check_keys, check_spec, flat, unknown
from stablerep.eval.config import EvaluateConfig
from stablerep.runtime.config import default_of, load_yaml, merge, walk
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import data_folder, file_hash
from stablerep.train_config import FREE as TRAIN_FREE

Settings = dict[str, Any]  # dotted keys: generate.*, train.*, `data`, `real`, and labels that `when` gives a meaning

Score = tuple[dict[str, Any], str, EvaluateConfig]  # an entry of `evaluate:`: its `if`, name and config
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

    spec: Any = OmegaConf.to_container(load_yaml(path))
    if not isinstance(spec, dict):
        raise UsageError(f"{path} must hold a mapping")
    check_keys(spec, TOP, path)
    over = spec.pop("quick", None)
    if quick and not over:
        raise UsageError(f"{path} has no variant `quick:`")
    if quick:
        check_keys(over, TOP, f"{path}: quick")
        spec = OmegaConf.to_container(OmegaConf.merge(spec, over))
    return spec


def expand(spec: dict[str, Any], folder: Path) -> Sweep:
    """All cells and stages of a grid whose YAML lies in `folder`. Raises UsageError, one line, on what cannot be."""
    labels, axes = check_spec(spec), spec.get("grid") or [{}]
    base = {f"{stage}.{k}": v for stage in ("generate", "train") for k, v in flat(spec.get(stage) or {}).items()}
    scores = [(entry.get("if", {}), *_evaluate(entry, folder)) for entry in spec.get("evaluate") or []]
    sweep, seen = Sweep(spec), set()
    for product in axes:
        for values in itertools.product(*(v if isinstance(v, list) else [v] for v in product.values())):
            axis = dict(zip(product, values, strict=True))
            settings = {"data": "synthetic", **base, **axis}
            for rule in spec.get("when") or []:
                if _matches(rule["if"], settings):
                    settings |= {**flat(rule["set"]), **axis}  # an axis wins over a rule
            if any(_matches(rule, settings) for rule in spec.get("exclude") or []):
                continue
            if settings["data"] == "real":  # what is not generated has no guidance
                axis = {k: v for k, v in axis.items() if not k.startswith("generate.")}
            for seed in spec.get("seeds") or [0]:
                if (cell := json.dumps([axis, seed], sort_keys=True)) not in seen:
                    seen.add(cell)
                    sweep.cells.append(_cell(sweep, axis, settings, seed, folder, scores))
    if not sweep.cells:
        raise UsageError("the grid is empty: everything is excluded")
    unused = labels - {k for rule in spec.get("when") or [] for k in rule["if"]}
    if unused:
        raise UsageError(unknown(min(unused), "grid"))
    return sweep


def _cell(sweep: Sweep, axis: dict[str, Any], settings: Settings, seed: int, folder: Path, scores: Sequence[Score]) -> Cell:
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
    wanted = [(f"{train[6:]}/{name}", config) for rule, name, config in scores if _matches(rule, settings)]
    return Cell(axis, seed, images, train, [add("evaluate", name, config, [train]) for name, config in wanted])


def _evaluate(entry: dict[str, Any], folder: Path) -> tuple[str, EvaluateConfig]:
    """The name and config of an entry of `evaluate:`."""
    config: EvaluateConfig = _merge("evaluate", [], flat({k: v for k, v in entry.items() if k != "if"}))
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
    return all(settings.get(k) in (v if isinstance(v, list) else [v]) for k, v in flat(wanted).items())


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
    return file_hash(path)

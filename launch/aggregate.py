"""The numbers of a sweep: rows of single seeds become means with 95 % intervals, and are found again by name."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stablerep.runtime.errors import UsageError

AXES = {
    "data": "data",
    "generate.guidance_scale": "guidance scale w",
    "generate.limit": "number of captions",
    "generate.images_per_caption": "images generated a caption",
    "train.images_per_caption": "images a caption in a batch",
    "train.method": "method",
    "train.steps": "training steps",
    "train.global_batch": "global batch (images)",
}
PROTOCOLS = {
    "linear": "linear probe",
    "knn": "k-NN",
    "fewshot": "few-shot",
    "zeroshot": "zero-shot",
    "finetune": "fine-tuning",
}


class Unavailable(Exception):
    """What was asked for has no one answer."""


class NotRun(Unavailable):
    """The number that was asked for is not there."""


class Column(NamedTuple):
    """What was measured: the columns of a table."""

    protocol: str
    dataset: str
    setting: tuple[tuple[str, Any], ...]
    metric: str

    def words(self) -> str:
        """In full: `linear probe, 10 labels a class, fashion-probe: top-1 (%)`."""
        return f"{self.short()}, {self.dataset}: {self.metric} (%)"

    def short(self) -> str:
        """Protocol and setting only: `linear probe, 10 labels a class`."""
        rest = dict(self.setting)
        parts = [PROTOCOLS.get(self.protocol, self.protocol)]
        if "labels_per_class" in rest:
            count = rest.pop("labels_per_class")
            parts.append("all labels" if count == "all" else f"{count} labels a class")
        if "way" in rest and "shot" in rest:
            parts.append(f"{rest.pop('way')}-way {rest.pop('shot')}-shot")
        return ", ".join([*parts, *(f"{name} {value}" for name, value in rest.items())])

    def fits(self, name: str) -> bool:
        """Whether a metric's name in a sweep file (`parse_metric`) means this column."""
        protocol, dataset, asked = parse_metric(name)
        mine = {"metric": self.metric, **{k: str(v) for k, v in self.setting}}
        return (protocol, dataset) == (self.protocol, self.dataset) and all(mine.get(k) == v for k, v in asked.items())


@dataclass(frozen=True)
class Number:
    """The mean over the seeds of one cell, in percent, with its 95 % interval.

    Of one seed, `low` and `high` are that number's own interval (over test pictures or draws of labels): it says nothing
    about what another seed would give.
    """

    axes: dict[str, Any]
    column: Column
    mean: float
    low: float
    high: float
    by_seed: dict[int, float]
    train: list[str]
    images: list[str]

    @property
    def pooled(self) -> bool:
        """Whether the interval is over seeds."""
        return len(self.by_seed) > 1

    def text(self) -> str:
        """As in a table: mean and interval to a tenth; a dagger marks one seed, which may have no interval of its own."""
        interval = f" [{self.low:.1f}, {self.high:.1f}]" if self.pooled or self.low < self.high else ""
        return f"{self.mean:.1f}{interval}{'' if self.pooled else '†'}"


def parse_metric(name: str) -> tuple[str, str, dict[str, str]]:
    """(protocol, data set, setting) of `linear/fashion-probe/labels_per_class=10` or `fewshot/cars/way=5,shot=5`.

    Only as much of the setting is named as tells the number from others. Raises UsageError.
    """
    protocol, *rest = name.split("/")
    setting = rest.pop().split(",") if rest and "=" in rest[-1] else []
    if not protocol or not "/".join(rest) or not all("=" in part for part in setting):
        raise UsageError(f"metric {name!r}: write PROTOCOL/DATASET or PROTOCOL/DATASET/NAME=VALUE,NAME=VALUE")
    return protocol, "/".join(rest), dict(part.split("=", 1) for part in setting)


def student_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of two or more values: Student's t interval at 95 %."""
    from scipy import stats

    mean = sum(values) / len(values)
    error = float(stats.sem(values))
    if error == 0:  # scipy answers nan
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    return mean, float(low), float(high)


def aggregate(rows: Iterable[dict[str, Any]]) -> list[Number]:
    """Pool the rows of a sweep over seeds, in order of first appearance. Of two rows of one seed the later counts."""
    pools: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        names = {k: row[k] for k in ("axes", "protocol", "dataset", "setting", "metric")}
        pools.setdefault(json.dumps(names, sort_keys=True, default=str), {})[row["seed"]] = row
    numbers = []
    for pool in pools.values():
        first, *others = (pool[seed] for seed in sorted(pool))
        values = {seed: float(pool[seed]["value"]) for seed in sorted(pool)}
        own = float(first["value"]), float(first["low"]), float(first["high"])
        mean, low, high = student_interval(list(values.values())) if others else own
        setting = tuple(sorted((name, plain(value)) for name, value in first["setting"].items()))
        column = Column(first["protocol"], first["dataset"], setting, first["metric"])
        train, images = (list(dict.fromkeys(str(r[k]) for r in (first, *others) if r.get(k))) for k in ("train", "images"))
        numbers.append(Number({a: plain(v) for a, v in first["axes"].items()}, column, mean, low, high, values, train, images))
    return numbers


def plain(value: Any) -> Any:
    """A value that can be a key: lists and mappings as JSON."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, default=str)


def agrees_with(axes: dict[str, Any], where: dict[str, Any]) -> bool:
    """Whether a cell has every value of `where`; an axis that a cell lacks is null."""
    return all(axes.get(name) == plain(value) for name, value in where.items())


def axis_names(numbers: Iterable[Number]) -> list[str]:
    """Every axis, in order of appearance."""
    return list(dict.fromkeys(name for n in numbers for name in n.axes))


def values_of(numbers: Iterable[Number], axis: str) -> list[Any]:
    """The different values of an axis, in order of appearance, null where a cell lacks it."""
    seen: list[Any] = []
    for n in numbers:
        value = n.axes.get(axis)
        if value not in seen:
            seen.append(value)
    return seen


def where_words(where: dict[str, Any]) -> str:
    """`train.method=simclr, generate.guidance_scale=8`."""
    return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in where.items())


def select(numbers: Sequence[Number], metric: str, where: dict[str, Any]) -> Number:
    """The one number of a metric and a cell; `AXIS: null` is the cell that lacks that axis.

    Raises NotRun, naming the cell, and Unavailable, saying what more to name.
    """
    unknown = [name for name, value in where.items() if value is not None and name not in axis_names(numbers)]
    if unknown:
        raise Unavailable(f"the sweep has no axis {', '.join(unknown)}")
    found = [n for n in numbers if n.column.fits(metric) and agrees_with(n.axes, where)]
    if not found:
        raise NotRun(f"{where_words(where)} ({metric})")
    if len(found) > 1:
        open_axes = [a for a in axis_names(found) if len(values_of(found, a)) > 1]
        more = open_axes or [f"more of the metric's setting, {' or '.join(n.column.words() for n in found[:3])}"]
        raise Unavailable(f"{where_words(where)} ({metric}) fits {len(found)} numbers: name {', '.join(more)} as well")
    return found[0]

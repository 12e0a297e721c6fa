"""Plots of a sweep: a metric against an axis, a line a series, real baselines dashed.

    plots:
      - x: generate.guidance_scale                        # a numeric axis
        y: linear/fashion-probe/labels_per_class=10       # as in `claims:`
        series: train.method                              # the axis that gives colour and marker
        where: {generate.limit: 2000}                     # only these cells
        baseline: {data: real}                            # these cells as dashed lines in their series' colour

Whatever axis still varies becomes part of a line's name; `AXIS: null` are the cells that lack it; baselines are those of the
series shown. Without `plots:` there is one plot of every numeric axis with more than two values, of the metric that most cells
have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from launch.aggregate import AXES, Number, agrees_with, axis_names, parse_metric, values_of
from stablerep.runtime.errors import UsageError

# Okabe and Ito's colours, which colour-blind readers tell apart, less yellow (too pale on white); every line has a marker too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vPX*"
STYLES = ("-", ":", "-.")  # dashes are baselines
LOGARITHMIC = ("generate.limit", "train.steps", "train.global_batch")


@dataclass(frozen=True)
class Plot:
    """One entry of `plots:`."""

    x: str
    y: str
    series: str = "train.method"
    where: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)


def read_plots(spec: dict[str, Any]) -> list[Plot] | None:
    """The plots of a parsed sweep file, None where it has no `plots:`. Raises UsageError."""
    if spec.get("plots") is None:
        return None
    known = [f.name for f in fields(Plot)]
    for number, entry in enumerate(spec["plots"], 1):
        if not isinstance(entry, dict) or not {"x", "y"} <= entry.keys():
            raise UsageError(f"plot {number} needs `x:` and `y:`")
        if strange := sorted(map(str, entry.keys() - set(known))):
            raise UsageError(f"plot {number}: unknown key {', '.join(strange)}; known: {', '.join(known)}")
        parse_metric(entry["y"])
    return [Plot(**entry) for entry in spec["plots"]]


def is_number(value: Any) -> bool:
    """Whether an axis value can stand on a scale."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def default_plots(numbers: Sequence[Number]) -> list[Plot]:
    """The metric of most cells against every numeric axis with more than two values; real data are baselines."""
    columns = [n.column for n in numbers]
    if not columns:
        return []
    most = max(dict.fromkeys(columns), key=columns.count)
    name = "/".join(filter(None, (most.protocol, most.dataset, ",".join(f"{k}={v}" for k, v in most.setting))))
    baseline = {"data": "real"} if "real" in values_of(numbers, "data") else {}
    scales = [a for a in axis_names(numbers) if sum(map(is_number, values_of(numbers, a))) > 1]

    def where(axis: str) -> dict[str, Any]:  # of other axes, that of a part of the grid is left to its own plot
        here = [n for n in numbers if is_number(n.axes.get(axis))]
        return {a: None for a in scales if a != axis and None in values_of(here, a)}

    return [Plot(a, name, where=where(a), baseline=baseline) for a in scales if sum(map(is_number, values_of(numbers, a))) > 2]


def lines_of(numbers: Sequence[Number], plot: Plot) -> tuple[dict[tuple[Any, ...], list[Number]], list[str]]:
    """({values of the axes that tell lines apart: numbers in order of x}, those axes), baselines not among them."""
    shown = [n for n in numbers if agrees_with(n.axes, plot.where) and is_number(n.axes.get(plot.x))]
    shown = [n for n in shown if not plot.baseline or not agrees_with(n.axes, plot.baseline)]
    axes = [a for a in axis_names(shown) if a != plot.x and len(values_of(shown, a)) > 1]
    axes.sort(key=lambda a: a != plot.series)  # that of the colours first
    lines: dict[tuple[Any, ...], list[Number]] = {}
    for n in sorted(shown, key=lambda n: n.axes[plot.x]):
        lines.setdefault(tuple(n.axes.get(a) for a in axes), []).append(n)
    return {key: lines[key] for key in sorted(lines, key=lambda k: -lines[k][-1].mean)}, axes


def baselines_of(numbers: Sequence[Number], plot: Plot) -> list[Number]:
    """The baseline cells; `where` binds them only in axes that they have and that `baseline` leaves open."""
    if not plot.baseline:
        return []
    where = {k: v for k, v in plot.where.items() if k not in plot.baseline}
    return [
        n for n in numbers if agrees_with(n.axes, plot.baseline) and all(n.axes.get(k) in (None, v) for k, v in where.items())
    ]


class Scale:
    """Where values of x stand: at their value, moved aside by a share of the axis so that marks do not hide one another."""

    def __init__(self, ticks: list[float], log: bool) -> None:
        self.ticks, self.log = ticks, log

    def at(self, value: float, share: float = 0.0) -> float:
        first, last = self.ticks[0], self.ticks[-1]
        return value * (last / first) ** share if self.log else value + share * (last - first)


def mark(axes: Any, at: float, n: Number, colour: str, marker: str) -> None:
    """A number and its interval; hollow where it is one seed."""
    bars = [[max(0.0, n.mean - n.low)], [max(0.0, n.high - n.mean)]]
    face = colour if n.pooled else "white"
    axes.errorbar(at, n.mean, bars, color=colour, marker=marker, markersize=6, mfc=face, capsize=2.5, elinewidth=1.2, zorder=3)


def draw(numbers: Sequence[Number], plot: Plot) -> Any | None:
    """A matplotlib figure, None where no cell has a value on both axes. Raises UsageError where `y` fits several metrics."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    measured = [n for n in numbers if n.column.fits(plot.y)]
    columns = list(dict.fromkeys(n.column for n in measured))
    if len(columns) > 1:
        raise UsageError(f"plot of {plot.y}: it fits {'; '.join(c.words() for c in columns)}")
    lines, names = lines_of(measured, plot)
    if not lines:
        return None
    ticks = sorted({n.axes[plot.x] for line in lines.values() for n in line})
    scale = Scale(ticks, log=plot.x in LOGARITHMIC and ticks[0] > 0)
    by = names[0] if names else plot.series  # the axis that gives colour and marker
    looks = {v: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, v in enumerate(values_of(numbers, by))}
    others = list(dict.fromkeys(key[1:] for key in lines))  # what the further axes say: line styles
    figure, axes = pyplot.subplots(figsize=(8.6, 4.2), dpi=120)
    for place, (key, line) in enumerate(lines.items()):
        colour, marker = looks[line[0].axes.get(by)]
        share = 0.012 * (place - (len(lines) - 1) / 2)
        x = [scale.at(n.axes[plot.x], share) for n in line]
        told = ((AXES.get(a, a), v) for a, v in zip(names, key, strict=True) if v is not None)
        words = [v if isinstance(v, str) else f"{a} {v}" for a, v in told]
        style = STYLES[others.index(key[1:]) % len(STYLES)]
        axes.plot(
            x, [n.mean for n in line], color=colour, ls=style, lw=1.8, marker=marker, ms=6, mfc="none", label=", ".join(words)
        )
        for at, n in zip(x, line, strict=True):
            mark(axes, at, n, colour, marker)
    found = [
        n for n in baselines_of(measured, plot) if n.axes.get(by) in (None, *(line[0].axes.get(by) for line in lines.values()))
    ]
    draw_baselines(axes, found, plot, scale, {n.axes.get(by): looks[n.axes.get(by)][0] for n in found}, by)
    if scale.log:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel(AXES.get(plot.x, plot.x) + (" (log scale)" if scale.log else ""))
    axes.set_ylabel(f"{columns[0].metric} (%)")
    axes.set_title(f"{columns[0].short()}, {columns[0].dataset}", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    if names or found:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.6)
    figure.tight_layout()
    return figure


def draw_baselines(axes: Any, found: Sequence[Number], plot: Plot, scale: Scale, colours: dict[Any, str], by: str) -> None:
    """Dashed lines: along x where a baseline has that axis; else level, with the interval beyond the last tick."""
    along: dict[Any, list[Number]] = {}
    level = sorted((n for n in found if not is_number(n.axes.get(plot.x))), key=lambda n: -n.mean)
    for n in found:
        if is_number(n.axes.get(plot.x)):
            along.setdefault(n.axes.get(by), []).append(n)
    for value, line in along.items():
        line.sort(key=lambda n: n.axes[plot.x])
        axes.plot([n.axes[plot.x] for n in line], [n.mean for n in line], color=colours[value], ls="--", lw=1.2)
        for n in line:
            mark(axes, n.axes[plot.x], n, colours[value], "_")
    for place, n in enumerate(level):
        end = scale.at(scale.ticks[-1], 0.07 + 0.02 * place)
        axes.plot([scale.ticks[0], end], [n.mean, n.mean], color=colours[n.axes.get(by)], ls="--", lw=1.2)
        mark(axes, end, n, colours[n.axes.get(by)], "_")
    if found:
        words = ", ".join(str(v) for v in plot.baseline.values())
        axes.plot([], [], color="#555555", ls="--", lw=1.2, label=f"{words}, same colour")

"""What a sweep ends with: table.csv, table.md, claims.md, plots and a page, from the rows of its evaluations."""

import csv
import html
import io
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.aggregate import AXES, Column, Number, aggregate, axis_names, values_of, where_words
from launch.claims import HEAD, Verdict, claim_rows, judge, read_claims, summary
from launch.plots import Plot, default_plots, draw, read_plots
from launch.progress import duration
from launch.render import Cell, figure_png, html_table, markdown_table, page, picture_tag, plot_tag, text_table
from launch.results import own_commit
from stablerep.runtime.errors import UsageError
from stablerep.runtime.rundir import write_atomic

READING = (
    "Every number is a mean over training seeds, in percent, with its 95 % interval in brackets (Student's t over seeds). † "
    "marks one seed: that interval is over test pictures or draws of labels, and says nothing of what another seed would give. "
    "Bold is the best of its column, where all have several seeds and its interval lies clear above the others'; else none is. "
    "Two intervals that overlap can still belong to a clear difference: a claim is judged by the interval of the difference."
)


def check(spec: dict[str, Any]) -> None:
    """Raise UsageError where `plots:` or `claims:` of a parsed sweep file are not well formed: before anything is submitted."""
    read_plots(spec)
    read_claims(spec)


def write(rows: Sequence[dict[str, Any]], spec: dict[str, Any], out: Path, seconds: float | None = None) -> list[str]:
    """Write OUT/table.csv, table.md, report.html, plots/*.png and, where the sweep makes claims, claims.md.

    `rows` are dicts, one a number of one seed: axes, seed, protocol, dataset, metric, setting, value, low, high, train,
    images (a generation run, or null); values in percent. `spec` is the sweep file, `seconds` the time that the sweep took.
    Returns the lines to print. Raises UsageError where spec is not well formed.
    """
    claims, plots = read_claims(spec), read_plots(spec)
    numbers = aggregate(rows)
    verdicts = judge(numbers, claims)
    head, body, note = pivot(numbers)
    write_atomic(out / "table.csv", csv_text(numbers))
    write_atomic(out / "table.md", f"{markdown_table(head, body)}\n{note}\n\n{READING}\n")
    lines = [*text_table(head, body), note]
    if claims:
        write_atomic(out / "claims.md", f"{markdown_table(HEAD, claim_rows(verdicts))}\n{summary(verdicts)}\n")
        lines += ["", *text_table(HEAD, claim_rows(verdicts)), summary(verdicts)]
    pictures, missing = write_plots(numbers, default_plots(numbers) if plots is None else plots, out / "plots")
    write_atomic(out / "report.html", report(out.resolve().name, numbers, verdicts, pictures, seconds))
    return [*lines, *missing, "", f"{out / 'table.csv'}, table.md{', claims.md' if claims else ''}; open {out / 'report.html'}"]


def csv_text(numbers: Sequence[Number]) -> str:
    """All numbers, unrounded, a line each: axes, what was measured, mean, interval, and the runs it comes from."""
    axes = axis_names(numbers)
    settings = list(dict.fromkeys(k for n in numbers for k, _ in n.column.setting))
    fixed = ["protocol", "dataset", *(f"setting.{k}" for k in settings), "metric", "mean", "low", "high", "interval", "seeds"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*axes, *fixed, "value_by_seed", "train_runs", "image_runs"])
    for n in numbers:
        setting = dict(n.column.setting)
        writer.writerow(
            [*(n.axes.get(a) for a in axes), n.column.protocol, n.column.dataset, *(setting.get(k) for k in settings),
             n.column.metric, n.mean, n.low, n.high, "over seeds" if n.pooled else "of one seed", len(n.by_seed),
             json.dumps(n.by_seed), json.dumps(n.train, ensure_ascii=False), json.dumps(n.images, ensure_ascii=False)]
        )  # fmt: skip
    return buffer.getvalue()


def best_of(numbers: Sequence[Number]) -> Number | None:
    """The best number of a column, where all are over seeds and its interval lies above the intervals of all others."""
    first, *others = sorted(numbers, key=lambda n: -n.mean)
    clear = all(n.pooled for n in numbers) and all(first.low > n.high for n in others)
    return first if others and clear else None


def pivot(numbers: Sequence[Number]) -> tuple[list[str], list[list[Cell]], str]:
    """(heading, rows, note): a row a cell of the grid, a column a protocol, data set and setting; constant axes in the note."""
    axes = [a for a in axis_names(numbers) if len(values_of(numbers, a)) > 1]
    constant = {a: numbers[0].axes[a] for a in axis_names(numbers) if a not in axes}
    columns = list(dict.fromkeys(n.column for n in numbers))
    best = [best_of([n for n in numbers if n.column == c]) for c in columns]
    cells: dict[str, dict[Column, Number]] = {}
    for n in numbers:
        cells.setdefault(json.dumps([n.axes.get(a) for a in axes], default=str), {})[n.column] = n
    body = []
    for row in cells.values():
        any_number = next(iter(row.values()))
        counts = sorted({len(n.by_seed) for n in row.values()})
        line = [Cell(show(any_number.axes.get(a))) for a in axes] + [Cell("–".join(map(str, {counts[0]: 0, counts[-1]: 0})))]
        line += [Cell(row[c].text(), row[c] in best) if c in row else Cell("–") for c in columns]
        body.append(line)
    alike = len({(c.dataset, c.metric) for c in columns}) == 1
    note = f"{len(numbers)} numbers of {len(cells)} cells"
    note += f", {columns[0].metric} in percent on {columns[0].dataset}." if alike else "."
    note += f" The same everywhere: {where_words(constant)}." if constant else ""
    return [*(AXES.get(a, a) for a in axes), "seeds", *(c.short() if alike else c.words() for c in columns)], body, note


def show(value: Any) -> str:
    """An axis value in a table."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def write_plots(numbers: Sequence[Number], plots: Sequence[Plot], folder: Path) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Draw and write the plots; ([(words, PNG)], a line for each that could not be drawn)."""
    from matplotlib import pyplot

    for stale in folder.glob("*.png"):
        stale.unlink()
    drawn, missing = [], []
    for number, plot in enumerate(plots, 1):
        words = f"{plot.y} against {plot.x}"
        try:
            figure = draw(numbers, plot)
        except UsageError as problem:
            missing.append(f"no {problem}")
            continue
        if figure is None:
            missing.append(f"no plot of {words}: no cell has both")
            continue
        drawn.append((words, figure_png(figure)))
        pyplot.close(figure)
        write_atomic(folder / f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', words)}.png", drawn[-1][1])
    return drawn, missing


def samples(numbers: Sequence[Number], captions: int = 3, images: int = 4) -> str:
    """The first images of the first captions of every generation run, as HTML; a run that is not there any more is said."""
    from stablerep.data.shards import DatasetIndex

    runs: dict[str, list[Number]] = {}
    for n in numbers:
        for run in n.images:
            runs.setdefault(run, []).append(n)
    blocks = []
    for run, users in runs.items():
        shared = {
            a: v for a, v in users[0].axes.items() if all(n.axes.get(a) == v for n in users) and not a.startswith("train.")
        }
        title = html.escape(where_words(shared) or run)
        try:
            index = DatasetIndex(Path(run), first=1)
            cards = [
                (index.text(i), [index.read(i, j) for j in range(min(images, index.images_per_caption))])
                for i in range(min(captions, len(index)))
            ]
        except (UsageError, OSError) as problem:
            blocks.append(f"<h3>{title}</h3><p class=note>not shown: {html.escape(str(problem))}</p>")
            continue
        inside = "".join(
            f"<div class=card><p>{html.escape(t)}</p>{''.join(map(picture_tag, jpegs))}</div>" for t, jpegs in cards
        )
        blocks.append(f"<h3>{title}</h3><div class=cards>{inside}</div>")
    return "".join(blocks)


def report(
    title: str,
    numbers: Sequence[Number],
    verdicts: Sequence[Verdict],
    plots: Sequence[tuple[str, bytes]],
    seconds: float | None,
) -> str:
    """The page: claims, numbers, plots, sample images. It needs no other file and no network."""
    head, body, note = pivot(numbers)
    runs = len({run for n in numbers for run in n.train})
    facts = {"numbers": f"{len(numbers):,}", "training runs": f"{runs:,}"}
    facts |= {"time in all": duration(seconds)} if seconds is not None else {}
    parts = [f"<p class=sub>{time.strftime('%Y-%m-%d')}, commit {own_commit()}</p>"]
    parts += [f"<div class=facts>{''.join(f'<div><b>{html.escape(v)}</b>{k}</div>' for k, v in facts.items())}</div>"]
    if verdicts:
        parts += ["<h2>Claims</h2>", html_table(HEAD, claim_rows(verdicts), "left"), f"<p>{html.escape(summary(verdicts))}</p>"]
    parts += ["<h2>Numbers</h2>", html_table(head, body, "close"), f"<p class=note>{html.escape(note)}</p>"]
    parts += ["<h2>How to read the intervals</h2>", f"<p>{READING}</p>"]
    if plots:
        parts += ["<h2>Plots</h2>", *(plot_tag(png, words) for words, png in plots)]
        parts.append(
            "<p class=note>Bars are 95 % intervals; a hollow marker is one seed. Dashed: baselines, interval on the right.</p>"
        )
    shown = samples(numbers)
    parts += ["<h2>Images</h2>", shown] if shown else []
    return page(title, "\n".join(parts))

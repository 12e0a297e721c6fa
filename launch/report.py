"""The demo's page: one self-contained HTML file, pictures inside."""

import html
from pathlib import Path
from typing import Any

from launch.render import figure_png, page, picture_tag, plot_tag


def loss_plot(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Loss against step for each run, as an <img>."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.6, 3.2), dpi=110)
    for name, records in curves.items():
        axes.plot([r["step"] for r in records], [r["loss"] for r in records], label=name, linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    png = figure_png(figure)
    pyplot.close(figure)
    return plot_tag(png, "loss")


def interval(values: list[float]) -> str:
    """Mean and range of values."""
    mean = sum(values) / len(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} <span class=note>({min(values):.1f}–{max(values):.1f})</span>"


def result_table(results: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Rows: encoders (random initialisations pooled); columns: protocol and labels a class."""

    def column(r: dict[str, Any]) -> tuple[str, str]:
        return r["protocol"], str(r["setting"]["labels_per_class"])

    columns = list(dict.fromkeys(map(column, results)))
    rows: dict[str, dict[tuple[str, str], list[float]]] = {}
    for r in results:
        row = "random encoder, 3 initialisations" if r["checkpoint"].startswith("random-") else names[r["checkpoint"]]
        rows.setdefault(row, {}).setdefault(column(r), []).extend(r["values"])
    head = "".join(f"<th>{p}<br>{n} labels a class</th>" for p, n in columns)
    body = ""
    for i, (name, cells) in enumerate(rows.items()):
        body += f"<tr{' class=best' if i == 0 else ''}><td>{html.escape(name)}</td>"
        body += "".join(f"<td>{interval(cells[c])}</td>" for c in columns) + "</tr>"
    return f"<table><tr><th>encoder</th>{head}</tr>{body}</table>"


def write_report(
    path: Path,
    *,
    captions: list[tuple[str, list[bytes]]],
    strip: dict[float, list[bytes]],
    strip_captions: list[str],
    curves: dict[str, list[dict[str, Any]]],
    results: list[dict[str, Any]],
    names: dict[str, str],
    facts: dict[str, str],
) -> None:
    """Write the page from its pieces."""
    cards = "".join(
        f"<div class=card><p>{html.escape(text)}</p>{''.join(map(picture_tag, images))}</div>" for text, images in captions
    )
    head = "".join(f"<td class=note>{html.escape(c)}</td>" for c in strip_captions)
    rows = "".join(
        f"<tr><td class=note>{w:g}</td>{''.join(f'<td>{picture_tag(i)}</td>' for i in images)}</tr>"
        for w, images in strip.items()
    )
    shown = "".join(f"<div><b>{html.escape(v)}</b>{html.escape(k)}</div>" for k, v in facts.items())
    body = f"""<p class=sub>Every picture on this page was generated from its caption on this machine; the encoder saw no
real picture.</p>
<div class=facts>{shown}</div>
<h2>Captions and their images</h2><p>Each caption starts from several noises; StableRep makes the images of one caption
attract each other.</p><div class=cards>{cards}</div>
<h2>Guidance</h2><p>The same noise at four guidance scales: more obeys the caption more, and varies less.</p>
<table class=strip><tr><td class=note>scale</td>{head}</tr>{rows}</table>
<h2>Training</h2>{loss_plot(curves)}
<p class=note>The two losses have different numbers of positives and are not comparable; each should fall.</p>
<h2>On real test pictures</h2>{result_table(results, names)}
<p class=note>Top-1 accuracy in percent on 2,000 held-out real pictures of Fashion-MNIST in ten classes (chance 10) that
neither the generator nor any encoder was trained on. In brackets: lowest and highest over five draws of the labels (and,
for the random encoder, three initialisations). One training seed each: the brackets say nothing about that.
StableRep knows which images share a caption, and these captions name the class; SimCLR knows nothing of captions.</p>"""
    from stablerep.runtime.rundir import write_atomic

    write_atomic(path, page("From captions to an encoder", body))

"""The demo's page: one self-contained HTML file, pictures inside."""

import base64
import html
import io
from pathlib import Path
from typing import Any

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:40px auto;padding:0 20px;color:#1c2430;background:#fff}
h1{font-size:30px;margin-bottom:4px} h2{margin-top:44px;font-size:21px} .sub{color:#5d6877;margin-top:0}
.cards{display:grid;grid-template-columns:1fr 1fr;gap:14px} .card{border:1px solid #e3e7ee;border-radius:10px;padding:10px 12px}
.card p{margin:0 0 6px;font-size:14px;color:#3b4656} img.px{image-rendering:pixelated;width:64px;height:64px;margin-right:2px}
table{border-collapse:collapse;width:100%} td,th{padding:7px 10px;border-bottom:1px solid #e3e7ee;text-align:right}
td:first-child,th:first-child{text-align:left}
tr.best td{font-weight:600;background:#f0f7f2} .note{color:#5d6877;font-size:14px}
.facts{display:flex;gap:34px;margin:22px 0} .facts b{display:block;font-size:24px}
.strip td{text-align:center;border:0;padding:3px}
"""


def picture_tag(jpeg: bytes) -> str:
    """A stored JPEG as an <img>, enlarged without smoothing."""
    return f'<img class="px" alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return f'<img alt="loss" style="width:100%" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def interval(values: list[float]) -> str:
    """Mean and range of values."""
    mean = sum(values) / len(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} <span class=note>({min(values):.1f}–{max(values):.1f})</span>"


def result_table(results: list[dict[str, Any]], names: dict[str, str]) -> str:
    """Rows: encoders (random initialisations pooled); columns: protocol and labels a class."""
    columns = list(dict.fromkeys((r["protocol"], str(r["labels_per_class"])) for r in results))
    rows: dict[str, dict[tuple[str, str], list[float]]] = {}
    for r in results:
        row = "random encoder, 3 initialisations" if r["checkpoint"].startswith("random-") else names[r["checkpoint"]]
        rows.setdefault(row, {}).setdefault((r["protocol"], str(r["labels_per_class"])), []).extend(r["values"])
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
    page = f"""<!doctype html><html lang=en><meta charset=utf-8><title>From captions to an encoder</title>
<style>{STYLE}</style><h1>From captions to an encoder</h1>
<p class=sub>Every picture on this page was generated from its caption on this machine; the encoder saw no real picture.</p>
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
StableRep knows which images share a caption, and these captions name the class; SimCLR knows nothing of captions.</p>
</html>"""
    from stablerep.runtime.rundir import write_atomic

    write_atomic(path, page)

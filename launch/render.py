"""How tables and pictures become text: markdown, a terminal, and a page that needs no other file."""

import base64
import html
import io
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:40px auto;padding:0 20px;color:#1c2430;background:#fff}
h1{font-size:30px;margin-bottom:4px} h2{margin-top:44px;font-size:21px} .sub{color:#5d6877;margin-top:0}
.cards{display:grid;grid-template-columns:1fr 1fr;gap:14px} .card{border:1px solid #e3e7ee;border-radius:10px;padding:10px 12px}
.card p{margin:0 0 6px;font-size:14px;color:#3b4656} img.px{image-rendering:pixelated;width:64px;height:64px;margin-right:2px}
table{border-collapse:collapse;width:100%} td,th{padding:7px 10px;border-bottom:1px solid #e3e7ee;text-align:right}
td:first-child,th:first-child{text-align:left} .left td,.left th{text-align:left;vertical-align:top}
.close td,.close th{padding:5px 8px;font-size:14px} .close td{white-space:nowrap}
tr.best td{font-weight:600;background:#f0f7f2} .note{color:#5d6877;font-size:14px} .wide{overflow-x:auto}
.facts{display:flex;gap:34px;margin:22px 0} .facts b{display:block;font-size:24px}
.strip td{text-align:center;border:0;padding:3px}
"""


class Cell(NamedTuple):
    """One cell of a table."""

    text: str
    bold: bool = False


def page(title: str, body: str) -> str:
    """A whole HTML page; `body` is HTML."""
    name = html.escape(title)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>\n<style>{STYLE}</style><h1>{name}</h1>"
    return f"{head}\n{body}\n</html>\n"


def picture_tag(jpeg: bytes) -> str:
    """A stored JPEG as an <img>, enlarged without smoothing."""
    return f'<img class="px" alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def plot_tag(png: bytes, alt: str) -> str:
    """A plot as an <img> of the page's width."""
    source = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" style="width:100%" src="data:image/png;base64,{source}">'


def figure_png(figure: Any) -> bytes:
    """The PNG of a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def html_table(head: Sequence[str], rows: Sequence[Sequence[Cell]], kind: str = "") -> str:
    """A table as HTML; it scrolls sideways where it is wider than the page. `kind` is its CSS class."""

    def whole(interval: re.Match[str]) -> str:  # not broken over lines
        return interval[0].replace(" ", "&nbsp;")

    def row(cells: Sequence[Cell]) -> str:
        texts = (re.sub(r" \[[^]]*\]", whole, html.escape(c.text)) for c in cells)
        return "".join(f"<td>{f'<b>{t}</b>' if c.bold else t}</td>" for t, c in zip(texts, cells, strict=True))

    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(f"<tr>{row(r)}</tr>" for r in rows)
    return f'<div class=wide><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table as GitHub's markdown."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(t.replace("|", "\\|").replace("\n", " ") for t in texts) + " |\n"

    body = (line([f"**{c.text}**" if c.bold else c.text for c in row]) for row in rows)
    return line(head) + "|" + "---|" * len(head) + "\n" + "".join(body)


def text_table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """A table as lines: drawn and wrapped on a terminal, one plain line a row elsewhere. Bold is a star where it is plain."""
    if not sys.stdout.isatty():
        texts = [list(head), *([f"{c.text} *" if c.bold else c.text for c in row] for row in rows)]
        widths = [max(len(t[i]) for t in texts) for i in range(len(head))]
        return ["  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in texts]
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=any(len(c.text) > 40 for row in rows for c in row))  # where cells wrap, rows need parting
    for name in head:
        table.add_column(Text(name))
    for row in rows:
        table.add_row(*(Text(c.text, style="bold" if c.bold else "") for c in row))
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()

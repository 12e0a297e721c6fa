"""A contact sheet of a generation run: its latest captions with their images, RUN/contact.png."""

import io
from pathlib import Path

from stablerep.runtime.rundir import write_atomic

CAPTIONS, IMAGES, SIDE, MARGIN, LINE = 12, 6, 128, 4, 16  # at most; pixels


def contact_sheet(run: Path, newest: list[int]) -> Path | None:
    """Write the sheet from the `newest` shards, a caption of each in turn; its path, or None where there is no shard yet."""
    from PIL import Image, ImageDraw, ImageFont

    rows = _rows(run, newest[:CAPTIONS])[:CAPTIONS]
    if not rows:
        return None
    across = max(len(images) for _, images in rows)
    width, height = across * (SIDE + MARGIN) + MARGIN, len(rows) * (SIDE + LINE + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for row, (text, images) in enumerate(rows):
        top = MARGIN + row * (SIDE + LINE + MARGIN)
        while text and draw.textlength(text, font=font) > width - 2 * MARGIN:
            text = text[:-1]
        draw.text((MARGIN, top), text, fill="black", font=font)
        for column, data in enumerate(images):
            with Image.open(io.BytesIO(data)) as picture:
                small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(small, (MARGIN + column * (SIDE + MARGIN), top + LINE))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    write_atomic(run / "contact.png", png.getvalue())
    return run / "contact.png"


def _rows(run: Path, shards: list[int]) -> list[tuple[str, list[bytes]]]:
    """(caption, JPEGs) of the first caption of every shard, then of the second ones, and so on."""
    from stablerep.data.shards import captions_of, read_sidecar, shard_name

    found = []
    for order, number in enumerate(shards):
        sidecar = read_sidecar(run / "shards", number)
        if sidecar is None:  # forgotten by an audit
            continue
        tar = (run / "shards" / f"{shard_name(number)}.tar").read_bytes()
        for place, (_, text, images) in enumerate(captions_of(sidecar)):
            cut = [tar[offset : offset + size] for offset, size in [text, *images[:IMAGES]]]
            found.append((place, order, cut[0].decode(), cut[1:]))
    return [(text, images) for _, _, text, images in sorted(found)]

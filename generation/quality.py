"""Quality of a shard in five numbers, measured on small thumbnails while it is made; and the shards that fall out of line."""

import itertools
import math
import statistics
from typing import Any

THUMBNAIL = 16  # pixels at least: JPEGs are decoded at the smallest eighth that has them
FLAT = 8  # levels of 255, for what JPEG adds to a picture of one colour
FEWEST = 5  # shards that a median is taken of
# How far from the median a number may lie at least, and on which sides it is bad: less is -1, more is +1.
FLOORS = {"black": 0.02, "constant": 0.02, "retried": 0.02}  # shares of images; of the others a tenth of the median
SIDES = {"black": (1,), "constant": (1,), "retried": (1,), "distance": (-1,), "jpeg_bytes": (-1, 1)}


def measure(captions: list[list[bytes]], retried: int) -> dict[str, float | None]:
    """Of a shard's JPEGs, a list for each caption: a function of the bytes, and of how many images were made again in float32.

    `black`, `constant` (one other colour) and `retried`: shares of the images. `distance`: mean over captions and over pairs of
    a caption's images of the root mean square difference of their thumbnails, in [0, 1] (None where a caption has one image);
    near 0 the images of a caption are one image. `jpeg_bytes`: their mean size.
    """
    import numpy as np
    import simplejpeg

    black, constant, distances = 0, 0, []
    for jpegs in captions:
        small = [simplejpeg.decode_jpeg(jpeg, min_height=THUMBNAIL, min_width=THUMBNAIL) for jpeg in jpegs]
        for picture in small:
            dark, flat = picture.max() <= FLAT, np.ptp(picture, axis=(0, 1)).max() <= FLAT
            black += bool(dark)
            constant += bool(flat and not dark)
        whole = [picture.astype(np.float32) / 255 for picture in small]
        distances += [float(np.sqrt(np.mean((a - b) ** 2))) for a, b in itertools.combinations(whole, 2)]
    images = sum(map(len, captions))
    return {
        "black": round(black / images, 4),
        "constant": round(constant / images, 4),
        "retried": round(retried / images, 4),
        "distance": round(statistics.fmean(distances), 4) if distances else None,
        "jpeg_bytes": round(sum(len(jpeg) for jpegs in captions for jpeg in jpegs) / images),
    }


def medians(shards: dict[int, dict[str, Any]]) -> dict[str, float]:
    """The median of each number over shards; empty where no shard has any."""
    return {name: statistics.median(values.values()) for name, values in _columns(shards).items()}


def outliers(shards: dict[int, dict[str, Any]]) -> list[tuple[int, str, float, float]]:
    """(shard, what, its number, the median) where a number is worse than the median by more than six standard deviations.

    The deviation is the robust one, 1.4826 times the median distance from the median, and the threshold has a floor (see
    `FLOORS`): where all shards are alike, a grain of sand is no outlier.
    """
    found = []
    for name, values in _columns(shards).items():
        if len(values) < FEWEST:
            continue
        middle = statistics.median(values.values())
        spread = 1.4826 * statistics.median([abs(v - middle) for v in values.values()])
        allowed = max(6 * spread, FLOORS.get(name, 0.1 * middle))
        low, high = (middle + side * allowed if side in SIDES[name] else side * math.inf for side in (-1, 1))
        found += [(k, name, v, middle) for k, v in values.items() if not low <= v <= high]
    return sorted(found)


def _columns(shards: dict[int, dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Each number that any shard has, by shard."""
    columns = {name: {k: v for k, q in shards.items() if (v := q.get(name)) is not None} for name in SIDES}
    return {name: values for name, values in columns.items() if values}

"""One number of a table with its 95 % interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Score:
    """One number of a table, in percent, with its 95 % interval.

    The interval covers one source of chance only. Of one value: which pictures the test split holds. Of several: which labels
    (or episodes) were drawn, on the same test pictures. Neither covers another seed of the training.
    """

    metric: str  # "top-1", "mean per class", "11-point mAP"
    value: float
    low: float
    high: float
    n: int  # test pictures, or episodes
    values: list[float]  # the repetitions that `value` is the mean of (one where there is one)
    setting: dict[str, Any] = field(default_factory=dict)  # what else names the number: {"labels_per_class": 10}, ...


def over_repetitions(values: Sequence[float], metric: str, n: int, setting: dict[str, Any]) -> Score:
    """The mean of two or more repetitions (percent) with Student's t interval of that mean; of one, no interval wider
    than itself."""
    found = [float(v) for v in values]
    mean = sum(found) / len(found)
    if len(found) == 1:
        return Score(metric, mean, mean, mean, n, found, setting)
    from scipy.stats import t

    deviation = math.sqrt(sum((v - mean) ** 2 for v in found) / (len(found) - 1))
    half = float(t.ppf(0.975, len(found) - 1)) * deviation / math.sqrt(len(found))
    return Score(metric, mean, mean - half, mean + half, n, found, setting)


def of_proportion(correct: int, n: int, metric: str, setting: dict[str, Any]) -> Score:
    """`correct` of `n` test pictures, in percent, with Wilson's interval (JASA 22, 1927)."""
    share = correct / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    value = 100 * share
    return Score(metric, value, min(value, 100 * (centre - half)), max(value, 100 * (centre + half)), n, [value], setting)

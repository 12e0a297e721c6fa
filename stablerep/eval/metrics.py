"""Metrics from class scores, in percent, each with a 95 % interval over the test pictures."""

from typing import Any

import numpy as np

from stablerep.eval.datasets import MEAN_AP, PER_CLASS, TOP_1
from stablerep.eval.score import Score, of_proportion

DRAWS = 200  # bootstrap samples of the test pictures


def value_of(metric: str, scores: np.ndarray, labels: np.ndarray) -> float:
    """The metric in percent of class scores [N, C] (higher is likelier) on labels int [N], or [N, C] of 0 and 1."""
    if metric == MEAN_AP:
        aps = [average_precision(scores[:, c], labels[:, c]) for c in range(labels.shape[1]) if labels[:, c].any()]
        return 100 * float(np.mean(aps))
    right = scores.argmax(1) == labels
    if metric == TOP_1:
        return 100 * float(right.mean())
    assert metric == PER_CLASS
    counts = np.bincount(labels)
    return 100 * float((np.bincount(labels, right) / np.maximum(counts, 1))[counts > 0].mean())


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """11-point average precision of VOC2007 (Everingham et al., IJCV 2010, section 4.2): the mean over recalls 0, 0.1 .. 1 of
    the best precision at that recall or a higher one. Scores [N], truth [N] of 0 and 1 with at least one 1; between equal
    scores there is no threshold."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # where one threshold ends
    hits = np.cumsum(truth[order])[last]
    precision, recall = hits / (np.flatnonzero(last) + 1), hits / truth.sum()
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-9)
    return float(best[at].mean())


def measure(metric: str, scores: np.ndarray, labels: np.ndarray, setting: dict[str, Any]) -> Score:
    """The metric as a Score: Wilson's interval for top-1, else the 2.5 and 97.5 % quantiles over bootstrap samples."""
    value, n = value_of(metric, scores, labels), len(labels)
    if metric == TOP_1:
        return of_proportion(int((scores.argmax(1) == labels).sum()), n, metric, setting)
    random = np.random.default_rng(0)
    draws = [value_of(metric, scores[rows], labels[rows]) for rows in random.integers(0, n, (DRAWS, n))]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Score(metric, value, min(value, float(low)), max(value, float(high)), n, [value], setting)

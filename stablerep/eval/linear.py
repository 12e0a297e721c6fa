"""Linear probe for small sets: L2-regularised logistic regression (scikit-learn's L-BFGS) on standardised features, its C
chosen on the validation split or a held-out fifth, then fitted again on both (Kornblith et al., arXiv 1805.08974, A.1)."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from stablerep.eval.metrics import value_of
from stablerep.runtime.errors import UsageError

DECADES = 10.0 ** np.arange(-4, 3)
QUARTERS = 10.0 ** (np.arange(-3, 4) / 4)  # around the best decade: the paper's grid has four steps a decade
FEW = 500  # held-out pictures that cannot tell quarters of a decade apart
HELD_OUT = 0.2
SMALL = 1_000_000  # numbers in a matrix; below it threads only get in each other's way

Pair = tuple[np.ndarray, np.ndarray]  # features [N, D]; labels int [N], or [N, C] of 0 and 1


def linear_scores(train: Pair, val: Pair | None, test: np.ndarray, classes: int, metric: str, seed: int) -> np.ndarray:
    """Class scores [M, C] of test features [M, D]; the test split chooses nothing. Without `val` a fifth of `train` (of each
    class, where a picture has one) takes its part. Raises UsageError where a class is too small for that."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    fit, held = (train, val) if val is not None else _hold_out(train, seed)
    everything = (np.concatenate([fit[0], held[0]]), np.concatenate([fit[1], held[1]]))
    with warnings.catch_warnings(), threadpool_limits(1 if everything[0].size < SMALL else None):
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = _choose(DECADES, fit, held, classes, metric)
        if len(held[1]) >= FEW:
            best = _choose(best * QUARTERS, fit, held, classes, metric)
        return next(_path([best], everything, test, classes))


def _choose(strengths: np.ndarray, fit: Pair, held: Pair, classes: int, metric: str) -> float:
    """The smallest C that does best on what was held out."""
    values = [value_of(metric, scores, held[1]) for scores in _path(strengths, fit, held[0], classes)]
    return float(strengths[int(np.argmax(values))])


def _path(strengths: Iterable[float], train: Pair, test: np.ndarray, classes: int) -> Iterator[np.ndarray]:
    """Class scores of `test` for each C in turn, each fit starting from the one before."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train[0])
    features, test, labels = scaler.transform(train[0]), scaler.transform(test), train[1]
    logistic = LogisticRegression(max_iter=500, warm_start=True)
    for strength in strengths:
        logistic.set_params(C=strength)
        model: Any = OneVsRestClassifier(logistic) if labels.ndim == 2 else logistic
        found = model.fit(features, labels).decision_function(test)
        if labels.ndim == 2:
            yield found
            continue
        if found.ndim == 1:  # two classes
            found = np.stack([-found, found], axis=1)
        scores = np.full((len(test), classes), -np.inf)
        scores[:, model.classes_] = found
        yield scores


def _hold_out(train: Pair, seed: int) -> tuple[Pair, Pair]:
    from sklearn.model_selection import train_test_split

    features, labels = train
    try:
        fit, held, y, held_y = train_test_split(
            features, labels, test_size=HELD_OUT, random_state=seed, stratify=labels if labels.ndim == 1 else None
        )
    except ValueError as error:
        raise UsageError(f"linear probe: no fifth of each class can be held out to choose C: {error}") from None
    return (fit, y), (held, held_y)

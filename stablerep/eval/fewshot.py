"""Few-shot classification on frozen features: N-way k-shot episodes, a small classifier each."""

from collections.abc import Callable, Iterator

import numpy as np

from stablerep.eval.score import Score, over_repetitions
from stablerep.runtime.errors import UsageError


def fewshot(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    way: int,
    shot: int,
    queries: int,
    episodes: int,
    seed: int,
    classifier: str = "logistic",
) -> Score:
    """Mean top-1 accuracy over episodes, in percent, with its 95 % interval.

    `features` [N, D] float and `labels` [N] int are of one split: an episode draws `way` classes of it, and of each `shot`
    pictures to learn from and `queries` others to be judged on. The interval is Student's over episodes, as is usual: it
    says how far other episodes of the same pictures would move the mean, not what other pictures would.

    - `logistic`: multinomial logistic regression (L2, C = 1) on L2-normalised features, as the official code of Tian et al.
      (arXiv 2003.11539; github.com/WangYueFt/rfs, eval/meta_eval.py);
    - `prototype`: the nearest class mean, after the features were centred on the mean of the learnt-from pictures and
      L2-normalised (SimpleShot, arXiv 1911.04623; El Banani et al., arXiv 2302.05496).

    Raises UsageError where too few classes have enough pictures.
    """
    from threadpoolctl import threadpool_limits

    check(way, shot, queries, episodes, classifier)
    predict = CLASSIFIERS[classifier]
    truth, answers = np.repeat(np.arange(way), shot), np.repeat(np.arange(way), queries)
    accuracies = []
    with threadpool_limits(1):  # small matrices: threads only get in each other's way
        for support, query in draw_episodes(labels, way=way, shot=shot, queries=queries, episodes=episodes, seed=seed):
            found = predict(features[support.ravel()], truth, features[query.ravel()])
            accuracies.append(100 * float((found == answers).mean()))
    setting = {"way": way, "shot": shot, "queries": queries, "classifier": classifier}
    return over_repetitions(accuracies, "top-1", episodes, setting)


def check(way: int, shot: int, queries: int, episodes: int, classifier: str) -> None:
    """Raise UsageError on a value that no data set fits."""
    if classifier not in CLASSIFIERS:
        raise UsageError(f"few-shot: classifier {classifier} is none of {', '.join(CLASSIFIERS)}")
    if min(shot, queries, episodes) < 1 or way < 2:
        raise UsageError("few-shot: way must be at least 2; shot, queries and episodes at least 1")


def draw_episodes(
    labels: np.ndarray, *, way: int, shot: int, queries: int, episodes: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to learn from [way, shot] and rows to be judged on [way, queries] of each episode; a pure function of the
    arguments, whatever the encoder: two encoders see the same episodes. Raises UsageError."""
    rows = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    rows = [r for r in rows if len(r) >= shot + queries]
    if len(rows) < way:
        raise UsageError(
            f"few-shot: {len(rows)} classes have the {shot + queries} pictures that an episode takes of a class, and {way} "
            "classes are asked for: lower way, shot or queries"
        )
    random = np.random.default_rng(seed)
    for _ in range(episodes):
        chosen = random.choice(len(rows), way, replace=False)
        drawn = np.stack([random.choice(rows[c], shot + queries, replace=False) for c in chosen])
        yield drawn[:, :shot], drawn[:, shot:]


def _logistic(support: np.ndarray, truth: np.ndarray, query: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    found: np.ndarray = LogisticRegression(C=1.0, max_iter=1000).fit(normalize(support), truth).predict(normalize(query))
    return found


def _prototype(support: np.ndarray, truth: np.ndarray, query: np.ndarray) -> np.ndarray:
    from sklearn.neighbors import NearestCentroid
    from sklearn.preprocessing import normalize

    centre = support.mean(axis=0)
    found: np.ndarray = NearestCentroid().fit(normalize(support - centre), truth).predict(normalize(query - centre))
    return found


CLASSIFIERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "logistic": _logistic,
    "prototype": _prototype,
}

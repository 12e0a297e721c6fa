"""Linear probe for small sets: L2-regularised logistic regression (scikit-learn's L-BFGS), C chosen on a held-out
fifth of the training labels, then refitted on all of them."""

import numpy as np

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, seed: int) -> float:
    """Top-1 accuracy in percent of a probe on features [N, D]; the test split chooses nothing."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    fit, held, y, held_y = train_test_split(train, labels, test_size=0.2, random_state=seed, stratify=labels)
    with warnings.catch_warnings(), threadpool_limits(1):  # small matrices: threads only get in each other's way
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = [LogisticRegression(C=c, max_iter=500).fit(fit, y).score(held, held_y) for c in STRENGTHS]
        best = STRENGTHS[int(np.argmax(scores))]
        return 100 * float(LogisticRegression(C=best, max_iter=1000).fit(train, labels).score(test, test_labels))

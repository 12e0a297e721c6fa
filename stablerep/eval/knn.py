"""Weighted k-nearest-neighbour classifier on cosine similarity (Wu et al., arXiv 1805.01978)."""

import numpy as np


def knn_probe(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy in percent on features [N, D]; each neighbour votes with exp(similarity / temperature)."""
    k = min(k, len(train))
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    similarity = test @ train.T
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    weight = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
    votes = np.zeros((len(test), int(labels.max()) + 1))
    for column in range(k):
        np.add.at(votes, (np.arange(len(test)), labels[nearest[:, column]]), weight[:, column])
    return 100 * float((votes.argmax(1) == test_labels).mean())

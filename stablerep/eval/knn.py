"""Weighted k-nearest-neighbour classifier on cosine similarity (Wu et al., arXiv 1805.01978, section 3.4)."""

import numpy as np
import torch

SIMILARITIES = 1 << 28  # held at once


def neighbours(train: np.ndarray, test: np.ndarray, k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities float32 [N, k] and rows int64 [N, k] of the k training features nearest to each of N test features,
    nearest first; k is at most the number of training features."""
    bank = torch.nn.functional.normalize(torch.from_numpy(train).to(device))
    found = []
    for chunk in torch.from_numpy(test).split(max(1, SIMILARITIES // len(train))):
        similarity = torch.nn.functional.normalize(chunk.to(device)) @ bank.T
        found.append([x.cpu().numpy() for x in similarity.topk(min(k, len(train)), dim=1)])
    return np.concatenate([s for s, _ in found]), np.concatenate([i for _, i in found])


def votes(similarity: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Class scores float64 [N, C]: each neighbour gives exp(similarity / temperature) to its class, or to each of them.

    similarity [N, k]; labels of the neighbours int [N, k], or [N, k, C] of 0 and 1.
    """
    weight = np.exp(similarity.astype(np.float64) / temperature)
    if labels.ndim == 3:
        return np.einsum("nk,nkc->nc", weight, labels)
    scores = np.zeros((len(labels), classes))
    for column in range(labels.shape[1]):
        np.add.at(scores, (np.arange(len(labels)), labels[:, column]), weight[:, column])
    return scores

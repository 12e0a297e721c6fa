"""Randomness without state: every number is a pure function of a key and a position, whoever computes it, and when."""

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive(*words: object) -> int:
    """A 63-bit key from any words, stable over Python versions and processes."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "big") >> 1


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): uint64 to uint64, every bit depending on every bit."""
    x = values.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashes(key: int, positions: np.ndarray, count: int) -> np.ndarray:
    """`count` random uint64 for each position [N]: uint64 [N, count]."""
    at = positions.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    return mix(np.uint64(key) + at * GOLDEN)


def uniforms(key: int, positions: np.ndarray, count: int) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each position [N]: float64 [N, count]."""
    return (hashes(key, positions, count) >> np.uint64(11)) * 2.0**-53


def orders(key: int, positions: np.ndarray, count: int) -> np.ndarray:
    """A random order of 0 .. count - 1 for each position [N]: int64 [N, count]."""
    return np.argsort(hashes(key, positions, count), axis=1, kind="stable")


def permute(key: int, positions: np.ndarray, size: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0 .. size - 1 takes `positions`: int64, without storing the permutation.

    A Feistel network on pairs (left, right) of a rectangle just larger than `size`, adding modulo its sides; a result
    outside goes round again (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    width = int(np.ceil(np.sqrt(size)))
    height = -(-size // width)
    x = positions.astype(np.uint64)
    outside = np.ones(len(x), dtype=bool)
    while outside.any():
        left, right = np.divmod(x[outside], np.uint64(width))
        for turn in range(4):
            left = (left + mix(right + np.uint64(derive(key, turn, "left"))) % np.uint64(height)) % np.uint64(height)
            right = (right + mix(left + np.uint64(derive(key, turn, "right"))) % np.uint64(width)) % np.uint64(width)
        x[outside] = left * np.uint64(width) + right
        outside = x >= size
    return x.astype(np.int64)

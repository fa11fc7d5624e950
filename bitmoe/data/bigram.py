"""Bigram entropy: what a model must beat to have learnt more than pairs of tokens.

It is the empirical conditional entropy of the held-out text itself, so no bigram model, however trained, has
a lower loss on that text.
"""

import numpy as np


def bigram_entropy(tokens: np.ndarray) -> float:
    """Return H(x_t | x_{t-1}) = -sum over pairs (a, b) of n_ab / N * ln(n_ab / n_a), in nats per token.

    Args:
        tokens: ids, integer [..., T] with T >= 2; pairs are formed along the last axis only.

    Raises:
        ValueError: no pairs.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    previous, following = ids[..., :-1].ravel(), ids[..., 1:].ravel()
    if previous.size == 0:
        raise ValueError(f"tokens of shape {ids.shape} hold no pair")
    vocabulary = int(ids.max()) + 1
    pairs, pair_counts = np.unique(previous * vocabulary + following, return_counts=True)
    first_counts = np.bincount(previous)[pairs // vocabulary]
    return float(np.sum(pair_counts * np.log(first_counts / pair_counts)) / previous.size)

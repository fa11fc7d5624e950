"""Blending by weight: which part the n-th sample comes from.

Shares are rational, so the sequence of parts repeats after a cycle and any sample is found in O(1), with no
state. Within a cycle the parts are spread by Tijdeman's solution of the chairman assignment problem (R.
Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980, pp. 323-330): after every n
samples each part has been drawn within one sample of its share of n. Always drawing the part that lags most
(plain error diffusion) does not always keep that bound.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from bitmoe.config.errors import InputError

LONGEST_CYCLE = 10_000


class Blend:
    """Maps sample numbers to parts and to sample numbers within the part.

    Args:
        weights: positive weight of each part; shares are exact if their common denominator is at most
            ``LONGEST_CYCLE``, else rounded to multiples of 1 / ``LONGEST_CYCLE``.

    Raises:
        InputError: a weight so small that its share rounds to nothing.
    """

    def __init__(self, weights: Sequence[float]):
        self.counts = cycle_counts(weights)
        if self.counts.min() == 0:
            smallest = min(weights)
            raise InputError(
                f"weight {smallest} is less than 1/{LONGEST_CYCLE} of the sum of weights",
                fix="raise it or leave its path out",
                key="data.weights",
            )
        self._cycle = spread(self.counts)
        self._rank = np.zeros(len(self._cycle), dtype=np.int64)
        for part, count in enumerate(self.counts):
            self._rank[self._cycle == part] = np.arange(count)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return part [B] and sample number within that part [B] of global sample numbers [B]."""
        cycles, places = np.divmod(samples, len(self._cycle))
        parts = self._cycle[places]
        return parts, cycles * self.counts[parts] + self._rank[places]


def cycle_counts(weights: Sequence[float]) -> np.ndarray:
    """Return how often each part is drawn in one cycle, int64 [parts]; the cycle's length is their sum."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = lcm(*(share.denominator for share in shares))
    if length > LONGEST_CYCLE:
        # Largest remainders get what rounding down leaves.
        length = LONGEST_CYCLE
        floors = [int(share * length) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda part: floors[part] - shares[part] * length)
        for part in by_remainder[: length - sum(floors)]:
            floors[part] += 1
        return np.array(floors, dtype=np.int64)
    return np.array([int(share * length) for share in shares], dtype=np.int64)


def spread(counts: np.ndarray) -> np.ndarray:
    """Return a cycle of parts, int64 [sum(counts)], in which part p stands ``counts[p]`` times, evenly.

    At step n a part may be drawn if it lags by at least 1/(2P-2); of those, the one that would soonest lag
    too far if it were not drawn. All in integers: lags times the length, bounds times 2P-2.
    """
    length, slack = int(counts.sum()), max(1, 2 * len(counts) - 2)
    drawn = np.zeros_like(counts)
    cycle = np.empty(length, dtype=np.int64)
    for n in range(length):
        lag = counts * (n + 1) - drawn * length
        deadline = (length * (slack - 1) - lag * slack) / counts
        part = int(np.argmin(np.where(lag * slack >= length, deadline, np.inf)))
        drawn[part] += 1
        cycle[n] = part
    return cycle

"""Fixed-length windows over the concatenated documents of token spans.

Window ``i`` of a span holds its tokens ``[i * S, i * S + S]``: S + 1 tokens, of which the first S are inputs
and the last S labels. Neighbours share one token, so every token but the first is a label exactly once.
"""

# Legend: S = seq_length, B = windows read at once.

from collections.abc import Sequence

import numpy as np

from bitmoe.data.token_data import TokenSpan
from bitmoe.data.token_files import open_token_file


class Windows:
    """The windows of several spans, numbered span by span.

    Args:
        spans: stretches of token files.
        seq_length: tokens of a training sequence, S.
    """

    def __init__(self, spans: Sequence[TokenSpan], seq_length: int):
        self.seq_length = seq_length
        self._tokens = [open_token_file(span.prefix).tokens[span.start : span.stop] for span in spans]
        self.counts = np.array([max(0, span.tokens - 1) // seq_length for span in spans], dtype=np.int64)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Return windows, int64 [B, S + 1], for window numbers [B] in [0, len)."""
        out = np.empty((len(numbers), self.seq_length + 1), dtype=np.int64)
        spans = np.searchsorted(self._ends, numbers, side="right")
        places = (numbers - (self._ends - self.counts)[spans]) * self.seq_length
        for row, (span, place) in enumerate(zip(spans, places, strict=True)):
            out[row] = self._tokens[span][place : place + self.seq_length + 1]
        return out

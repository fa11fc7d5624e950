"""What preparation hands to training: which tokens of which files are for training and which are held out."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from bitmoe.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenSpan:
    """A contiguous stretch of one token file: tokens [start, stop)."""

    prefix: Path
    start: int
    stop: int
    documents: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class TokenPart:
    """One entry of ``data.path``, the standard library or a hub dataset."""

    name: str
    train: TokenSpan
    eval: TokenSpan
    text_bytes: int | None
    """UTF-8 bytes of the text of both spans; None for token files made elsewhere."""
    fingerprint: str
    """SHA-256 that changes with the tokens."""


@dataclass(frozen=True)
class TokenData:
    """All parts, how they are blended, and the tokenizer they were made with."""

    parts: tuple[TokenPart, ...]
    weights: tuple[float, ...] | None
    """Blend weight of each part; None draws every window once an epoch, so parts count by their size."""
    tokenizer: Tokenizer

    @property
    def train_tokens(self) -> int:
        """Tokens of the training text."""
        return sum(part.train.tokens for part in self.parts)

    @property
    def eval_tokens(self) -> int:
        """Tokens of the held-out text."""
        return sum(part.eval.tokens for part in self.parts)

    @property
    def documents(self) -> int:
        """Documents of both splits."""
        return sum(part.train.documents + part.eval.documents for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides which token stands where; a checkpoint compares it on resume."""
        spans = [[part.fingerprint, part.train.start, part.train.stop, part.eval.stop] for part in self.parts]
        return hashlib.sha256(json.dumps([spans, self.weights, self.tokenizer.fingerprint]).encode()).hexdigest()

"""Which documents are held out for evaluation.

A document's place in its source alone decides, through a hash: the held-out text is the same for every seed
and run, so that evaluation losses can be compared. Both splits always get something: the last document fills
a split that got none, and a single document is cut in two.
"""

import hashlib
from collections.abc import Iterable, Iterator

TRAIN, EVAL = "train", "eval"


def assign_splits(documents: Iterable[str], eval_fraction: float) -> Iterator[tuple[str, str]]:
    """Yield ``(TRAIN or EVAL, document)`` for each document, in order, one document behind.

    Args:
        documents: texts, none empty.
        eval_fraction: share of documents held out, between 0 and 1.
    """
    used, held = set(), None
    for index, text in enumerate(documents):
        if held is not None:
            used.add(held[0])
            yield held
        held = (EVAL if _uniform(index) < eval_fraction else TRAIN, text)
    if held is None:
        return
    if not used:
        yield from _cut(held[1], eval_fraction)
    elif used | {held[0]} == {TRAIN, EVAL}:
        yield held
    else:
        yield (EVAL if held[0] == TRAIN else TRAIN, held[1])


def _cut(text: str, eval_fraction: float) -> Iterator[tuple[str, str]]:
    """Hold out the end of the only document, from the start of a line where there is one near."""
    size = max(1, round(len(text) * eval_fraction))
    line = text.find("\n", len(text) - size, len(text) - size // 2)
    place = line + 1 if line >= 0 else len(text) - size
    yield from ((split, part) for split, part in ((TRAIN, text[:place]), (EVAL, text[place:])) if part)


def _uniform(index: int) -> float:
    """A hash of the index as a number in [0, 1)."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64

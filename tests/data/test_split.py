"""Held-out documents: shares, independence of what follows, and never an empty split."""

import pytest

from bitmoe.data.split import EVAL, TRAIN, assign_splits


def split(documents, fraction=0.1):
    return list(assign_splits(documents, fraction))


def test_assign_splits_share_and_order():
    documents = [str(i) for i in range(5000)]
    assigned = split(documents)
    assert [text for _, text in assigned] == documents
    held_out = sum(name == EVAL for name, _ in assigned)
    # Binomial: 500 expected, standard deviation 21.
    assert 400 < held_out < 600


def test_assign_splits_depends_on_the_place_alone():
    assert split(map(str, range(200)))[:150] == split(map(str, range(151)))[:150]


@pytest.mark.parametrize("count", range(2, 6))
@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_assign_splits_fills_both(count, fraction):
    documents = [str(i) for i in range(count)]
    assigned = split(documents, fraction)
    assert {name for name, _ in assigned} == {TRAIN, EVAL}
    assert [text for _, text in assigned] == documents


def test_assign_splits_cuts_a_single_document_at_a_line():
    lines = [f"line {i:03}\n" for i in range(100)]
    train, held_out = split(["".join(lines)], 0.105)
    assert train == (TRAIN, "".join(lines[:90]))
    assert held_out == (EVAL, "".join(lines[90:]))


def test_assign_splits_of_little():
    assert split([]) == []
    assert split(["ab"]) == [(TRAIN, "a"), (EVAL, "b")]
    assert len(split(["a"])) == 1

"""Imports without the garbage collector."""

import gc
import importlib
import sys

import pytest

from bitmoe.train.imports import imports

MODULE = "this"


@pytest.fixture(autouse=True)
def collector(monkeypatch, capsys):
    """As it was, afterwards: frozen objects of this process stay frozen."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    yield frozen
    gc.enable()


def test_what_was_imported_is_not_searched_again(collector):
    with imports():
        assert not gc.isenabled()
        importlib.import_module(MODULE)
    assert collector == [False], "frozen once, and before the collector is back: it would search everything first"
    assert gc.isenabled()


def test_nothing_is_frozen_where_nothing_was_imported(collector):
    with imports():
        pass
    assert (collector, gc.isenabled()) == ([], True)


def test_an_import_that_fails_leaves_the_collector_on(collector):
    with pytest.raises(ModuleNotFoundError), imports():
        importlib.import_module("there_is_no_such_module")
    assert gc.isenabled()


def test_who_turned_it_off_finds_it_off(collector):
    gc.disable()
    with imports():
        importlib.import_module(MODULE)
    assert not gc.isenabled()

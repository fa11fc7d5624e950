"""The project's Python files, parsed once for all architecture tests."""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Source(NamedTuple):
    """One file: its path from the repository root, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module


@pytest.fixture(scope="session")
def source():
    """``source(path, text)`` is a file that does not exist: the bad example of a rule."""
    return lambda path, text: Source(path, text, ast.parse(text))


@pytest.fixture(scope="session")
def all_sources(source):
    """Every Python file of the repository's own folders, tests included."""
    folders = ("bitmoe", "kernels", "tools", "tests")
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    assert files, f"no Python files under {ROOT}"
    return [source(f.relative_to(ROOT).as_posix(), f.read_text(encoding="utf-8")) for f in [*files, ROOT / "setup.py"]]


@pytest.fixture(scope="session")
def sources(all_sources):
    """Every Python file but the tests."""
    return [s for s in all_sources if not s.path.startswith("tests/")]

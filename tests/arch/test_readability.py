"""Small files that explain themselves: sizes, docstrings, ASCII, names."""

import ast

import pytest

MAX_LINES = 400
MAX_LINES_KERNELS_AND_TESTS = 500


def file_size(source):
    """A file is read in one sitting."""
    roomy = source.path.startswith(("kernels/", "tests/"))
    limit = MAX_LINES_KERNELS_AND_TESTS if roomy else MAX_LINES
    lines = source.text.count("\n")
    if lines > limit:
        yield f"{source.path}: {lines} lines, the limit is {limit}"


def docstrings(source):
    """Every module says what it is; so do public functions and classes, but for tests."""
    if not ast.get_docstring(source.tree):
        yield f"{source.path}: no module docstring"
    if source.path.startswith("tests/"):
        return
    for node in source.tree.body:
        is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{source.path}:{node.lineno}: {node.name} has no docstring"


def ascii_only(source):
    """What a terminal shows is what the file holds."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            yield f"{source.path}:{number}: not ASCII: {ascii(line.strip())}"


def no_utils(source):
    """A file is named after its topic."""
    if source.path.rpartition("/")[2] in ("utils.py", "helpers.py", "misc.py"):
        yield f"{source.path}: name the topic"


def exports_only(source):
    """An __init__.py holds a docstring, imports and constants: code stands in files named after it."""
    if source.path.endswith("__init__.py"):
        for node in source.tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.Expr):
                yield f"{source.path}:{node.lineno}: code in an __init__.py"


RULES = [file_size, docstrings, ascii_only, no_utils, exports_only]

BAD = [
    (file_size, "bitmoe/train/loop.py", "x = 1\n" * 401),
    (file_size, "tests/train/test_loop.py", "x = 1\n" * 501),
    (docstrings, "bitmoe/train/loop.py", "x = 1"),
    (docstrings, "bitmoe/train/loop.py", '"""Loop."""\ndef train(): ...'),
    (docstrings, "bitmoe/train/loop.py", '"""Loop."""\nclass Trainer: ...'),
    (docstrings, "tests/train/test_loop.py", "x = 1"),
    (ascii_only, "bitmoe/train/loop.py", "x = '\u00e9'"),
    (no_utils, "bitmoe/train/utils.py", ""),
    (exports_only, "bitmoe/train/__init__.py", "def f(): ..."),
]

GOOD = [
    (file_size, "kernels/bitmoe_kernels/act_quant/op.py", "x = 1\n" * 401),
    (docstrings, "bitmoe/train/loop.py", '"""Loop."""\ndef _step(): ...'),
    (docstrings, "tests/train/test_loop.py", '"""Loop."""\ndef test_x(): ...'),
    (
        exports_only,
        "bitmoe/train/__init__.py",
        '"""Train."""\nfrom bitmoe.train.loop import train\n__all__ = ["train"]',
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule, all_sources):
    broken = [what for source in all_sources for what in rule(source)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_rule_catches(rule, path, text, source):
    assert len(list(rule(source(path, text)))) == 1


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_rule_allows(rule, path, text, source):
    assert list(rule(source(path, text))) == []

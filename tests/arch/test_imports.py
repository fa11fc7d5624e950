"""Who may import what: the layers of the house, the one reader of each framework, and no cycles."""

import ast
import os
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

BASE = {"config", "parallel"}
MODEL = BASE | {"bitmoe_kernels", "quant", "layers", "context", "model"}
TOP = MODEL | {"data"}

# What each part may import from the others. A new part gets its line here.
MAY_IMPORT = {
    "config": set(),
    "data": {"config"},
    "parallel": {"config"},
    "bitmoe_kernels": set(),
    "quant": BASE | {"bitmoe_kernels"},
    "layers": BASE | {"bitmoe_kernels", "quant"},
    "context": BASE | {"bitmoe_kernels", "quant"},
    "model": MODEL - {"model"},
    "train": TOP,
    "convert": TOP | {"train", "infer"},
    "infer": {"config", "bitmoe_kernels"},
    "testing": TOP | {"train", "convert", "infer"},
    "__main__": TOP | {"train", "convert", "infer"},
}

# The only places where a module, and what lies under it, may be imported.
ONLY_IN = {
    "hydra": ["bitmoe/__main__.py", "bitmoe/config/*"],
    "omegaconf": ["bitmoe/__main__.py", "bitmoe/config/*"],
    "triton": ["kernels/bitmoe_kernels/*/triton_*.py", "kernels/bench/*"],
    "megatron.core.parallel_state": ["bitmoe/parallel/*"],
    "megatron.core.mpu": ["bitmoe/parallel/*"],
}

# What a part may not import at all.
NEVER = {"config": ["torch", "megatron"], "bitmoe_kernels": ["megatron"]}


def module_name(path):
    """``bitmoe/config/__init__.py`` -> ``bitmoe.config``; kernels are a second root."""
    return path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part_of(module):
    """The part of the house a module belongs to; None for a foreign one and for ``bitmoe`` itself."""
    head, *rest = module.split(".")
    if head == "bitmoe_kernels":
        return head
    return rest[0] if head == "bitmoe" and rest else None


def imported_names(source):
    """The full dotted names a file imports, as (line, name); ``from a import b`` counts as ``a.b``."""
    package = module_name(source.path).split(".")
    if not source.path.endswith("__init__.py"):
        package.pop()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_under(name, module):
    return name == module or name.startswith(module + ".")


def layering(source):
    """Imports go down only."""
    part = part_of(module_name(source.path))
    if part is not None and part not in MAY_IMPORT:
        yield f"{source.path}: {part} is no part of the house; MAY_IMPORT says what there is"
        return
    for line, name in imported_names(source):
        other = part_of(name)
        known = other in MAY_IMPORT and other != part
        if part in MAY_IMPORT and known and other not in MAY_IMPORT[part]:
            yield f"{source.path}:{line}: {part} imports {name}"
        if part in NEVER and any(is_under(name, module) for module in NEVER[part]):
            yield f"{source.path}:{line}: {part} imports {name}"


def one_reader(source):
    """hydra, omegaconf, triton and megatron's parallel_state have their places."""
    for line, name in imported_names(source):
        for module, places in ONLY_IN.items():
            if is_under(name, module) and not any(fnmatch(source.path, place) for place in places):
                yield f"{source.path}:{line}: imports {name}; only {', '.join(places)} may"
    for node in ast.walk(source.tree):
        hidden = isinstance(node, ast.Attribute) and node.attr in ("parallel_state", "mpu")
        if hidden and not source.path.startswith("bitmoe/parallel/"):
            yield f"{source.path}:{node.lineno}: reads .{node.attr}; only bitmoe/parallel/ may"


def cycle(sources):
    """The first import cycle among our modules, imports inside functions included; None if there is none."""
    own = {module_name(s.path): s for s in sources}
    graph = {}
    for module, source in own.items():
        imported = set()
        for _, name in imported_names(source):
            # `from package import name`: the module of that name if there is one, else the package itself.
            target = name if name in own else name.rpartition(".")[0]
            if target in own and target != module:
                imported.add(target)
        graph[module] = imported
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " imports ".join(reversed(error.args[1]))
    return None


RULES = [layering, one_reader]

BAD = [
    (layering, "bitmoe/config/schema.py", "import torch.nn"),
    (layering, "bitmoe/config/schema.py", "from bitmoe.data import tokens"),
    (layering, "bitmoe/config/schema.py", "from bitmoe import data"),
    (layering, "bitmoe/layers/experts.py", "def f():\n    from ..model.build import build"),
    (layering, "bitmoe/layers/experts.py", "from bitmoe.context.rope import rope"),
    (layering, "bitmoe/data/blend.py", "import bitmoe.parallel.topology"),
    (layering, "bitmoe/model/build.py", "from bitmoe.train.loop import train"),
    (layering, "kernels/bitmoe_kernels/act_quant/op.py", "from bitmoe.quant import policy"),
    (layering, "kernels/bitmoe_kernels/act_quant/op.py", "import megatron.core"),
    (layering, "bitmoe/helpers/strings.py", ""),
    (one_reader, "bitmoe/train/loop.py", "from omegaconf import OmegaConf"),
    (one_reader, "bitmoe/train/loop.py", "import hydra"),
    (one_reader, "bitmoe/train/loop.py", "from megatron.core import parallel_state"),
    (
        one_reader,
        "bitmoe/train/loop.py",
        "from megatron.core.parallel_state import get_tensor_model_parallel_group",
    ),
    (
        one_reader,
        "bitmoe/train/loop.py",
        "import megatron.core as mcore\nmcore.parallel_state.is_initialized()",
    ),
    (one_reader, "kernels/bitmoe_kernels/act_quant/op.py", "import triton.language as tl"),
    (one_reader, "kernels/bitmoe_kernels/act_quant/float8_matmul.py", "import triton"),
]

GOOD = [
    (
        layering,
        "bitmoe/layers/experts.py",
        "from bitmoe.quant.policy import Policy\nfrom .router import Router",
    ),
    (layering, "bitmoe/train/loop.py", "from bitmoe import __version__\nimport torch, megatron.core"),
    (one_reader, "bitmoe/parallel/process_groups.py", "from megatron.core import parallel_state"),
    (one_reader, "kernels/bitmoe_kernels/act_quant/triton_kernels.py", "import triton"),
    (one_reader, "kernels/bitmoe_kernels/norm_quant/triton_backward.py", "import triton"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule, sources):
    broken = [what for source in sources for what in rule(source)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_rule_catches(rule, path, text, source):
    assert len(list(rule(source(path, text)))) == 1


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_rule_allows(rule, path, text, source):
    assert list(rule(source(path, text))) == []


def test_no_import_cycle(sources):
    assert cycle(sources) is None


def test_import_cycle_is_found(source):
    a = source("bitmoe/model/a.py", "from bitmoe.model import b")
    b = source("bitmoe/model/b.py", "def f():\n    from bitmoe.model.c import g")
    c = source("bitmoe/model/c.py", "from .a import h")
    assert cycle([a, b]) is None
    assert cycle([a, b, c]).count(" imports ") == 3


def loaded_by(program):
    """The top-level modules a fresh interpreter has loaded after ``program``."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{program}\nimport sys\nprint(*{{m.partition('.')[0] for m in sys.modules}})",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_config_loads_without_torch(sources):
    modules = [module_name(s.path) for s in sources if part_of(module_name(s.path)) == "config"]
    loaded = loaded_by(f"import {', '.join(['bitmoe', *modules])}")
    assert not loaded & {"torch", "megatron", "datasets", "transformers", "matplotlib"}


def test_kernels_load_without_bitmoe(sources):
    modules = [module_name(s.path) for s in sources if fnmatch(s.path, "kernels/bitmoe_kernels/*")]
    light = [module for module in modules if not module.rpartition(".")[2].startswith("triton_")]
    assert light
    assert not loaded_by(f"import {', '.join(light)}") & {"bitmoe", "megatron", "hydra"}

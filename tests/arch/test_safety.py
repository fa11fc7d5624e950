"""What the code never does: patch megatron-core, build objects from config, run or unpickle its input."""

import ast

import pytest

BANNED_CALLS = {
    "pickle.load": "pickles run code",
    "pickle.loads": "pickles run code",
    "pickle.Unpickler": "pickles run code",
    "yaml.load": "use OmegaConf",
    "yaml.full_load": "use OmegaConf",
    "yaml.unsafe_load": "use OmegaConf",
    "eval": "runs code",
    "exec": "runs code",
    "instantiate": "names map to classes in a registry",
    "hydra.utils.instantiate": "names map to classes in a registry",
    "hydra.utils.call": "names map to functions in a registry",
}
BANNED_KEYWORDS = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True, "shell": True}


def import_aliases(tree):
    """What imported names stand for: ``import a.b as c`` gives c: a.b, ``from a import b`` gives b: a.b."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name.partition(".")[0]
                names |= {alias.asname: alias.name} if alias.asname else {head: head}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node, aliases):
    """The full name of ``a.b.c`` with its imports resolved; "" for any other expression."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def banned_calls(source):
    """No unpickling, no eval, no instantiate, no remote code; torch.load says weights_only=True."""
    aliases = import_aliases(source.tree)
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        where, name = f"{source.path}:{node.lineno}", dotted(node.func, aliases)
        if name in BANNED_CALLS:
            yield f"{where}: {name}: {BANNED_CALLS[name]}"
        keywords = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords}
        for keyword, bad in BANNED_KEYWORDS.items():
            # A value only known at run time may be the bad one.
            if keywords.get(keyword, not bad) in (bad, ...):
                yield f"{where}: {keyword} must be {not bad}"
        if name == "torch.load" and "weights_only" not in keywords:
            yield f"{where}: torch.load without weights_only=True"


def patches(source):
    """megatron-core is extended by specs and subclasses; only the CPU bridge may change its modules."""
    if source.path == "bitmoe/parallel/cpu_bridge.py":
        return
    aliases = import_aliases(source.tree)

    def is_megatron(node):
        return dotted(node, aliases).startswith("megatron.")

    for node in ast.walk(source.tree):
        where = f"{source.path}:{getattr(node, 'lineno', 0)}"
        written = isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load)
        if written and is_megatron(node):
            yield f"{where}: assigns to {dotted(node, aliases)}"
        if isinstance(node, ast.Call) and dotted(node.func, aliases) == "setattr" and is_megatron(node.args[0]):
            yield f"{where}: setattr on {dotted(node.args[0], aliases)}"


def one_translation(source):
    """One file translates our config to megatron-core's."""
    place = "bitmoe/model/transformer_config.py"
    for node in ast.walk(source.tree):
        called = dotted(node.func, {}) if isinstance(node, ast.Call) else ""
        if called.endswith("TransformerConfig") and source.path != place:
            yield f"{source.path}:{node.lineno}: only {place} makes a TransformerConfig"


def asserts(source):
    """Bad input raises InputError, a broken invariant an error that says which: python -O drops asserts."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert):
            yield f"{source.path}:{node.lineno}: assert outside tests"


RULES = [banned_calls, patches, one_translation, asserts]

BAD = [
    (banned_calls, "import pickle\npickle.load(f)"),
    (banned_calls, "from pickle import loads as parse\nparse(b)"),
    (banned_calls, "import torch\ntorch.load(f)"),
    (banned_calls, "import torch as t\nt.load(f, weights_only=False)"),
    (banned_calls, "import torch\ntorch.load(f, weights_only=flag)"),
    (banned_calls, "import numpy as np\nnp.load(f, allow_pickle=True)"),
    (banned_calls, "load_dataset(name, trust_remote_code=True)"),
    (banned_calls, "import yaml\nyaml.load(f)"),
    (banned_calls, "import subprocess\nsubprocess.run(line, shell=True)"),
    (banned_calls, "eval(text)"),
    (banned_calls, "exec(text)"),
    (banned_calls, "import hydra\nhydra.utils.instantiate(c)"),
    (banned_calls, "from hydra.utils import instantiate\ninstantiate(c)"),
    (patches, "from megatron.core.transformer.moe import moe_utils\nmoe_utils.te_general_gemm = None"),
    (patches, "import megatron.core.optimizer as o\no.x.y += 1"),
    (patches, "import megatron.core\nsetattr(megatron.core.utils, 'f', g)"),
    (patches, "from megatron.core.transformer.mlp import MLP\nMLP.forward = f"),
    (patches, "from megatron.core import utils\ndel utils.f"),
    (one_translation, "config = TransformerConfig(num_layers=2)"),
    (one_translation, "config = mcore.MLATransformerConfig(num_layers=2)"),
    (asserts, "assert x > 0"),
]

GOOD = [
    (banned_calls, "import torch\nmodel.eval()\ntorch.load(f, weights_only=True)\npickle.dumps(x)"),
    (
        patches,
        "from megatron.core.transformer import TransformerConfig as C\nconfig = make()\nconfig.x = C.y",
    ),
    (one_translation, "def f(config: TransformerConfig): ..."),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule, sources):
    broken = [what for source in sources for what in rule(source)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("rule", "text"), BAD)
def test_rule_catches(rule, text, source):
    assert len(list(rule(source("bitmoe/train/loop.py", text)))) == 1


@pytest.mark.parametrize(("rule", "text"), GOOD)
def test_rule_allows(rule, text, source):
    assert list(rule(source("bitmoe/train/loop.py", text))) == []


def test_exceptions_of_the_rules(source):
    patch = "from megatron.core import utils\nutils.f = None"
    assert list(patches(source("bitmoe/parallel/cpu_bridge.py", patch))) == []
    assert list(one_translation(source("bitmoe/model/transformer_config.py", "TransformerConfig()"))) == []

"""``tools/evaluate.py`` with the real lm-eval on a small packed model and local text."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from bitmoe.config.choices import Precision
from bitmoe.config.convert_schema import Packing
from bitmoe.config.schema import Config
from bitmoe.convert.packed_format import write_packed
from bitmoe.data.tokenizer import ByteTokenizer
from bitmoe.testing.saved_model import save_model
from bitmoe.train.sharded_weights import ShardedWeights

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


@pytest.fixture(scope="module")
def model(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    config = Config()
    config.model.vocab_size, config.model.hidden_size, config.model.num_layers = 259, 32, 1
    config.context.seq_length, config.run.precision = 128, Precision.fp32
    config.run.micro_batch_size, config.run.global_batch_size = 2, 2
    source = ShardedWeights(ranks(1).run(save_model, config, folder / "run")[0])
    (folder / "model").mkdir()
    write_packed(source, ByteTokenizer(), folder / "model", Packing["2bit"], lambda name: None)
    return folder / "model"


def evaluate(*arguments):
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_line_for_each_cache(model, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name}{i} = f({i % 7})" for i in range(40)))
    done = evaluate(model, "--text", tmp_path / "a.txt", tmp_path / "b.txt", "--kv-bits", 16, 3)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()[-3:]
    assert "bits/byte" in head
    values = {int(bits): float(bits_per_byte) for bits, bits_per_byte, _ in (line.split() for line in lines)}
    assert values.keys() == {16, 3}
    # A random model spreads its guess over 259 tokens.
    assert all(abs(value - math.log2(259)) < 1 for value in values.values())
    assert values[16] != values[3]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--text", "nowhere.txt"], "cannot read text"), (["--run", "nowhere"], "nowhere is no run")],
    ids=["text", "run"],
)
def test_text_that_is_not_there(model, arguments, said):
    done = evaluate(model, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr

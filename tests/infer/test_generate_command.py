"""``bitmoe generate``: where the prompt comes from, what it prints where, what it refuses, in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from bitmoe.__main__ import main
from bitmoe.config.choices import Precision
from bitmoe.config.convert_schema import Packing
from bitmoe.config.generate_schema import GenerateConfig
from bitmoe.config.schema import Config, MoEConfig
from bitmoe.convert.packed_format import write_packed
from bitmoe.convert.packed_manifest import write_packed_manifest
from bitmoe.data.tokenizer import ByteTokenizer
from bitmoe.infer.generate import generate
from bitmoe.testing.saved_model import save_model
from bitmoe.train.sharded_weights import ShardedWeights


@pytest.fixture(scope="module")
def model(ranks, tmp_path_factory):
    """A random packed mixture of experts with the byte tokenizer and a context of 64."""
    folder = tmp_path_factory.mktemp("generate")
    config = Config(moe=MoEConfig(num_experts=4, ffn_hidden_size=32))
    config.model.vocab_size, config.model.hidden_size, config.model.num_layers = 259, 32, 2
    config.context.seq_length, config.run.precision = 64, Precision.fp32
    config.run.micro_batch_size, config.run.global_batch_size = 2, 2
    source = ShardedWeights(ranks(1).run(save_model, config, folder / "run")[0])
    (folder / "model").mkdir()
    digests = write_packed(source, ByteTokenizer(), folder / "model", Packing["2bit"], lambda name: None)
    write_packed_manifest(folder / "model", digests)
    return folder / "model"


def bitmoe_generate(*arguments, stdin=""):
    command = [sys.executable, "-m", "bitmoe", "generate", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def greedy(model, prompt, tokens):
    """What transformers generates."""
    from transformers import AutoModelForCausalLM

    import bitmoe.infer  # noqa: F401 (registers the packed model)

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = AutoModelForCausalLM.from_pretrained(model).generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_prompt_of_any_characters_is_continued(model):
    prompt = "def f(x, [y]): # {z} = 'a'"
    done = bitmoe_generate(f"source={model}", "temperature=0", "max_new_tokens=12", "--prompt", prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout == greedy(model, prompt, 12) + "\n"
    assert "tokens/s" in done.stderr


def test_the_prompt_is_read_from_a_file_or_from_standard_input(model, tmp_path, capsys, monkeypatch):
    settings = {"source": str(model), "temperature": 0.0, "max_new_tokens": 8, "device": "cpu"}
    (tmp_path / "prompt.txt").write_text("import ")
    generate(GenerateConfig(**settings, prompt_file=str(tmp_path / "prompt.txt")))
    from_file = capsys.readouterr().out
    with open(tmp_path / "prompt.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        generate(GenerateConfig(**settings))
    assert from_file == capsys.readouterr().out == greedy(model, "import ", 8) + "\n"


def test_draws_depend_on_the_seed_alone(model, capsys):
    def text(seed):
        generate(GenerateConfig(source=str(model), max_new_tokens=20, seed=seed, device="cpu"), "a")
        return capsys.readouterr().out

    first = text(1)
    torch.rand(3)
    assert text(1) == first != text(2)


def test_generation_ends_with_the_context(model, capsys):
    generate(GenerateConfig(source=str(model), temperature=0.0, device="cpu"), "a" * 60)
    assert "(4 new" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "source: it has no value"),
        (["source=nowhere"], "nowhere holds no config.json"),
        (["kv_bits=5"], "kv_bits: 5"),
        (["top_p=0"], "top_p: 0.0"),
        (["prompt_file=nowhere.txt"], "cannot read nowhere.txt"),
        (["--prompt"], "--prompt without a text"),
        (["--prompt", "a" * 64], "the prompt has 64 tokens, the context 64"),
        (["--prompt="], "the prompt has 0 tokens"),
        (["max_new_token=3"], "max_new_tokens"),
    ],
    ids=lambda value: value[-1][:16] if isinstance(value, list) and value else None,
)
def test_bad_input_is_refused(model, arguments, said, capsys):
    source = [f"source={model}"] if arguments and "source=" not in arguments[0] else []
    assert main(["generate", *source, *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_damaged_model_is_refused(model, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(settings | {"o_keep": 0.25}))
    assert main(["generate", f"source={broken}", "--prompt", "a"]) == 2
    printed = capsys.readouterr()
    assert "config.json has" in printed.err
    assert printed.out == ""

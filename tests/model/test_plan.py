"""``bitmoe plan`` as its reader meets it: complete, quick, without torch, and clear about what cannot work."""

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from bitmoe.config.compose import compose
from bitmoe.config.help import group_choices
from bitmoe.config.locate import config_dir
from bitmoe.config.validate import problems
from bitmoe.data.tokenizer import ByteTokenizer
from bitmoe.model.plan import _short, plan
from bitmoe.model.sizes import BYTE_VOCAB_SIZE

ROOT = Path(__file__).parents[2]
EXPERIMENTS = group_choices(config_dir())["experiment"]


def planned(overrides, world_size, width=200):
    """Exit status and printed text."""
    out = io.StringIO()
    status = plan(compose(overrides), world_size, Console(file=out, width=width, highlight=False, markup=False))
    return status, out.getvalue()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_a_plan_that_fits_the_screen(experiment):
    overrides = [f"experiment={experiment}"]
    status, text = planned(overrides, compose(overrides).parallel.smallest_world_size, width=80)
    assert status == 0
    assert text.splitlines()[-1].startswith(tuple("123456789"))
    assert "parameters" in text.splitlines()[-1]
    assert len(text.splitlines()) < 45


def test_what_a_plan_says():
    status, text = planned(["experiment=moe_e64k6", "parallel.pipeline=2", "run.recompute=full"], 1024)
    assert status == 2
    status, text = planned(["experiment=moe_e64k6", "parallel.pipeline=2", "run.global_batch_size=4096"], 1024)
    assert status == 0
    rows = re.sub(r" {2,}", " | ", text)
    for row in (
        "without embedding and head | 13,959,974,912 | 1,916,168,192",
        "first stage, GiB | last stage, GiB",
        "attention ranks | tensor 1 x data 512 x pipeline 2",
        "expert ranks | expert-tensor 1 x expert 8 x expert-data 64 x pipeline 2",
        "a step | 16,777,216 tokens, 220 PFLOP",
        "data 512 x 2 micro-batches x 4 sequences x 4,096 tokens",
        "3.5 GiB at 2 bits, 2.9 GiB at 1.6 bits a ternary weight",
    ):
        assert row in rows
    assert "14.1B parameters, 2.05B active, on 1,024 ranks" in text


@pytest.mark.parametrize(
    ("count", "text"), [(875_648, "875,648"), (2_058_368, "2.06M"), (999_949_999, "1B"), (14_091_046_912, "14.1B")]
)
def test_short_counts(count, text):
    assert _short(count) == text


def test_what_a_model_can_be_converted_to():
    rows = re.sub(r" {2,}", " | ", planned(["experiment=b158_swiglu_700m"], 1)[1])
    assert "exports | bitmoe | yes" in rows
    assert "hf | yes, as BitNetForCausalLM" in rows
    assert "gguf | model.tie_embeddings=false: " in rows
    assert "gguf i2_s | model.activation=swiglu: " in rows
    rows = re.sub(r" {2,}", " | ", planned(["experiment=moe_1b_e8k2"], 8)[1])
    assert re.search(r"hf \| moe.num_experts=8: .*; 2 more reasons", rows)


def test_an_unquantized_model_has_no_codes():
    text = planned(["quant=none"], 2)[1]
    assert "ternary codes" not in text
    assert "for inference" not in text


BAD = [
    ["parallel.tensor=3"],
    ["parallel.expert=5", "parallel.pipeline=3"],
    ["moe.router_topk=9", "parallel.sequence=false", "quant.groups=3"],
    ["model.hidden_size=-1"],
    ["model.num_attention_heads=0", "run.steps=0"],
]


@pytest.mark.parametrize("overrides", BAD, ids=" ".join)
def test_every_reason_is_listed_with_its_fix(overrides):
    reasons = problems(compose(overrides), 7)
    status, text = planned(overrides, 7)
    assert status == 2
    assert reasons
    flat = " ".join(text.split())
    for reason in reasons:
        assert " ".join(str(reason).split()) in flat
    assert re.findall(r"^(\d+)\.", text, re.MULTILINE) == [str(n) for n in range(1, len(reasons) + 1)]


def test_vocabulary_by_tokenizer():
    assert ByteTokenizer.vocab_size == BYTE_VOCAB_SIZE
    assert f"{320 * 128:,}" in planned([], 2)[1]
    assert f"{8192 * 128:,}" in planned(["tokenizer=bpe"], 2)[1]
    status, text = planned(["tokenizer=file"], 2)
    assert status == 2
    assert "model.vocab_size" in text
    assert f"{32000 * 128:,}" in planned(["tokenizer=file", "model.vocab_size=32000"], 2)[1]


def test_a_thousand_ranks_are_planned_in_seconds_without_torch(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "bitmoe", "plan", "experiment=moe_e64k6", "run.nproc=1024"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": path}
    start = time.monotonic()
    done = subprocess.run(
        [*command, "run.global_batch_size=4096"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert time.monotonic() - start < 10
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "bitmoe.model.plan" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "megatron", "numpy", "transformers")}
    assert list(tmp_path.iterdir()) == []

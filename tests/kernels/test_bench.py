"""``kernels/bench``: checks catch what is wrong, baselines compute what they say, shapes are the presets'."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bitmoe.config.compose import compose

FOLDER = Path(__file__).parents[2] / "kernels" / "bench"


@pytest.fixture
def bench(monkeypatch):
    """``bench(name)`` is a module of the folder, imported as its scripts import it."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def small_inputs(bench, num_tokens=64):
    linears, shapes = bench("linears"), bench("shapes")
    small = shapes.linear_shapes(shapes.DenseLayer(64, 128))
    # torchao's kernels and FP8 by row are for GPUs, where there is one.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: linears.make_inputs(name, num_tokens, device, shapes=small) for name in small}


def test_shapes_are_those_of_the_presets(bench):
    presets = {"700M": "700m", "1.3B": "1.3b_aligned", "3B": "3b_aligned", "7B": "7b"}
    shapes = bench("shapes")
    assert shapes.DENSE_LAYERS.keys() == presets.keys()
    for size, preset in presets.items():
        model = compose([f"model={preset}"]).model
        assert shapes.DENSE_LAYERS[size] == (model.hidden_size, model.ffn_hidden_size)
    assert shapes.ALL_BASELINES in shapes.LINEAR_RUNS
    assert {size for size, _ in shapes.LINEAR_RUNS} == presets.keys()


def test_flops(bench):
    shapes = bench("shapes")
    assert shapes.linear_flops(shapes.DenseLayer(2, 3), 5) == 6 * 5 * (4 * 2 * 2 + 3 * 2 * 3)
    layer = shapes.MoELayer(8, 2, 3, 4, 5)
    assert (layer.num_rows, layer.flops) == (20, 3 * 3 * 2 * 20 * 2 * 3)
    assert layer.title == "8x(2,3) top-4, 5 tokens"


def test_share_of_floor(bench):
    shapes = bench("shapes")
    assert shapes.share_of_floor(2.0, 989e9, 1.0) == 0.5
    assert shapes.share_of_floor(1.0, 1979e9, 0.0) == 1.0
    # Weight gradients of o and down, of q, k, v, o, gate, up and down.
    layer = shapes.DenseLayer(2, 3)
    assert shapes.bf16_share_of_linears(layer, 8) == (2 * 2 + 2 * 3) / (4 * 2 * 2 + 3 * 2 * 3) / 3
    assert shapes.bf16_share_of_linears(layer, 1) == 0


def test_closeness(bench):
    closeness = bench("harness").closeness
    x, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert closeness(x, x) == (1.0, 0.0)
    assert closeness(2 * x, x) == (1.0, 1.0)
    assert closeness(torch.tensor([-4.0, 3.0]), x).cosine == 0.0
    assert closeness(zero, zero) == (1.0, 0.0)
    assert not closeness(zero, x).cosine > 0
    assert not closeness(x * torch.nan, x).cosine > 0


def test_refusal_has_a_status_of_its_own(bench, capsys):
    harness = bench("harness")
    harness.require(True, "fine")
    with pytest.raises(SystemExit) as stopped:
        harness.require(False, "a product is not exact")
    assert stopped.value.code == harness.REFUSED
    assert capsys.readouterr().err == "refused: a product is not exact\n"


def test_exactness_check(bench, monkeypatch):
    linears = bench("linears")
    linears.check_exactness("cpu", [128], num_tokens=3, outputs=8)
    multiply = linears.scaled_code_matmul
    monkeypatch.setattr(linears, "scaled_code_matmul", lambda *args: multiply(*args) + 1)
    with pytest.raises(SystemExit):
        linears.check_exactness("cpu", [128], num_tokens=3, outputs=8)


def test_passes_run(bench):
    linears, inputs = bench("linears"), small_inputs(bench)
    linears.whole_pass(linears.eight_bit_pass, inputs)()
    linears.whole_pass(linears.bf16_pass, inputs)()


@pytest.mark.parametrize("name", ["qkv", "down"])
@pytest.mark.parametrize("title", ["fake quant, eager", "torchao bitnet_training", "FP8 row-wise, compiled"])
def test_baseline_is_close(bench, title, name, monkeypatch):
    if title.startswith("torchao"):
        pytest.importorskip("torchao")
    # A compiler is not everywhere.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    baselines, inputs = bench("baselines"), small_inputs(bench)
    baseline = baselines.BASELINES[title]
    forward, weights = baseline.make(inputs)
    baselines.check_baseline(baseline, forward, weights, inputs, name)
    baselines.layer_pass(forward, weights, inputs)()
    with pytest.raises(ValueError, match=f"y of {name} has cosine"):
        baselines.check_baseline(baseline, lambda *args: forward(*args).flip(0), weights, inputs, name)


def test_float8_rows(bench):
    codes, scale = bench("baselines").float8_rows(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    assert codes.float().tolist() == [[224.0, -448.0], [0.0, 0.0]]
    assert scale[0].item() == pytest.approx(2 / 448)


def test_quantizer_cases_equal_their_references(bench, monkeypatch):
    quantizers = bench("quantizers")
    for name, value in (("FEATURES", (128,)), ("PLAIN_FEATURES", 64), ("WEIGHTS", ((256, 64),))):
        monkeypatch.setattr(quantizers, name, value)
    cases = quantizers.cases(8, "cpu")
    generator = torch.Generator().manual_seed(0)
    for case in cases:
        assert quantizers.is_exact(case, torch.randn(case.shape, generator=generator).bfloat16()), case.name
    names = {case.name for case in cases}
    assert {"rms_norm+int4, e4m3 codes", "sub_norm+int8+topk", "relu2_glu+sub_norm+int8, 8 groups"} <= names
    wrong = quantizers.Case("int4", (8, 64), lambda x: (x, x), lambda x: (x, x + 1))
    assert not quantizers.is_exact(wrong, torch.ones(8, 64))


def test_share_of_copy(bench):
    # 8,000 bytes in 4 us, beside a copy's 4,000 bytes per us.
    assert bench("quantizers").share_of_copy(8000, 4.0, 4000.0) == 0.5


@pytest.mark.parametrize("is_rehearsal", [False, True])
def test_a_rehearsal_measures_nothing(is_rehearsal, monkeypatch):
    monkeypatch.setenv("BENCH_REHEARSAL", "1") if is_rehearsal else monkeypatch.delenv("BENCH_REHEARSAL", False)
    program = """
        import torch._inductor.config
        from harness import REPEATS, WARM_S, WARMUP
        print(WARMUP, REPEATS, WARM_S > 0, torch._inductor.config.autotune_local_cache)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True)
    assert done.stdout.split() == (["1", "1", "False", "False"] if is_rehearsal else ["3", "15", "True", "True"])


@pytest.mark.gpu
def test_time_of_a_pass(bench):
    harness = bench("harness")
    x = torch.randn(4096, 4096, device="cuda")
    recorded, eager = harness.time_pass(lambda: x @ x), harness.time_pass(lambda: x @ x, can_record=False)
    assert (recorded.how, eager.how) == ("graph", "events")
    assert 0 < recorded.ms < 2 * eager.ms


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_timed_by_events():
    """And what comes after it is recorded again; in a process of its own, which a failed recording may leave unwell."""
    program = """
        import torch
        from harness import time_pass
        x = torch.randn(512, 512, device="cuda")
        print(time_pass(lambda: (x @ x).sum().item()).how)
        x = torch.randn(512, 512, device="cuda")
        print(time_pass(lambda: x @ x).how)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "graph"
    assert "events" in done.stdout.splitlines()

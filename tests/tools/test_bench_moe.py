"""``tools/bench_moe``: fp64 agrees with the layer, and its checks catch what is wrong."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.shapes import MoELayer
from bitmoe.config.schema import ParallelConfig
from bitmoe.parallel.process_groups import make_groups, start

TOOL = Path(__file__).parents[2] / "tools" / "bench_moe"
OURS = "8-bit backward, G=1"
SMALL = MoELayer(6, 64, 96, 2, 100)


def tool(module):
    if str(TOOL) not in sys.path:
        sys.path.insert(0, str(TOOL))
    return importlib.import_module(module)


def check_ours(dtype, weight_factor=1.0):
    """In a rank: the check of all variants, of a layer whose second expert's weights were multiplied."""
    start()
    moe_runs = tool("moe_runs")
    make_ours = moe_runs.make_ours

    def with_other_weights(variant, inputs, groups):
        w2_EHF = inputs.w2_EHF.clone()
        w2_EHF[1] *= weight_factor
        changed = moe_runs.Inputs(**{**vars(inputs), "w2_EHF": w2_EHF})
        return make_ours(variant, changed, groups)

    moe_runs.make_ours = with_other_weights
    try:
        return moe_runs.check_ours(make_groups(ParallelConfig()), "cpu", tuple(moe_runs.VARIANTS), SMALL, dtype)
    except SystemExit as stopped:
        return stopped.code
    finally:
        moe_runs.make_ours = make_ours


def test_layer_is_that_of_fp64(ranks):
    """In fp32 to all digits, but for the gradients that the 8-bit backward rounds."""
    (found,) = ranks(1).run(check_ours, torch.float32)
    assert set(found) == set(tool("moe_runs").VARIANTS)
    for variant, figures in found.items():
        assert set(figures) == {"y", "dx", "dprobs", "dw1", "dw2", "dgain"}
        # With groups the 8-bit backward, too, leaves dY as it is for the weight gradient of down.
        unrounded = ("y", "dw2") if variant.endswith("G=8") else ("y",)
        exact = figures if variant.startswith("bf16") else unrounded
        assert all(figures[what].relative_error < 1e-4 for what in exact), figures
        assert all(0.999 < cosine <= 1 for cosine, _ in figures.values()), figures


def test_wrong_weights_are_refused(ranks):
    assert ranks(1).run(check_ours, torch.bfloat16, 1.1) == [3]


def test_bf16_pipeline_is_that_of_fp64():
    moe_runs = tool("moe_runs")
    moe_runs.check_pipeline("cpu", SMALL)
    inputs = moe_runs.make_inputs(SMALL, "cpu")
    run = moe_runs.swiglu_pass(inputs, moe_runs.grouped_swiglu)
    moe_runs.check_baseline(run, inputs)
    with pytest.raises(ValueError, match="y has cosine"):
        moe_runs.check_baseline(lambda: (run()[0].flip(0), run()[1]), inputs)


def test_routing():
    """Balanced, with probabilities that add up to 1 where tokens go; one expert can be left without any."""
    inputs = tool("moe_inputs").make_inputs(SMALL, "cpu", idle_expert=4)
    assert (inputs.routing_map_TE.sum(1) == 2).all()
    assert not inputs.routing_map_TE[:, 4].any()
    assert torch.equal(inputs.probs_TE > 0, inputs.routing_map_TE)
    torch.testing.assert_close(inputs.probs_TE.sum(1), torch.ones(100))
    assert inputs.routing_map_TE.gather(1, inputs.experts_TK).all()
    assert (inputs.experts_TK[:, 0] < inputs.experts_TK[:, 1]).all()


def test_rows_and_ratios(capsys):
    moe_runs = tool("moe_runs")
    timed = {"eager": ("bf16", 3.0, "graph"), "compiled": ("bf16", 2.0, "graph"), OURS: ("ours", 1.0, "events")}
    rows = [moe_runs.print_row(SMALL, name, kind, moe_runs.Timing(ms, how)) for name, (kind, ms, how) in timed.items()]
    assert [(row["name"], row["kind"], row["ms"], row["how"]) for row in rows] == [
        ("eager", "bf16", 3.0, "graph"),
        ("compiled", "bf16", 2.0, "graph"),
        (OURS, "ours", 1.0, "events"),
    ]
    assert rows[1]["tflops"] == round(18 * 200 * 64 * 96 / 2e9, 1)
    moe_runs.print_ratios(rows)
    *_, ours, ratio = capsys.readouterr().out.splitlines()
    assert ours.split() == [*OURS.split(), "1.000", "0", "0%", "(events)"]
    assert ratio == f"{OURS}: 2.00x of the fastest bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_needs_a_gpu():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs a GPU" in done.stderr

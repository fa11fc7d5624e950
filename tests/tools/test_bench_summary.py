"""``tools/bench_summary.py``: ratios of ours against the best baseline, whatever a benchmark's lines look like."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    return importlib.import_module("bench_summary")


def short(found):
    return [(figure.what, figure.ours, figure.baseline, figure.ratio) for figure in found]


def test_passes_against_the_best_bf16_and_each_other_baseline(summary):
    rows = [("a", "bf16", 6.0), ("b", "bf16", 5.0), ("G=1", "ours", 2.5), ("G=8", "ours", 4.0), ("FP8", "other", 2.0)]
    results = [{"name": name, "kind": kind, "ms": ms} for name, kind, ms in rows]
    found = summary.figures([{"bench": "moe", "shape": "8x", "results": results}])
    assert short(found) == [
        ("moe, 8x", "G=1", "b", 2.0),
        ("moe, 8x", "G=8", "b", 1.25),
        ("moe, 8x", "G=1", "FP8", 0.8),
    ]
    assert (found[0].our_value, found[0].baseline_value) == (2.5, 5.0)


def test_lines_without_times_are_passed_over(summary):
    lines = [{"bench": "linears", "gradients": {}}, {"bench": "moe", "close": {}}, {"bench": "unheard of"}]
    assert summary.figures(lines) == []


def test_without_a_baseline_there_is_no_ratio(summary):
    results = [{"name": "G=1", "kind": "ours", "ms": 2.0}]
    assert summary.figures([{"bench": "moe", "shape": "8x", "results": results}]) == []


def test_grouped_linears(summary):
    layers = {"64x": {"bf16": {"total": 3.0}, "8-bit": {"total": 2.0, "round dy": 0.1}}}
    assert short(summary.figures([{"bench": "grouped", "layers": layers}])) == [("grouped, 64x", "8-bit", "bf16", 1.5)]


def test_steps_are_rates_and_a_failed_trainer_is_left_out(summary):
    speeds = {"bitmoe-8bit": 300.0, "bitmoe-bf16-backward": 240.0, "megatron-bf16": 200.0, "llama-bf16": 240.0}
    rows = [{"trainer": name, "tokens_per_s": speed} for name, speed in speeds.items()]
    rows.append({"trainer": "fake-quant", "error": "broken"})
    assert short(summary.figures([{"bench": "step", "shape": "1.3b", "rows": rows}])) == [
        ("step, 1.3b", "bitmoe-8bit", "llama-bf16", 1.25),
        ("step, 1.3b", "bitmoe-bf16-backward", "llama-bf16", 1.0),
        ("step, 1.3b", "bitmoe-8bit", "megatron-bf16", 1.5),
    ]


def test_layers_have_a_time_and_a_size(summary):
    rows = [
        {"trainer": "bitmoe-8bit", "layer_ms": 2.0, "bytes_per_token": 100.0},
        {"trainer": "fake-quant", "layer_ms": 5.0, "bytes_per_token": 400.0},
    ]
    found = summary.figures([{"bench": "layer", "shape": "7b", "rows": rows}])
    assert [(figure.unit, figure.ratio) for figure in found] == [("ms", 2.5), ("bytes/token", 4.0)]


def test_quantizers_at_their_slowest(summary):
    rows = [("int4", 64, 0.9), ("int4", 128, 0.5), ("int8", 64, 0.75)]
    about = {"bench": "quantizers", "copy_GB_per_s": 4000, "us": 1.0}
    found = summary.figures([{**about, "operator": n, "shape": [8, f], "share_of_copy": s} for n, f, s in rows])
    assert short(found) == [("quantizer, 8x128", "int4", "copy", 0.5), ("quantizer, 8x64", "int8", "copy", 0.75)]
    assert found[0].our_value == 2000


def test_table(summary):
    lines = summary.table([summary.Figure("step, 1.3b", "tokens/s", "ours", 71881.04, "llama", 60000.0, 1.198)])
    head, row = lines.splitlines()
    assert head.split() == ["figure", "unit", "ours", "best", "baseline", "ratio"]
    assert row.split() == ["step,", "1.3b", "tokens/s", "ours", "71,881", "llama", "60,000", "1.20"]

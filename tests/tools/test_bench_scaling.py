"""``tools/bench_scaling``: layouts that send codes train, send what the formula says, and no wire changes a loss."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
TOOL = TOOLS / "bench_scaling"
SEQ, MICRO_BATCH, LAYERS, HIDDEN, EXPERTS = 16, 2, 2, 64, 8
TINY = [f"model.hidden_size={HIDDEN}", f"model.num_layers={LAYERS}", "model.vocab_size=259", "--moe-layers", LAYERS]
TINY += ["--dense-model", "tiny", "--moe-model", "tiny", "--moe", "tiny", "--groups", 2, "--ranks", 2]
TINY += ["--seq", SEQ, "--micro-batch", MICRO_BATCH, "--warmup", 1, "--steps", 2]
# Without GPUs: these are two ranks of gloo.
CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def tool(module):
    for folder in (TOOLS / "bench_step", TOOL):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(module)


def bench(*arguments):
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=CPU)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One rank, and layouts of two that send codes: the finished command, and its rows."""
    file = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    finished = bench(*TINY, "--only", "1,TP2,EP2", "--json", file)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout.splitlines(), [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_rows(done):
    lines, rows = done
    assert [(row["layout"], row["model"], row["groups"], row["wire"], row["is_overlapped"]) for row in rows] == [
        ("1", "dense", 1, None, False),
        ("1", "dense", 2, None, False),
        ("1", "moe", 1, None, False),
        *(("TP2", "dense", groups, wire, False) for groups in (1, 2) for wire in ("codes", "bf16")),
        ("EP2", "moe", 1, "codes", False),
        ("EP2", "moe", 1, "bf16", False),
    ]
    assert lines[0].split()[:4] == ["layout", "model", "G", "wire"]
    assert [line.split()[:3] for line in lines[1:10]] == [[r["layout"], r["model"], str(r["groups"])] for r in rows]
    assert list(map(json.loads, lines[-9:])) == rows
    for row in rows:
        assert row["is_finite"]
        assert row["torch"] == torch.__version__
        assert len(row["losses"]) == 3
        data = row["world"] if row["layout"] != "TP2" else 1
        assert row["tokens"] == data * SEQ * MICRO_BATCH
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_ms"] * 1e3, rel=1e-3, abs=0.1)
        assert row["tokens_per_s_gpu"] == pytest.approx(row["tokens_per_s"] / row["world"], rel=1e-3, abs=0.1)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_bytes_on_the_wire(done):
    """Two gathers a layer (qkv, gate_up), half of the tokens to a rank; a row for each trip to the other's experts."""
    codes_bytes = {"uint8": HIDDEN // 2, "bfloat16": 2 * HIDDEN}
    totals = {}
    for row in done[1]:
        if row["wire"] is None:
            assert not row.get("received_bytes")
            continue
        received = row["received_bytes"]
        kind = "uint8" if row["wire"] == "codes" else "bfloat16"
        if row["layout"] == "TP2":
            tokens = LAYERS * 2 * MICRO_BATCH * SEQ
            assert received == {kind: tokens * codes_bytes[kind], "float32": tokens * 4}
        else:
            # Scale and probability of each row.
            assert received["float32"] > 0
            assert received[kind] == received["float32"] // 8 * codes_bytes[kind]
            # How many tokens the other rank has for each of the experts.
            assert received.keys() == {kind, "float32", "int64"}
            assert received["int64"] == 2 * LAYERS * EXPERTS * 8
        totals[row["layout"], row["groups"], row["wire"]] = received[kind] + received["float32"]
    for layout, groups in (("TP2", 1), ("TP2", 2), ("EP2", 1)):
        share, numbers = totals[layout, groups, "codes"] / totals[layout, groups, "bf16"], 8 if layout == "EP2" else 4
        assert share == (HIDDEN / 2 + numbers) / (2 * HIDDEN + numbers) <= 0.5


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_wires_give_the_same_losses(done):
    losses = {}
    for row in done[1]:
        if row["wire"]:
            losses.setdefault((row["layout"], row["groups"]), []).append([row["first_loss"], *row["losses"]])
    assert len(losses) == 3
    assert all(packed == wide for packed, wide in losses.values())


def test_layouts_of_four_gpus():
    layouts = tool("layouts")
    rows = {name: layouts.variants(layout, 8) for name, layout in layouts.LAYOUTS.items() if layout.world == 4}
    assert {name: layouts.LAYOUTS[name].data for name in rows} == {
        "DP4": 4,
        "TP2xDP2": 2,
        "TP4": 1,
        "EP4": 4,
        "EP2xDP2": 4,
    }
    assert [row.is_overlapped for row in rows["DP4"]] == [False, True, False, True]
    assert {(row.groups, row.wire.value) for row in rows["TP4"]} == {(g, w) for g in (1, 8) for w in ("codes", "bf16")}
    assert [(row.model, row.wire.value) for row in rows["EP2xDP2"]] == [("moe", "codes"), ("moe", "bf16")]


def make_row(layout, world, speed, model="dense", groups=1, **more):
    return {"layout": layout, "world": world, "model": model, "groups": groups, "tokens_per_s_gpu": speed} | more


def test_efficiency_is_beside_one_gpu_with_the_same_groups():
    table = tool("table")
    rows = [make_row("1", 1, 100.0), make_row("1", 1, 80.0, groups=8), make_row("TP2", 2, 60.0, groups=8)]
    assert [table.efficiency(row, rows) for row in rows] == [1.0, 1.0, 0.75]
    assert table.efficiency(rows[2], rows[2:]) is None


@pytest.mark.parametrize(
    ("model", "gap", "is_wrong"), [("dense", 1e-6, True), ("moe", 1e-6, False), ("moe", 0.1, True)]
)
def test_a_wire_that_changes_the_loss_is_told(model, gap, is_wrong):
    rows = [make_row("L", 2, 1.0, model, wire="codes", first_loss=6.0)]
    rows += [make_row("L", 2, 1.0, model, wire="bf16", first_loss=6.0 + gap), make_row("DP2", 2, 1.0, wire=None)]
    told = tool("table").different_losses(rows)
    assert told == ([f"L, {model}, G = 1: first losses [6.0, {6.0 + gap}]"] if is_wrong else [])


def test_refuses_a_layout_of_more_ranks():
    finished = bench(*TINY, "--only", "1,TP4")
    assert finished.returncode == 2
    assert "'TP4' is none of 1, DP2, TP2, EP2, which 2 ranks allow" in finished.stderr


def test_refuses_a_config_before_anything_starts():
    finished = bench(*TINY, "--groups", 3)
    assert finished.returncode == 2
    assert "quant.groups" in finished.stderr
    assert "layout" not in finished.stdout

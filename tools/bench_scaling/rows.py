"""In the ranks of one layout: build, check, time and free every variant, one after the other."""

import argparse
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bitmoe_trainer
import measure
import torch
import torch.distributed as dist
from layouts import LAYOUTS, Layout, Variant, make_config, variants
from trainer import Trainer
from wire_bytes import counted_inputs

from bench.harness import free, machine
from bitmoe.config.schema import Config
from bitmoe.parallel.process_groups import Groups, leave, make_groups, start
from bitmoe.train.micro_batch_graphs import graphs_hold


def measure_layout(name: str, arguments: argparse.Namespace, out: Path) -> None:
    """Measure every variant of a layout on its ranks; rank 0 adds a JSON line to ``out`` after each."""
    layout = LAYOUTS[name]
    chosen = variants(layout, arguments.groups)
    start()
    groups = make_groups(make_config(layout, chosen[0], arguments).parallel)
    for variant in chosen:
        row = _measure(layout, variant, groups, arguments)
        if dist.get_rank() == 0:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"bench": "scaling", "layout": name, **row, **machine()}) + "\n")
    # Not after a failure: the other ranks would never come.
    leave()


def _measure(layout: Layout, variant: Variant, groups: Groups, arguments: argparse.Namespace) -> dict:
    config = make_config(layout, variant, arguments)
    torch.manual_seed(config.run.seed)
    free()
    trainer = bitmoe_trainer.build(config, groups)
    # Ranks of one tensor-parallel group share tokens; others have their own.
    own = replace(config, run=replace(config.run, seed=config.run.seed + groups.dp.rank()))
    batches = measure.random_batches(own)
    row = _forward(trainer, next(batches)) if layout.world > 1 else {}
    row |= measure.time_steps(trainer, batches, arguments.warmup, arguments.steps)
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    del trainer
    free()
    return _describe(layout, variant, config) | _joined(layout, config, row)


def _forward(trainer: Trainer, batch: measure.Batch) -> dict:
    """Loss of the initial weights, which no wire may change, and bytes that the inputs of linears took."""
    with torch.no_grad(), counted_inputs() as received:
        loss = trainer.forward(batch)
    return {"first_loss": float(loss), "received_bytes": dict(received)}


def _describe(layout: Layout, variant: Variant, config: Config) -> dict:
    return {
        "model": variant.model,
        "world": layout.world,
        "groups": variant.groups,
        "wire": variant.wire and variant.wire.value,
        "is_overlapped": variant.is_overlapped,
        "is_graph": graphs_hold(config),
        "tokens": layout.data * config.run.micro_batch_size * config.context.seq_length,
    }


def _joined(layout: Layout, config: Config, own: dict) -> dict:
    """One row of all ranks: the slowest rank's time, the largest memory, the bytes that all received."""
    rows: list[dict] = [None] * layout.world
    dist.all_gather_object(rows, own)
    step_ms = max(row["step_ms"] for row in rows)
    tokens_per_s = layout.data * measure.rates(config, step_ms)["tokens_per_s"]
    joined = {
        "step_ms": step_ms,
        "step_ms_min": min(row["step_ms_min"] for row in rows),
        "step_ms_max": max(row["step_ms_max"] for row in rows),
        "tokens_per_s": round(tokens_per_s, 1),
        "tokens_per_s_gpu": round(tokens_per_s / layout.world, 1),
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "losses": rows[0]["losses"],
        "is_finite": all(math.isfinite(loss) for row in rows for loss in row["losses"]),
    }
    if layout.world > 1:
        joined["received_bytes"] = dict(sum((Counter(row["received_bytes"]) for row in rows), Counter()))
        joined["first_loss"] = sum(row["first_loss"] for row in rows) / layout.world
    return joined

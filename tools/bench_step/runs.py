"""Runs trainers one after the other and prints a row for each, as soon as it is known."""

import argparse
import json
import math
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import measure
import torch
from gpu_profile import record, report
from registry import SETTINGS, TRAINERS
from trainer import Trainer

from bench.harness import free, machine
from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config
from bitmoe.config.validate import validate
from bitmoe.parallel.alone import alone
from bitmoe.train.run_dir import replace_file

PROFILED_STEPS = 3


def run(arguments: argparse.Namespace) -> int:
    """Measure every trainer; one that fails does not keep the others from running.

    Args:
        arguments: of the command line.

    Returns:
        1 if a trainer failed, else 0.
    """
    measure_one = {"profile": _profile, "layer": _measure_layer, "step": _measure_speed}[arguments.mode]
    if arguments.mode != "step" and not torch.cuda.is_available():
        print(f"--{arguments.mode} needs a GPU", file=sys.stderr)
        return 2
    print(_header(arguments.mode), flush=True)
    result = {"bench": arguments.mode, "shape": _shape(arguments), "command": sys.argv[1:], **machine(), "rows": []}
    for name in arguments.trainers:
        try:
            row = measure_one(name, arguments)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = str(error).strip().partition("\n")[0]
            row = {"error": f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"}
            print(f"{name:22} failed: {row['error']}", flush=True)
        result["rows"].append({"trainer": name, "what": TRAINERS[name].what, **row})
        if arguments.json:
            replace_file(arguments.json, json.dumps(result).encode())
    print(json.dumps(result))
    return int(any("error" in row for row in result["rows"]))


def _config(name: str, arguments: argparse.Namespace, layers: int | None = None) -> Config:
    """What this trainer trains; quantized from the first step on as the recipe is in its last stage."""
    overrides = [*SETTINGS, f"moe={'e8k2' if arguments.moe else 'none'}", *TRAINERS[name].overrides]
    overrides.append(f"model={_preset(arguments)}")
    overrides += [f"context.seq_length={arguments.seq}", f"run.micro_batch_size={arguments.micro_batch}"]
    overrides.append(f"run.global_batch_size={arguments.micro_batch}")
    layers = arguments.layers if layers is None else layers
    if layers is not None:
        overrides.append(f"model.num_layers={layers}")
    if arguments.ffn:
        overrides.append(f"{'moe' if arguments.moe else 'model'}.ffn_hidden_size={arguments.ffn}")
    config = compose([*overrides, *arguments.overrides])
    config.quant.stages = [replace(config.quant.stages[-1], start=0.0)]
    validate(config, 1)
    if config.model.vocab_size is None:
        raise InputError("the preset leaves the vocabulary to a tokenizer", fix="give it", key="model.vocab_size")
    return config


def _preset(arguments: argparse.Namespace) -> str:
    return arguments.model or ("700m" if arguments.moe else "1.3b_aligned")


def _shape(arguments: argparse.Namespace) -> str:
    """Model and tokens, for reports."""
    parts = [_preset(arguments) + (" e8k2" if arguments.moe else "")]
    parts += [f"ffn {arguments.ffn}"] if arguments.ffn else []
    return ", ".join([*parts, *arguments.overrides, f"{arguments.micro_batch} x {arguments.seq:,} tokens"])


@contextmanager
def _built(name: str, config: Config) -> Iterator[Trainer]:
    """The trainer, as the only rank; afterwards its memory is free."""
    torch.manual_seed(config.run.seed)
    try:
        with alone() as groups:
            entry = TRAINERS[name]
            yield getattr(import_module(entry.module), entry.function)(config, groups)
    finally:
        torch.compiler.reset()


def _measure_speed(name: str, arguments: argparse.Namespace) -> dict:
    config = _config(name, arguments)
    free()
    before = torch.cuda.memory_allocated()
    with _built(name, config) as trainer:
        row = measure.time_steps(trainer, measure.random_batches(config), arguments.warmup, arguments.steps)
        del trainer
    row |= measure.rates(config, row["step_ms"])
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    row["is_finite"] = all(map(math.isfinite, row["losses"]))
    print(
        f"{name:22}{row['step_ms']:9.1f}{row['tokens_per_s']:11,.0f}{row['model_tflops']:10.1f}{row['mfu']:8.1%}"
        f"{row['peak_bytes'] / 2**30:10.1f}  {'yes' if row['is_finite'] else 'NO':8}{TRAINERS[name].what}",
        flush=True,
    )
    return row


def _measure_layer(name: str, arguments: argparse.Namespace) -> dict:
    config = _config(name, arguments, layers=1)
    free()
    with _built(name, config) as trainer:
        row = measure.measure_layer(trainer.layer, config)
        del trainer
    print(
        f"{name:22}{row['layer_ms']:9.3f}{row['model_tflops']:10.1f}{row['layer_activation_bytes'] / 2**20:13.1f}"
        f"{row['bytes_per_token']:15,.0f}  {row['how']:8}{TRAINERS[name].what}",
        flush=True,
    )
    return row


def _profile(name: str, arguments: argparse.Namespace) -> dict:
    config = _config(name, arguments)
    batches = measure.random_batches(config)
    with _built(name, config) as trainer:
        measure.time_steps(trainer, batches, arguments.warmup, 1)
        kernels, wall_us = record(lambda: trainer.step(next(batches)), PROFILED_STEPS)
    print(f"{name}: {TRAINERS[name].what}\n{report(kernels, wall_us, PROFILED_STEPS)}", flush=True)
    return {"step_ms": wall_us / PROFILED_STEPS / 1e3}


def _header(mode: str) -> str:
    if mode == "step":
        columns = f"{'ms/step':>9}{'tokens/s':>11}{'TFLOP/s':>10}{'MFU':>8}{'peak GiB':>10}  {'finite':8}"
        return f"{'trainer':22}{columns}"
    if mode == "layer":
        return f"{'trainer':22}{'ms/layer':>9}{'TFLOP/s':>10}{'MiB a layer':>13}{'bytes a token':>15}  {'timed by':8}"
    return ""

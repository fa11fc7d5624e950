"""Time of training steps; time of one layer, and memory that its forward pass leaves behind."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from trainer import Batch, Layer, Trainer

from bench.harness import time_pass
from bitmoe.config.schema import Config
from bitmoe.model.counts import TRAINING_PER_FORWARD, forward_flops
from bitmoe.parallel.process_groups import local_device

PEAK_FLOPS = 989e12
"""Dense bf16 products of an H200 (and H100), by its data sheet."""


def random_batches(config: Config) -> Iterator[Batch]:
    """Random tokens, new ones each time, in micro-batches of one rank."""
    shape = (config.run.micro_batch_size, config.context.seq_length + 1)
    generator = torch.Generator().manual_seed(config.run.seed)
    while True:
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(local_device())
        yield {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def time_steps(trainer: Trainer, batches: Iterator[Batch], warmup: int, steps: int) -> dict:
    """Run ``warmup`` steps, then time ``steps`` of them, each from an idle device to an idle device.

    Returns:
        ``step_ms``, the median, ``step_ms_min``, ``step_ms_max`` and ``losses``, of all steps.
    """
    losses, elapsed_ms = [], []
    for _ in range(warmup + steps):
        batch = next(batches)
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = trainer.step(batch)
        torch.cuda.synchronize()
        elapsed_ms.append(1e3 * (time.perf_counter() - start))
        losses.append(round(float(loss), 4))
    timed = elapsed_ms[warmup:]
    figures = {"step_ms": statistics.median(timed), "step_ms_min": min(timed), "step_ms_max": max(timed)}
    return {name: round(value, 3) for name, value in figures.items()} | {"losses": losses}


def rates(config: Config, step_ms: float) -> dict[str, float]:
    """Tokens per second, model TFLOP/s, and their share of ``PEAK_FLOPS``."""
    num_tokens = config.run.micro_batch_size * config.context.seq_length
    tokens_per_s = 1e3 * num_tokens / step_ms
    flops_per_s = TRAINING_PER_FORWARD * sum(forward_flops(config)) * tokens_per_s
    tflops, mfu = flops_per_s / 1e12, flops_per_s / PEAK_FLOPS
    return {"tokens_per_s": round(tokens_per_s, 1), "model_tflops": round(tflops, 3), "mfu": round(mfu, 5)}


def measure_layer(layer: Layer, config: Config) -> dict[str, float | str]:
    """Forward and backward of one layer on a random residual stream, and what lies between them.

    Returns:
        ``layer_ms`` and ``how`` it was measured, ``model_tflops``, ``layer_activation_bytes`` (its output and all that
        its backward needs, but for what an earlier forward already left), ``bytes_per_token``.
    """
    num_tokens = config.run.micro_batch_size * config.context.seq_length
    parameters = fresh_parameters(layer.module)
    x, dy = (residual_stream(layer, config, parameters[0].dtype) for _ in range(2))
    x.requires_grad_()

    def run() -> None:
        torch.autograd.grad(layer.forward(x), [x, *parameters], dy)

    run()
    before = torch.cuda.memory_allocated()
    y = layer.forward(x)
    held = torch.cuda.memory_allocated() - before
    del y
    timing = time_pass(run)
    tflops = 1e-9 * TRAINING_PER_FORWARD * layer_flops(config) * num_tokens / timing.ms
    figures = {"layer_ms": timing.ms, "how": timing.how, "model_tflops": round(tflops, 1)}
    return figures | {"layer_activation_bytes": held, "bytes_per_token": held / num_tokens}


def residual_stream(layer: Layer, config: Config, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers in the shape that the layer takes."""
    lead = config.context.seq_length, config.run.micro_batch_size
    shape = (*(reversed(lead) if layer.is_batch_first else lead), config.model.hidden_size)
    return torch.randn(shape, dtype=dtype, device=local_device())


def fresh_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """New parameters over the same memory, put into a module: DDP's hooks, which a graph cannot hold, stay behind."""
    parameters = []
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fresh = torch.nn.Parameter(parameter.detach())
            setattr(part, name, fresh)
            parameters.append(fresh)
    return parameters


def layer_flops(config: Config) -> int:
    """FLOPs of one layer's forward pass per token."""
    two, one = (replace(config, model=replace(config.model, num_layers=count)) for count in (2, 1))
    return sum(forward_flops(two)) - sum(forward_flops(one))

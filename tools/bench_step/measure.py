"""Time of training steps, and memory that a forward pass leaves behind."""

import statistics
import time
from collections.abc import Iterator

import torch
from trainer import Batch, Trainer

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


def held_by_forward(trainer: Trainer, batch: Batch) -> int:
    """Bytes that stay allocated between forward and backward, without what an earlier forward already left."""
    trainer.forward(batch)
    before = torch.cuda.memory_allocated()
    loss = trainer.forward(batch)
    held = torch.cuda.memory_allocated() - before
    del loss
    return held

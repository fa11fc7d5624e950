"""Where the GPU's time goes in a few training steps: kernels by name and by rough category, and its busy share."""

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

CATEGORIES = {
    "compiled by inductor": r"^triton_(poi|red|per)_",
    "attention": r"fmha|flash|sdpa|attention",
    "gemm": r"gemm|nvjet|cutlass|xmma|matmul|splitk|gemv|wgmma|cublas",
    "quantize": r"quant|ternar|codes|absmax|abs_sum|topk_mask",
    "optimizer": r"multi_tensor_apply|adam",
    "loss": r"cross_entropy|softmax|nll_loss",
    "norm": r"rms_?norm|layer_?norm|sub_?norm|_norm_|gammabeta",
    "sort and top-K": r"topk|sort|radix|scan",
    "copy": r"memcpy|memset|copy_kernel|fillfunctor|catarray|transpose|permute",
    "embedding and index": r"embedding|index|gather|scatter",
    "communication": r"nccl",
    "reduce": r"reduce",
    "elementwise": r"elementwise|relu",
}
"""Patterns looked for in a kernel's lower-case name; the first that is found names its category."""


class Kernel(NamedTuple):
    """One run of a kernel, a copy or a fill on the GPU, in microseconds."""

    name: str
    start_us: float
    elapsed_us: float


def category(name: str) -> str:
    """What a kernel does, guessed from its name."""
    return next((kind for kind, pattern in CATEGORIES.items() if re.search(pattern, name.lower())), "other")


def _short(name: str) -> str:
    return re.sub(r"^void |at::native::|\(anonymous namespace\)::|c10::|std::", "", name)[:110]


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one kernel ran."""
    busy, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start_us):
        kernel_end = kernel.start_us + kernel.elapsed_us
        busy += max(0.0, kernel_end - max(end, kernel.start_us))
        end = max(end, kernel_end)
    return busy


def record(step: Callable[[], object], steps: int) -> tuple[list[Kernel], float]:
    """What ran on the GPU during ``steps`` steps, and how long they took on the wall in microseconds."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        wall_us = 1e6 * (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    on_gpu = ("kernel", "gpu_memcpy", "gpu_memset")
    return [Kernel(e["name"], e["ts"], e["dur"]) for e in events if e.get("cat") in on_gpu], wall_us


def report(kernels: list[Kernel], wall_us: float, steps: int, top: int = 40) -> str:
    """Milliseconds per step: of the whole, by category, and of the ``top`` kernels."""
    by_name, by_category = defaultdict(list), defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.elapsed_us)
        by_category[category(kernel.name)].append(kernel.elapsed_us)
    total_us, busy = sum(kernel.elapsed_us for kernel in kernels), busy_us(kernels)
    lines = [
        f"{wall_us / steps / 1e3:.2f} ms a step on the wall, GPU busy for {busy / steps / 1e3:.2f} ms "
        f"({busy / wall_us:.1%}), {len(kernels) / steps:.0f} kernels a step"
    ]
    for title, times in (("category", by_category), (f"kernel (top {top})", by_name)):
        lines.append(f"\n{'ms':>9}{'share':>8}{'calls':>8}{'us each':>9}  {title}")
        for name, elapsed in sorted(times.items(), key=lambda item: -sum(item[1]))[:top]:
            each_us, share = sum(elapsed) / len(elapsed), sum(elapsed) / total_us
            label = name if times is by_category else f"[{category(name)}] {_short(name)}"
            per_step = f"{sum(elapsed) / steps / 1e3:9.3f}{share:8.1%}{len(elapsed) / steps:8.0f}"
            lines.append(f"{per_step}{each_us:9.1f}  {label}")
    return "\n".join(lines)

"""What all benchmarks share: the refusal to print wrong figures, timers, closeness to fp64, and where they ran.

Times are medians. A pass is timed by replays of its CUDA graph, so that the launches of Python are not timed; where it
cannot be recorded (it waits for the GPU) by events around eager calls, and the result says so. What is timed has run
for a while before: under load a GPU lowers its clocks, and the contender that is timed last would pay for the others.
"""

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

IS_REHEARSAL = "BENCH_REHEARSAL" in os.environ
"""Whether this process runs everything once, for what it compiles, and what it would print is dropped."""
if IS_REHEARSAL:
    # torch picks tiles by timing them; what it picks while other processes use the GPU must not be kept.
    import torch._inductor.config

    torch._inductor.config.autotune_local_cache = False
WARMUP, REPEATS = (1, 1) if IS_REHEARSAL else (3, 15)
WARM_S = 0.0 if IS_REHEARSAL else 0.3
"""Seconds of work before a measurement. Products of a 7B layer took 8.8 ms in the first replay and 9.8 ms in the tenth,
each kernel of them alike (H200)."""
REFUSED = 3
"""Exit status of a benchmark whose results are wrong: it prints no figures, and ``make bench-gpu`` stops."""

Mark = Callable[[str], None]
"""``mark(stage)`` is called after each stage of a pass."""


class Timing(NamedTuple):
    """Milliseconds of a pass and how they were measured."""

    ms: float
    how: str
    """graph: replays of a CUDA graph; events: eager calls."""


class Closeness(NamedTuple):
    """A tensor against its fp64 value."""

    cosine: float
    relative_error: float
    """Frobenius norm of the difference over that of the value."""


def require(is_true: bool, what: str) -> None:
    """Stop without a number where a check fails."""
    if not is_true:
        print(f"refused: {what}", file=sys.stderr)
        raise SystemExit(REFUSED)


def require_gpu() -> None:
    """Stop where there is nothing to time."""
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU: the machine has no CUDA device")


def closeness(actual: torch.Tensor, truth: torch.Tensor) -> Closeness:
    """Cosine and relative error; 1 and 0 where both are zero."""
    actual, truth = actual.detach().double(), truth.detach().double()
    if not truth.any() and not actual.any():
        return Closeness(1.0, 0.0)
    cosine = (actual * truth).sum() / actual.norm() / truth.norm()
    return Closeness(round(float(cosine), 6), round(float((actual - truth).norm() / truth.norm()), 5))


def time_stages(run: Callable[[Mark], None]) -> dict[str, float]:
    """Median milliseconds between consecutive marks of one pass, summed by stage."""
    totals: dict[str, list[float]] = {}
    _warm_up(lambda: run(lambda stage: None))
    for _ in range(REPEATS):
        marks = [("start", torch.cuda.Event(enable_timing=True))]
        marks[0][1].record()

        def mark(stage: str, marks=marks) -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append((stage, event))

        run(mark)
        torch.cuda.synchronize()
        elapsed: dict[str, float] = {}
        for (_, before), (stage, after) in zip(marks[:-1], marks[1:], strict=True):
            elapsed[stage] = elapsed.get(stage, 0.0) + before.elapsed_time(after)
        elapsed["total"] = marks[0][1].elapsed_time(marks[-1][1])
        for stage, elapsed_ms in elapsed.items():
            totals.setdefault(stage, []).append(elapsed_ms)
    return {stage: round(statistics.median(values), 4) for stage, values in totals.items()}


def time_pass(run: Callable[[], object], repeats: int = REPEATS, can_record: bool = True) -> Timing:
    """Median time of one call.

    Args:
        run: what is timed; what it returns is dropped.
        repeats: calls that are timed.
        can_record: False for a call that is known to wait for the GPU.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if can_record and not IS_REHEARSAL:
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls must be recordable: process groups have a watchdog, autograd a thread of its own.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                run()
            return Timing(_median_ms(graph.replay, repeats), "graph")
        except RuntimeError as error:
            torch.cuda.synchronize()
            _renew_generator()
            print(f"timed eagerly, because recording failed: {first_line(error)}", flush=True)
    return Timing(_median_ms(run, repeats), "events")


def _renew_generator() -> None:
    """A recording that failed leaves the random generator in the belief that one goes on, and it refuses to work."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    """Each call starts on an idle GPU."""
    elapsed_ms = []
    _warm_up(call)
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        elapsed_ms.append(start.elapsed_time(end))
    return round(statistics.median(elapsed_ms), 4)


def _warm_up(call: Callable[[], object]) -> None:
    call()  # compiles
    end = time.perf_counter() + WARM_S
    while time.perf_counter() < end:
        call()
        torch.cuda.synchronize()


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def free() -> None:
    """Give back the memory of what was timed before (hooks and parameters refer to each other), and count it anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def machine() -> dict[str, str | None]:
    """GPU, versions and commit, for every line of results."""
    found = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch": torch.__version__}
    for package in ("triton", "megatron-core", "transformers", "torchao", "liger-kernel"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {**found, "commit": commit()}


def commit() -> str | None:
    """The checkout's commit, with a mark where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None

"""Benchmarks of one NVIDIA GPU, one after the other: their JSON lines in one file, and a table of all ratios.

    PYTHONPATH=.:kernels python tools/bench_gpu.py --out bench.jsonl
    PYTHONPATH=.:kernels python tools/bench_gpu.py --only grouped,step    # what DEFAULT leaves out has to be named

First all of them run at once, untimed, for what they compile: Triton and torch keep that on disk, and it would take
minutes one after the other.

Then each runs in a process of its own, so that none finds the memory or the clocks another left. Those of operators
and of routed experts check their results before they time anything. Where one refuses, everything stops: no table is
printed, because the others run the same operators. A benchmark that fails in another way, or loses one of its
trainers, is named at the end and leaves the others alone; the exit status is then 1.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_summary import figures, table

ROOT = Path(__file__).resolve().parent.parent
REFUSED = 3
"""Exit status of a benchmark whose results are wrong, as in kernels/bench/harness.py."""

STEPS = ["--warmup", "3", "--steps", "9"]
LAYER = ["--layer", "--model", "7b", "--micro-batch", "4"]
BENCHMARKS = {
    "quantizers": ["kernels/bench/quantizers.py"],
    "linears": ["kernels/bench/linears.py"],
    "grouped": ["kernels/bench/grouped.py"],
    "moe": ["tools/bench_moe"],
    "layer": ["tools/bench_step", *LAYER, "--trainers", "bitmoe-8bit,bitmoe-8bit-recompute,megatron-bf16"],
    "step": ["tools/bench_step", *STEPS, "--trainers", "bitmoe-8bit,megatron-bf16,llama-bf16,fake-quant"],
    "step 8k": [
        "tools/bench_step",
        *STEPS,
        "--seq",
        "8192",
        "--micro-batch",
        "2",
        "--trainers",
        "bitmoe-8bit,llama-bf16",
    ],
}
DEFAULT = ("quantizers", "linears", "moe", "layer", "step")
"""Less than 8 minutes on an H200."""

ONE_LAYER = [["--layers", "1", "--warmup", "1", "--steps", "1"]]
REHEARSALS = {"moe": [["--only", "8x("], ["--only", "64x("]], "step": ONE_LAYER, "step 8k": ONE_LAYER}
"""How a benchmark is run to compile: in parts, or with one layer of many that are alike."""
REHEARSAL = {"BENCH_REHEARSAL": "1"}
"""Environment in which nothing is measured, as in kernels/bench/harness.py."""
ONE_CACHE = {"TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache")}
"""Where Triton's kernels lie unless the user says otherwise. A process in which torch finds its own compiled code would
look for them elsewhere than the one that compiled both."""


def rehearse(names: list[str]) -> None:
    """Run benchmarks all at once and drop what they print. One that fails will compile when it is measured."""
    print("== compiling what all of them run", flush=True)
    start = time.perf_counter()
    commands = [(name, [*BENCHMARKS[name], *extra]) for name in names for extra in REHEARSALS.get(name, [[]])]
    processes = [(name, _start(command, subprocess.DEVNULL, REHEARSAL)) for name, command in commands]
    try:
        for name, process in processes:
            status = process.wait()
            print(f"   {name}: {time.perf_counter() - start:.0f} s, status {status}", flush=True)
    finally:
        for _, process in processes:
            process.kill()


def _start(command: list[str], output: int, environment: dict[str, str]) -> subprocess.Popen:
    """Start one of the scripts."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**ONE_CACHE, **os.environ, **environment},
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(name: str, command: list[str]) -> tuple[int, list[str]]:
    """Run one benchmark, show what it prints, and return its status and its JSON lines."""
    print(f"== {name}: python {' '.join(command)}", flush=True)
    start, lines = time.perf_counter(), []
    process = _start(command, subprocess.PIPE, {})
    for line in process.stdout:
        if is_json(line):
            lines.append(line)
        else:
            print(line, end="", flush=True)
    status = process.wait()
    print(f"-- {name}: {time.perf_counter() - start:.0f} s, status {status}", flush=True)
    return status, lines


def is_json(line: str) -> bool:
    """Whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def run_all(names: list[str], out: Path) -> int:
    """Run benchmarks; each one's lines are written as soon as it ends, and get the name ``out`` when all have.

    Until then they are in ``out`` with ``.part`` behind its name, and the results of a former run where they were.

    Returns:
        0; 1 where some failed; REFUSED where one's results are wrong, and those after it were not run.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    part.unlink(missing_ok=True)
    start, failed, results = time.perf_counter(), [], []
    rehearse(names)
    for name in names:
        status, lines = run(name, BENCHMARKS[name])
        if status == REFUSED:
            print(f"{name} refused: its results are wrong. No figures; the others were not run", file=sys.stderr)
            part.unlink(missing_ok=True)
            return REFUSED
        failed += [name] if status else []
        results += map(json.loads, lines)
        with part.open("a") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
    part.replace(out)
    print(f"\n{table(figures(results))}\n\n{time.perf_counter() - start:.0f} s; results in {out}", flush=True)
    if failed:
        print(f"failed, or lost a part: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"), help="JSON lines (default: %(default)s)")
    parser.add_argument(
        "--only", default=",".join(DEFAULT), help=f"some of {','.join(BENCHMARKS)} (default: %(default)s)"
    )
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA device")
    return run_all(names, arguments.out)


if __name__ == "__main__":
    sys.exit(main())

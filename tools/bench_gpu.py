"""All benchmarks of one NVIDIA GPU, one after the other; their JSON lines in one file.

    PYTHONPATH=.:kernels python tools/bench_gpu.py --out bench.jsonl
    PYTHONPATH=.:kernels python tools/bench_gpu.py --only linears,step

Each benchmark runs in a process of its own, so that none finds the memory or the clocks another left. Those of
operators check that their products are exact and their gradients close before they time anything, and print nothing
where they are not: then this stops, too.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = {
    "quantizers": ["kernels/bench/quantizers.py", "--tokens", "8192"],
    "linears": ["kernels/bench/linears.py"],
    "grouped": ["kernels/bench/grouped.py"],
    "step": ["tools/bench_step"],
    "step 8k": ["tools/bench_step", "--seq", "8192", "--micro-batch", "2", "--trainers", "bitmoe-8bit,llama-bf16"],
}


def run(name: str, command: list[str]) -> list[str]:
    """Run one benchmark, show what it prints, and return its JSON lines.

    Raises:
        SystemExit: it failed; with its status.
    """
    print(f"== {name}: python {' '.join(command)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        if is_json(line):
            lines.append(line)
        else:
            print(line, end="", flush=True)
    if process.wait():
        print(f"{name} failed with status {process.returncode}: the others were not run", file=sys.stderr)
        raise SystemExit(process.returncode)
    return lines


def is_json(line: str) -> bool:
    """Whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def main() -> None:
    """Run what was asked for; each benchmark's lines are written as soon as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"), help="JSON lines (default: %(default)s)")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="which, with commas (default: %(default)s)")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA device")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.unlink(missing_ok=True)
    for name in names:
        lines = run(name, BENCHMARKS[name])
        with arguments.out.open("a") as file:
            file.writelines(lines)
    print(f"results in {arguments.out}")


if __name__ == "__main__":
    main()

"""Whole training steps of bitmoe on one GPU and on several, in each layout that they allow.

    python tools/bench_scaling                       # all GPUs of this machine
    python tools/bench_scaling --only 1,TP2,EP2      # some layouts; see layouts.py
    python tools/bench_scaling --ranks 2 ...         # so many ranks; on CPUs where there are no GPUs

A dense model and a mixture of experts, a4.8 from the first step on with ``quant.backward=8bit``, one micro-batch a
step, random tokens. Every layout runs in processes of its own, started here, and builds, checks, times and frees its
variants one after the other. Fixed work for a data-parallel rank, so those layouts scale weakly; a fixed total for a
tensor-parallel group. Where codes travel, there is a row for each ``parallel.wire``: both must give the same first
loss, and the bytes are counted as they arrive. Words without a dash in front are overrides of the config.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
# The trainer, the clock and the description of the machine are those of the benchmarks of one GPU.
sys.path[1:1] = [str(HERE.parent / "bench_step"), str(HERE.parents[1] / "kernels")]

from layouts import LAYOUTS, make_config, variants  # noqa: E402
from table import HEAD, LEGEND, different_losses, line  # noqa: E402

from bitmoe.config.errors import InputError  # noqa: E402
from bitmoe.train.imports import imports  # noqa: E402
from bitmoe.train.launcher import launch  # noqa: E402
from bitmoe.train.quiet import quiet_libraries  # noqa: E402
from bitmoe.train.run_dir import replace_file  # noqa: E402


def main() -> int:
    """Run what the command line asks for; 1 if a layout failed or a wire changed a loss."""
    arguments = _parse()
    if arguments.rows_of:
        quiet_libraries()
        # Imports megatron-core, which is loud until here and takes seconds.
        with imports():
            from rows import measure_layout

        measure_layout(arguments.rows_of, arguments, arguments.rows)
        return 0
    try:
        for name in arguments.only:
            for variant in variants(LAYOUTS[name], arguments.groups):
                make_config(LAYOUTS[name], variant, arguments)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    print(HEAD, flush=True)
    rows, failed = [], []
    for name in arguments.only:
        status, measured = _layout(name)
        rows += measured
        for row in measured:
            print(line(row, rows), flush=True)
        if status:
            failed.append(name)
            print(f"{name:9}failed with status {status}", flush=True)
        if arguments.json:
            replace_file(arguments.json, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(LEGEND)
    wrong = different_losses(rows)
    print(*(f"WRONG: {text}" for text in wrong), *map(json.dumps, rows), sep="\n", flush=True)
    return int(bool(failed or wrong))


def _layout(name: str) -> tuple[int, list[dict]]:
    """Start the ranks of a layout; their status, and the rows they finished."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, str(HERE), *sys.argv[1:], "--rows-of", name, "--rows", str(rows)]
        status = launch(command, LAYOUTS[name].world)
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
    return status, [json.loads(text) for text in lines]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench_scaling", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the config, for all rows")
    add("--only", type=lambda text: text.split(","), metavar="NAMES", help=f"some of {','.join(LAYOUTS)}")
    add("--ranks", type=int, help="how many there may be (default: a rank for each GPU, or 2 without one)")
    add("--dense-model", default="1.3b_aligned", help="preset of the dense model (default: %(default)s)")
    add("--moe-model", default="700m", help="preset of the mixture's shape (default: %(default)s)")
    add("--moe-layers", type=int, default=12, help="its layers; 0 for the preset's (default: %(default)s, for 80 GB)")
    add("--moe", default="e8k2", help="preset of its experts (default: %(default)s)")
    add("--groups", type=int, default=8, help="quant.groups of tensor-parallel rows, beside 1 (default: %(default)s)")
    add("--seq", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    add("--micro-batch", type=int, default=8, help="sequences of a micro-batch (default: %(default)s)")
    add("--warmup", type=int, default=4, help="steps in front of those that are timed (default: %(default)s)")
    add("--steps", type=int, default=6, help="steps that are timed (default: %(default)s)")
    add("--json", type=Path, help="also write the JSON lines to this file, after every layout")
    add("--rows-of", help=argparse.SUPPRESS)
    add("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    ranks = arguments.ranks or torch.cuda.device_count() or 2
    fitting = [name for name, layout in LAYOUTS.items() if layout.world <= ranks]
    arguments.only = arguments.only or fitting
    for name in arguments.only:
        if name not in fitting:
            parser.error(f"{name!r} is none of {', '.join(fitting)}, which {ranks} ranks allow")
    return arguments


if __name__ == "__main__":
    sys.exit(main())

"""Whole training steps on one GPU, bitmoe beside what people train with today, on random tokens.

    python tools/bench_step                                     # the 1.3B shape, 8 sequences of 2,048 tokens
    python tools/bench_step --seq 8192 --micro-batch 2 --ffn 5460
    python tools/bench_step --trainers bitmoe-8bit,megatron-bf16 --moe
    python tools/bench_step --profile bitmoe-8bit --layers 4    # kernels of three steps
    python tools/bench_step --layer --model 7b --micro-batch 4  # one layer: time, activations it holds

Every trainer is built, warmed up, timed and freed in this one process, one after the other, and does a whole step:
forward, backward, clipping of the gradient norm, Adam. Times are medians over steps that begin and end with an idle
GPU. FLOPs are model FLOPs, the same for all trainers of a shape: matrix products, attention under a causal mask, no
recomputation. With ``--layer``, forward and backward of a single layer are timed instead (its weights' codes included;
as a CUDA graph, where it can be recorded), and the bytes it leaves for its backward are counted. Words without a dash
in front are overrides of ``bitmoe pretrain``'s config, for all trainers.
"""

import argparse
import sys
from pathlib import Path

from registry import TRAINERS

from bitmoe.train.imports import imports
from bitmoe.train.quiet import quiet_libraries

# kernels/bench is no part of an installed bitmoe.
sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))


def main() -> int:
    """Run what the command line asks for; 1 if a trainer failed."""
    arguments = _parse()
    quiet_libraries()
    # Imports megatron-core, which is loud until here and takes seconds.
    with imports():
        from runs import run
    return run(arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench_step", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the config, for all trainers")
    add("--trainers", type=_names, metavar="NAMES", help=f"some of {','.join(TRAINERS)}; by default all that can")
    add("--model", help="preset of the shape (1.3b_aligned; with --moe 700m)")
    add("--moe", action="store_true", help="eight experts, two for each token (moe=e8k2)")
    add("--seq", type=int, default=2048, help="tokens of a sequence")
    add("--micro-batch", type=int, default=8, help="sequences of a step")
    add("--layers", type=int, help="instead of the preset's")
    add("--ffn", type=int, help="inner width of the FFN, instead of the preset's")
    add("--warmup", type=int, default=5, help="steps in front of those that are timed")
    add("--steps", type=int, default=15, help="steps that are timed")
    add("--json", type=Path, help="also write the results to this file, after every trainer")
    add("--profile", choices=TRAINERS, metavar="NAME", help="print the GPU kernels of this trainer instead")
    add("--layer", action="store_true", help="time one layer and measure its activations instead")
    arguments = parser.parse_intermixed_args()
    arguments.mode = "profile" if arguments.profile else "layer" if arguments.layer else "step"
    if arguments.layer and arguments.layers:
        parser.error(f"--layer takes a model of one layer, not of {arguments.layers}: leave --layers out")
    if arguments.profile:
        arguments.trainers = [arguments.profile]
    elif not arguments.trainers:
        arguments.trainers = [name for name, entry in TRAINERS.items() if not (arguments.moe and entry.is_dense_only)]
    return arguments


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in TRAINERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(TRAINERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())

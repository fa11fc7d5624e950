"""Routed experts of one layer, forward and backward, whole: bitmoe's against bf16 SwiGLU experts.

    PYTHONPATH=.:kernels python tools/bench_moe

A pass takes tokens in bf16 and their routing, and gives the output and the gradients of tokens, probabilities and
weights: quantization, copies of rows, both linears, activation, weighted sums and all of their backward. Ours
ternarizes its weights in every pass (one micro-batch a step). FLOPs are those of gate, up and down, for all the same.
Passes are replayed as CUDA graphs; what cannot be recorded is timed by events, and the table says so.

Nothing is printed unless output and gradients are close to fp64, with an expert that gets no token among them. A
baseline that is not installed, does not run or is not close is left out with the reason. Liger's kernels are not tuned
unless LIGER_FUSED_MOE_AUTOTUNE=1 is set: that takes minutes.
"""

import argparse
import json
import sys
from pathlib import Path

# kernels/bench is no part of an installed bitmoe.
sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))

from bench.harness import free, machine, require_gpu
from bench.shapes import LARGE_MOE_LAYERS, MOE_LAYERS
from bitmoe.train.quiet import quiet_libraries


def main() -> None:
    """Check, time, print."""
    layers = {layer.title: layer for layer in [*MOE_LAYERS, *LARGE_MOE_LAYERS]}
    parser = argparse.ArgumentParser("bench_moe", description=__doc__.partition("\n")[0])
    shapes = f"shapes that hold this text, of {', '.join(layers)}"
    parser.add_argument("--only", default="", metavar="TEXT", help=shapes)
    parser.add_argument("--bf16-backward", action="store_true", help="time quant.backward=bf16, too")
    arguments = parser.parse_args()
    require_gpu()
    quiet_libraries()
    # These import megatron-core, which is loud until here.
    from moe_runs import TIMED, VARIANTS, check_ours, check_pipeline, time_layer

    from bitmoe.parallel.alone import alone

    about = {"bench": "moe", **machine()}
    with alone() as groups:
        check_pipeline("cuda")
        variants = tuple(VARIANTS) if arguments.bf16_backward else TIMED
        found = check_ours(groups, "cuda", variants)
        for variant, figures in found.items():
            worst = min(figures, key=lambda what: figures[what].cosine)
            print(f"{variant}: y within {figures['y'].relative_error:.4f} of fp64; {worst} {figures[worst].cosine:.6f}")
        print(json.dumps({**about, "close": found}))
        for layer in [layer for title, layer in layers.items() if arguments.only in title]:
            free()
            print(json.dumps({**about, **time_layer(layer, groups, variants)}), flush=True)


if __name__ == "__main__":
    main()

"""Checks and times every contender, shape by shape."""

from collections.abc import Callable, Sequence

import torch
from bf16_experts import BASELINES, CANNOT_RECORD, FASTEST, grouped_swiglu, swiglu_pass
from fp64_experts import compare, require_close, require_idle, swiglu_truth, ternary_truth
from moe_inputs import Inputs, make_inputs
from ternary_experts import EPS, LEAVES, ternary_pass

from bench.harness import Closeness, Timing, closeness, first_line, free, time_pass
from bench.shapes import LARGE_MOE_LAYERS, MoELayer, share_of_floor
from bitmoe.config.choices import BackwardFormat
from bitmoe.parallel.process_groups import Groups

CHECKED = MoELayer(6, 512, 768, 2, 1000)
"""Small enough for fp64; expert IDLE_EXPERT gets no token."""
IDLE_EXPERT = 4
MIN_COSINE_OF_BASELINES = 0.999
LARGE_REPEATS = 7
# name: quant.backward and quant.groups.
VARIANTS = {
    "8-bit backward, G=1": ("8bit", 1),
    "8-bit backward, G=8": ("8bit", 8),
    "bf16 backward, G=1": ("bf16", 1),
    "bf16 backward, G=8": ("bf16", 8),
}
TIMED = ("8-bit backward, G=1", "8-bit backward, G=8")


def make_ours(variant: str, inputs: Inputs, groups: Groups) -> Callable:
    """The pass of one of VARIANTS."""
    backward, num_groups = VARIANTS[variant]
    return ternary_pass(inputs, groups, BackwardFormat[backward], num_groups)


def check_ours(
    groups: Groups,
    device: str,
    variants: Sequence[str],
    layer: MoELayer = CHECKED,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, dict[str, Closeness]]:
    """Variants against fp64 from codes; stops where one is not close."""
    inputs, found = make_inputs(layer, device, dtype, IDLE_EXPERT, seed=1), {}
    for variant in variants:
        num_groups = VARIANTS[variant][1]
        y_TH, gradients = make_ours(variant, inputs, groups)()
        gradients = dict(zip(LEAVES, gradients, strict=True))
        found[variant] = compare(y_TH, gradients, ternary_truth(inputs, num_groups, EPS))
        require_close(variant, found[variant])
        require_idle(variant, gradients, IDLE_EXPERT)
    return found


def check_pipeline(device: str, layer: MoELayer = CHECKED) -> None:
    """The eager bf16 pipeline against fp64; the other baselines are held against it at the shapes that are timed."""
    inputs = make_inputs(layer, device, idle_expert=IDLE_EXPERT, seed=1)
    y_TH, gradients = swiglu_pass(inputs, grouped_swiglu)()
    true_y, true = swiglu_truth(inputs)
    true["probs"] = true["probs"].gather(1, inputs.experts_TK)
    require_close("the bf16 pipeline", compare(y_TH, dict(zip(true, gradients, strict=True)), (true_y, true)))


def check_baseline(run: Callable, inputs: Inputs) -> None:
    """Hold a baseline's output and gradients of tokens and probabilities against the eager pipeline's.

    Raises:
        ValueError: they are not close.
    """
    results = []
    for one_pass in (run, swiglu_pass(inputs, grouped_swiglu)):
        y_TH, (dx_TH, dprobs_TK, *_) = one_pass()
        results.append({"y": y_TH, "dx": dx_TH, "dprobs": dprobs_TK})
    for what, actual in results[0].items():
        cosine = closeness(actual, results[1][what]).cosine
        if not cosine > MIN_COSINE_OF_BASELINES:
            raise ValueError(f"{what} has cosine {cosine:.6f} with the eager pipeline's")


def time_layer(layer: MoELayer, groups: Groups, variants: Sequence[str]) -> dict:
    """Time baselines and variants at one shape, print a row as soon as it is known, and return the results."""
    is_large = layer in LARGE_MOE_LAYERS
    inputs, rows, skipped = make_inputs(layer, "cuda"), [], {}
    repeats = {"repeats": LARGE_REPEATS} if is_large else {}
    print(f"\n{layer.title:40}{'ms':>9}{'TFLOP/s':>9}{'of floor':>10}", flush=True)
    for title in [FASTEST] if is_large else BASELINES:
        try:
            run = swiglu_pass(inputs, BASELINES[title]())
            check_baseline(run, inputs)
            timing = time_pass(run, can_record=title not in CANNOT_RECORD, **repeats)
            rows.append(print_row(layer, title, "bf16", timing))
        except Exception as error:
            skipped[title] = first_line(error)
            print(f"{title:40}left out: {skipped[title]}", flush=True)
        run = None
        torch.compiler.reset()
        free()
    for variant in variants:
        rows.append(print_row(layer, variant, "ours", time_pass(make_ours(variant, inputs, groups), **repeats)))
        free()
    print_ratios(rows)
    return {"shape": layer.title, "results": rows, "skipped": skipped}


def print_row(layer: MoELayer, name: str, kind: str, timing: Timing) -> dict:
    """Print one contender's time and rate; returns its result."""
    tflops = round(1e-9 * layer.flops / timing.ms, 1)
    note = "" if timing.how == "graph" else f"  ({timing.how})"
    share = share_of_floor(timing.ms, layer.flops, _bf16_share(name, kind))
    print(f"{name:40}{timing.ms:9.3f}{tflops:9.0f}{share:10.0%}{note}", flush=True)
    return {"name": name, "kind": kind, **timing._asdict(), "tflops": tflops, "of_floor": share}


def _bf16_share(name: str, kind: str) -> float:
    """Of the nine products of a pass: all, the backward's six, or with groups the weight gradient of down."""
    if kind == "bf16":
        return 1.0
    backward, num_groups = VARIANTS[name]
    return 6 / 9 if backward == "bf16" else (1 / 9 if num_groups > 1 else 0.0)


def print_ratios(rows: list[dict]) -> None:
    """How many times the fastest of bf16 each of ours is."""
    bf16 = [row["ms"] for row in rows if row["kind"] == "bf16"]
    for row in rows:
        if bf16 and row["kind"] == "ours":
            print(f"{row['name']}: {min(bf16) / row['ms']:.2f}x of the fastest bf16", flush=True)

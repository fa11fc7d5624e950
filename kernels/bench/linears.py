"""Linears of one layer, forward and backward: bf16 cuBLAS against 8-bit products with their quantization.

    PYTHONPATH=kernels python kernels/bench/linears.py           # tables and a JSON line for each shape
    PYTHONPATH=kernels python kernels/bench/linears.py --tiles   # rates of the INT8 kernel by tile, nothing else

Shapes are those of ``shapes.py``. Both sides call plain functions (no autograd) in one process, linear by linear: a
pass reads and writes more than L2 holds, so nothing it reads is left there from the pass before. Whole passes are
replayed as CUDA graphs; stages are timed by events. Ours pays for everything: activations quantized, weights ternarized
(once a pass: one micro-batch), transposed copies, dY rounded. With G > 1
linears with INT8 inputs have their weight gradient in bf16, as the layers do. At one shape the other ways to train
such linears are timed, too: see ``baselines.py``.
No number is printed unless the products are exact and the gradients close to fp64.
"""

import itertools
import json
import sys
from collections.abc import Callable
from functools import cache, partial

import torch
from baselines import BASELINES, check_baseline, layer_pass
from harness import Mark, Timing, first_line, free, machine, require, require_gpu, time_pass, time_stages
from shapes import (
    ALL_BASELINES,
    COLUMN_LINEARS,
    DENSE_LAYERS,
    LINEAR_RUNS,
    bf16_share_of_linears,
    linear_flops,
    linear_shapes,
    share_of_floor,
)

from bitmoe_kernels.act_quant import dequantize, quantize_int4, quantize_int8
from bitmoe_kernels.ternary_gemm import (
    input_grad,
    int8_weight_grad,
    quantize_grad,
    scaled_code_matmul,
    weight_grad,
)
from bitmoe_kernels.weight_quant import TernaryOperands, absmean_scale, absmean_sums, ternarize, ternary_operands

# Shapes: T = tokens, I = inputs, O = outputs, G = groups of inputs; "..." = no dimension, or experts.

# Of the stage tables and the checks; projections side by side are the same in every layer.
NUM_TOKENS = 8192
HIDDEN, FFN = DENSE_LAYERS["7B"]
LINEARS = linear_shapes(DENSE_LAYERS["7B"])
MIN_COSINE = 0.999
FLOAT8 = torch.float8_e4m3fn
CONTRACTED = sorted({shape.inputs for layer in DENSE_LAYERS.values() for shape in linear_shapes(layer).values()})
# name: groups of the inputs of row-parallel linears.
VARIANTS = {"8-bit G=1": 1, "8-bit G=8": 8}


@cache
def scale_ids(num_outputs: int, projections: int, device: torch.device) -> torch.Tensor:
    """The projection of each output row, int64 [O]."""
    return torch.arange(projections, device=device).repeat_interleave(num_outputs // projections)


def ternary_weight(
    w_OI: torch.Tensor, is_column: bool, parts: int, row_dtype: torch.dtype
) -> tuple[TernaryOperands, torch.Tensor]:
    """Codes of [..., O, I] by row and by column; scales of each output [..., O], or of each group of inputs [..., G].

    ``parts`` is the number of projections, or of groups.
    """
    dim, num_outputs = 0 if is_column else 1, w_OI.shape[-2]
    ids_O = scale_ids(num_outputs, parts, w_OI.device) if is_column else None
    scale = absmean_scale(absmean_sums(w_OI, parts, dim), num_outputs * w_OI.shape[-1] // parts, ids_O)
    return ternary_operands(w_OI, scale, dim, row_dtype, with_columns=True), scale


def eight_bit_pass(name: str, x_TI, w_OI, dy_TO, mark: Mark, groups: int = 1):
    """One ternary linear forward and backward; ``mark(stage)`` is called after each stage. Returns y, dX, dW."""
    is_column = name in COLUMN_LINEARS
    x_codes, x_scale = quantize_int4(x_TI, FLOAT8) if is_column else quantize_int8(x_TI, groups)
    mark("quantize x")
    weight, w_scale = ternary_weight(w_OI, is_column, LINEARS[name][2] if is_column else groups, x_codes.dtype)
    mark("ternarize w")
    y_TO = scaled_code_matmul(x_codes, x_scale, weight.rows, w_scale)
    mark("forward product")
    grad = quantize_grad(dy_TO, w_scale, x_scale) if is_column else quantize_grad(dy_TO)
    mark("round dy")
    dx_TI = input_grad(grad, weight.columns, None if is_column else w_scale)
    mark("dgrad product")
    if is_column:
        dw_OI = weight_grad(grad, x_codes, w_scale)
    elif groups == 1:
        dw_OI = int8_weight_grad(dy_TO, x_codes, x_scale)
    else:
        x_dq_TI = dequantize(x_codes, x_scale, dy_TO.dtype)
        mark("dequantize x")
        dw_OI = dy_TO.T @ x_dq_TI
    mark("wgrad product")
    return y_TO, dx_TI, dw_OI


def bf16_pass(name: str, x_TI, w_OI, dy_TO, mark: Mark, is_fused: bool = True) -> None:
    """The same products in bf16, projections side by side in one product or one by one."""
    parts = 1 if is_fused else LINEARS[name][2]
    for w in w_OI.chunk(parts):
        x_TI @ w.T
    mark("forward product")
    for w, dy in zip(w_OI.chunk(parts), dy_TO.chunk(parts, 1), strict=True):
        dy @ w
    mark("dgrad product")
    for dy in dy_TO.chunk(parts, 1):
        dy.T @ x_TI
    mark("wgrad product")


def make_inputs(name: str, num_tokens: int, device: str, seed: int = 0, shapes: dict = LINEARS):
    """x [T, I], w [O, I], dy [T, O] in bf16; tokens of dy differ in size, as those of a loss do."""
    generator = torch.Generator(device).manual_seed(seed)
    outputs, inputs, _ = shapes[name]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    x_TI, w_OI = normal(num_tokens, inputs), normal(outputs, inputs) * 0.02
    dy_TO = normal(num_tokens, outputs) * normal(num_tokens, 1).exp() * 1e-4
    return x_TI.bfloat16(), w_OI.bfloat16(), dy_TO.bfloat16()


def check_exactness(device: str, all_inputs: list[int] = CONTRACTED, num_tokens: int = 200, outputs: int = 272) -> None:
    """Products of random and of worst-case codes against fp64, which is exact here; int8 also at G = 8."""
    for inputs in all_inputs:
        w = torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8, device=device)
        random_int4 = torch.randint(-8, 8, (num_tokens, inputs), dtype=torch.int8, device=device)
        random_int8 = torch.randint(-128, 128, (num_tokens, inputs), dtype=torch.int8, device=device)
        cases = [("random INT4", random_int4, w), ("random INT8", random_int8, w)]
        for value in (7, -8, 127, -128):
            cases.append((f"all {value}", torch.full_like(random_int4, value), torch.ones_like(w)))
        one_T1, one_1 = torch.ones(num_tokens, 1, device=device), torch.ones(1, device=device)
        for what, x, w_codes in cases:
            truth = x.double() @ w_codes.double().T
            for groups in (1, 8):
                ones = one_T1.expand(-1, groups), one_1.expand(groups)
                y = scaled_code_matmul(x, ones[0], w_codes, ones[1], torch.float32)
                require(torch.equal(y.double(), truth), f"INT8 product of {what}, K={inputs}, G={groups} is not exact")
            if x.min() >= -8 and x.max() <= 7:
                y = scaled_code_matmul(x.to(FLOAT8), one_T1, w_codes.to(FLOAT8), one_1)
                require(torch.equal(y, truth.bfloat16()), f"FP8 product of {what}, K={inputs} is not exact")


def check_gradients(device: str, num_tokens: int = 2048) -> dict[str, dict[str, float]]:
    """Cosine and relative Frobenius error of dX and dW against fp64 on the same ternary weights and codes."""
    report = {}
    for name, variant in itertools.product(("qkv", "o"), VARIANTS):
        groups = VARIANTS[variant]
        x, w, dy = make_inputs(name, num_tokens, device, seed=1)
        _, dx, dw = eight_bit_pass(name, x, w, dy, lambda stage: None, groups)
        is_column, projections = name in COLUMN_LINEARS, LINEARS[name][2]
        x_codes, x_scale = quantize_int4(x) if is_column else quantize_int8(x, groups)
        w_codes, w_scale = ternarize(w, projections) if is_column else ternarize(w, groups, dim=1)
        x_dq = (x_codes.double().unflatten(1, (x_scale.shape[1], -1)) * x_scale[:, :, None]).flatten(1)
        if is_column:
            w_dq = (w_codes.double().unflatten(0, (projections, -1)) * w_scale[:, None, None]).flatten(0, 1)
        else:
            w_dq = (w_codes.double().unflatten(1, (groups, -1)) * w_scale[:, None]).flatten(1)
        truths = {"dx": (dx, dy.double() @ w_dq), "dw": (dw, dy.double().T @ x_dq)}
        for what, (actual, truth) in truths.items():
            actual = actual.double()
            cosine = float((actual * truth).sum() / actual.norm() / truth.norm())
            error = float((actual - truth).norm() / truth.norm())
            require(cosine > MIN_COSINE, f"{what} of {name}, {variant}: cosine {cosine:.6f}")
            report[f"{name} {what} {variant}"] = {"cosine": round(cosine, 6), "relative_error": round(error, 5)}
    return report


def time_layer(one_pass: Callable, inputs: dict) -> dict[str, dict[str, float]]:
    """Stages of the whole layer and of each linear in it, from whole-layer passes."""

    def run(mark: Mark) -> None:
        for name, tensors in inputs.items():
            one_pass(name, *tensors, mark=lambda stage, name=name: mark(f"{name}: {stage}"))

    times = time_stages(run)
    table: dict[str, dict[str, float]] = {"layer": {"total": times.pop("total")}}
    for key, elapsed_ms in times.items():
        name, stage = key.split(": ")
        for row in (name, "layer"):
            table.setdefault(row, {})
            table[row][stage] = round(table[row].get(stage, 0.0) + elapsed_ms, 4)
    return table


def print_tables(bf16: dict, tables: dict[str, dict]) -> None:
    """Stages of the layer, then the products' rates by linear."""
    flops = {name: 2e-9 * NUM_TOKENS * outputs * inputs for name, (outputs, inputs, _) in LINEARS.items()}
    print(f"{'layer, ms':18}" + "".join(f"{title:>15}" for title in ("bf16", *tables)))
    for stage in dict.fromkeys(stage for table in tables.values() for stage in table["layer"]):
        cells = [table["layer"].get(stage) for table in (bf16, *tables.values())]
        print(f"{stage:18}" + "".join(f"{cell:15.3f}" if cell is not None else f"{'-':>15}" for cell in cells))
    print(f"\n{'products, TFLOP/s':18}" + "".join(f"{title:>15}" for title in ("bf16", *tables)))
    for name in LINEARS:
        for stage in ("forward product", "dgrad product", "wgrad product"):
            rates = [flops[name] / table[name][stage] for table in (bf16, *tables.values())]
            print(f"{name + ' ' + stage.split()[0]:18}" + "".join(f"{rate:15.0f}" for rate in rates))
    for title, table in tables.items():
        print(f"{title}: {bf16['layer']['total'] / table['layer']['total']:.3f}x of bf16")


def sweep_tiles() -> None:
    """Rates of the INT8 kernel by tile: down's forward, with one scale a row and with 8."""
    from bitmoe_kernels.ternary_gemm import triton_kernels

    # m, n, k, warps, stages.
    tiles = [(128, 256, 128, 8, 4), (128, 256, 128, 8, 3), (256, 128, 128, 8, 4), (128, 128, 128, 8, 4)]
    tiles += [(128, 128, 128, 4, 3), (128, 256, 64, 8, 6), (64, 128, 128, 4, 3)]
    a, b = (torch.randint(-128, 128, (3, rows, FFN), dtype=torch.int8, device="cuda") for rows in (NUM_TOKENS, HIDDEN))
    out = torch.empty(NUM_TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    for chunk_size in (FFN, FFN // 8):
        scale = torch.ones(NUM_TOKENS, -(-FFN // chunk_size), device="cuda")
        one = torch.ones(1, 1, device="cuda").expand(HIDDEN, scale.shape[1])
        for m, n, k, warps, stages in tiles:
            tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}

            def run(mark: Mark, chunk_size=chunk_size, scale=scale, one=one, tile=tile) -> None:
                for a_MK, b_NK in zip(a, b, strict=True):
                    triton_kernels.scaled_int8_matmul(a_MK, scale, b_NK, one, chunk_size, out, tile)
                mark("products")

            try:
                elapsed_ms = time_stages(run)["products"]
                print(chunk_size, tile, f"{6e-9 * NUM_TOKENS * HIDDEN * FFN / elapsed_ms:.0f} TOPS")
            except Exception as error:  # noqa: BLE001
                print(chunk_size, tile, f"does not run: {type(error).__name__}: {error}"[:200])


def whole_pass(one_pass: Callable, inputs: dict) -> Callable[[], None]:
    """One pass over all linears of a layer, without marks."""

    def run() -> None:
        for name, tensors in inputs.items():
            one_pass(name, *tensors, mark=lambda stage: None)

    return run


def time_sides(inputs: dict) -> dict[str, tuple[str, Timing]]:
    """Each side's kind (bf16 or ours) and the time of its pass."""
    passes = {"bf16, projections in one": ("bf16", bf16_pass)}
    passes["bf16, one by one"] = ("bf16", partial(bf16_pass, is_fused=False))
    passes |= {variant: ("ours", partial(eight_bit_pass, groups=groups)) for variant, groups in VARIANTS.items()}
    return {title: (kind, time_pass(whole_pass(one_pass, inputs))) for title, (kind, one_pass) in passes.items()}


def time_baselines(inputs: dict) -> tuple[dict[str, tuple[str, Timing]], dict[str, str]]:
    """The same of what others train with, and why some of them were left out."""
    timed, skipped = {}, {}
    for title, baseline in BASELINES.items():
        try:
            forward, weights = baseline.make(inputs)
            check_baseline(baseline, forward, weights, inputs, "o")
            timed[title] = "other", time_pass(layer_pass(forward, weights, inputs))
        except Exception as error:  # noqa: BLE001
            skipped[title] = first_line(error)
        forward = weights = None
        torch.compiler.reset()
        free()
    return timed, skipped


def run_shape(size: str, num_tokens: int) -> dict:
    """Time one layer, print its table and return its results."""
    layer = DENSE_LAYERS[size]
    shapes = linear_shapes(layer)
    inputs = {name: make_inputs(name, num_tokens, "cuda", shapes=shapes) for name in shapes}
    timed, skipped = time_sides(inputs), {}
    if (size, num_tokens) == ALL_BASELINES:
        others, skipped = time_baselines(inputs)
        timed |= others
    flops = linear_flops(layer, num_tokens)
    best_ms = min(timing.ms for kind, timing in timed.values() if kind == "bf16")
    title = f"{size} ({layer.hidden_size}, {layer.ffn_size}), {num_tokens:,} tokens"
    bf16_share = {name: 1.0 for name, (kind, _) in timed.items() if kind == "bf16"}
    bf16_share |= {name: bf16_share_of_linears(layer, groups) for name, groups in VARIANTS.items()}
    print(f"\n{title:38}{'ms':>9}{'TFLOP/s':>9}{'of floor':>10}{'of bf16':>9}")
    results = []
    for name, (kind, timing) in timed.items():
        tflops = round(1e-9 * flops / timing.ms, 1)
        note = "" if timing.how == "graph" else f"  ({timing.how})"
        row = {"name": name, "kind": kind, **timing._asdict(), "tflops": tflops}
        if name in bf16_share:
            row["of_floor"] = share_of_floor(timing.ms, flops, bf16_share[name])
        share = f"{row['of_floor']:.0%}" if "of_floor" in row else "-"
        print(f"{name:38}{timing.ms:9.3f}{tflops:9.0f}{share:>10}{best_ms / timing.ms:8.2f}x{note}", flush=True)
        results.append(row)
    for name, why in skipped.items():
        print(f"{name:38}left out: {why}")
    return {"shape": title, "results": results, "skipped": skipped}


def run_stages() -> dict[str, dict]:
    """Stage by stage at 7B: print the tables and return them."""
    inputs = {name: make_inputs(name, NUM_TOKENS, "cuda") for name in LINEARS}
    fused = time_layer(bf16_pass, inputs)
    separate = time_layer(partial(bf16_pass, is_fused=False), inputs)
    bf16 = min(fused, separate, key=lambda table: table["layer"]["total"])
    tables = {
        variant: time_layer(partial(eight_bit_pass, groups=groups), inputs) for variant, groups in VARIANTS.items()
    }
    print_tables(bf16, tables)
    return {"bf16_fused": fused, "bf16_separate": separate, **tables}


def main() -> None:
    """Check, time, print."""
    require_gpu()
    torch.manual_seed(0)
    check_exactness("cuda")
    if "--tiles" in sys.argv:
        sweep_tiles()
        return
    gradients = check_gradients("cuda")
    for what, figures in gradients.items():
        print(f"{what:24} cosine {figures['cosine']:.6f}  relative error {figures['relative_error']:.4f}")
    about = {"bench": "linears", **machine()}
    print(json.dumps({**about, "gradients": gradients, "stages": run_stages()}), flush=True)
    for size, num_tokens in LINEAR_RUNS:
        free()
        print(json.dumps({**about, **run_shape(size, num_tokens)}), flush=True)


if __name__ == "__main__":
    main()

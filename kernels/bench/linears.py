"""Linears of one 7B layer, forward and backward: bf16 cuBLAS against 8-bit products with their quantization.

    PYTHONPATH=kernels python kernels/bench/linears.py           # table and one JSON line
    PYTHONPATH=kernels python kernels/bench/linears.py --tiles   # rates of the INT8 kernel by tile, nothing else

Both sides call plain functions (no autograd) in one process, layer by layer: a pass reads and writes more than 2 GB,
so nothing it reads is left in L2 from the pass before. Times are CUDA events, medians. Ours pays for everything:
activations quantized, weights ternarized (once a pass: one micro-batch), transposed copies, dY rounded. Linears with
INT8 inputs have their weight gradient in bf16, as the layers do.
No number is printed unless the products are exact and the gradients close to fp64.
"""

import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import torch

from bitmoe_kernels.act_quant import dequantize, quantize_int4, quantize_int8
from bitmoe_kernels.ternary_gemm import input_grad, quantize_grad, scaled_code_matmul, weight_grad
from bitmoe_kernels.weight_quant import TernaryOperands, absmean_scale, absmean_sums, ternarize, ternary_operands

# Shapes: T = tokens, I = inputs, O = outputs, G = groups of inputs; "..." = no dimension, or experts.

NUM_TOKENS = 8192
HIDDEN, FFN = 4096, 11008
WARMUP, REPEATS = 3, 15
MIN_COSINE = 0.999
FLOAT8 = torch.float8_e4m3fn
# name: outputs, inputs, number of projections side by side. Column-parallel linears read INT4 codes, the others INT8.
COLUMN_LINEARS = {"qkv": (3 * HIDDEN, HIDDEN, 3), "gate_up": (2 * FFN, HIDDEN, 2)}
ROW_LINEARS = {"o": (HIDDEN, HIDDEN, 1), "down": (HIDDEN, FFN, 1)}
LINEARS = COLUMN_LINEARS | ROW_LINEARS
# name: groups of the inputs of row-parallel linears.
VARIANTS = {"8-bit G=1": 1, "8-bit G=8": 8}
Mark = Callable[[str], None]


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


def make_inputs(name: str, num_tokens: int, device: str, seed: int = 0):
    """x [T, I], w [O, I], dy [T, O] in bf16; tokens of dy differ in size, as those of a loss do."""
    generator = torch.Generator(device).manual_seed(seed)
    outputs, inputs, _ = LINEARS[name]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    x_TI, w_OI = normal(num_tokens, inputs), normal(outputs, inputs) * 0.02
    dy_TO = normal(num_tokens, outputs) * normal(num_tokens, 1).exp() * 1e-4
    return x_TI.bfloat16(), w_OI.bfloat16(), dy_TO.bfloat16()


def require(is_true: bool, what: str) -> None:
    """Stop without a number where a check fails."""
    if not is_true:
        raise SystemExit(f"refused: {what}")


def check_exactness(device: str, sizes: tuple = ((200, HIDDEN, 272), (129, FFN, 144))) -> None:
    """Products of random and of worst-case codes against fp64, which is exact here; int8 also at G = 8."""
    for num_tokens, inputs, outputs in sizes:
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


def time_stages(run: Callable[[Mark], None]) -> dict[str, float]:
    """Median milliseconds between consecutive marks of one pass, summed by stage."""
    totals: dict[str, list[float]] = {}
    for repeat in range(WARMUP + REPEATS):
        marks = [("start", torch.cuda.Event(enable_timing=True))]
        marks[0][1].record()

        def mark(stage: str, marks=marks) -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append((stage, event))

        run(mark)
        torch.cuda.synchronize()
        if repeat < WARMUP:
            continue
        elapsed: dict[str, float] = {}
        for (_, before), (stage, after) in zip(marks[:-1], marks[1:], strict=True):
            elapsed[stage] = elapsed.get(stage, 0.0) + before.elapsed_time(after)
        elapsed["total"] = marks[0][1].elapsed_time(marks[-1][1])
        for stage, elapsed_ms in elapsed.items():
            totals.setdefault(stage, []).append(elapsed_ms)
    return {stage: round(statistics.median(values), 4) for stage, values in totals.items()}


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
    """Rates of the INT8 kernel by tile: down's forward, with one scale a row and with one for each 512 k."""
    from bitmoe_kernels.ternary_gemm import triton_kernels

    tiles = [(128, 256, 128, 8, 4, 1), (128, 256, 128, 8, 3, 1), (256, 128, 128, 8, 4, 1), (128, 128, 128, 8, 4, 1)]
    tiles += [(128, 128, 128, 4, 3, 2), (128, 128, 128, 8, 3, 2), (128, 256, 64, 8, 6, 1), (64, 128, 128, 4, 3, 3)]
    a, b = (torch.randint(-128, 128, (3, rows, FFN), dtype=torch.int8, device="cuda") for rows in (NUM_TOKENS, HIDDEN))
    out = torch.empty(NUM_TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    for chunk_size in (FFN, 512):
        scale = torch.ones(NUM_TOKENS, -(-FFN // chunk_size), device="cuda")
        one = torch.ones(1, 1, device="cuda").expand(HIDDEN, scale.shape[1])
        for m, n, k, warps, stages, per_processor in tiles:
            tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}

            def run(mark: Mark, chunk_size=chunk_size, scale=scale, one=one, tile=tile, per=per_processor) -> None:
                for a_MK, b_NK in zip(a, b, strict=True):
                    triton_kernels.scaled_int8_matmul(a_MK, scale, b_NK, one, chunk_size, out, tile, per)
                mark("products")

            try:
                elapsed_ms = time_stages(run)["products"]
                print(chunk_size, tile, per_processor, f"{6e-9 * NUM_TOKENS * HIDDEN * FFN / elapsed_ms:.0f} TOPS")
            except Exception as error:  # noqa: BLE001
                print(chunk_size, tile, per_processor, f"does not run: {type(error).__name__}: {error}"[:200])


def main() -> None:
    """Check, time, print."""
    require(torch.cuda.is_available(), "this needs a GPU")
    torch.manual_seed(0)
    check_exactness("cuda")
    if "--tiles" in sys.argv:
        sweep_tiles()
        return
    gradients = check_gradients("cuda")
    for what, figures in gradients.items():
        print(f"{what:24} cosine {figures['cosine']:.6f}  relative error {figures['relative_error']:.4f}")
    inputs = {name: make_inputs(name, NUM_TOKENS, "cuda") for name in LINEARS}
    fused = time_layer(bf16_pass, inputs)
    separate = time_layer(partial(bf16_pass, is_fused=False), inputs)
    bf16 = min(fused, separate, key=lambda table: table["layer"]["total"])
    tables = {
        variant: time_layer(partial(eight_bit_pass, groups=groups), inputs) for variant, groups in VARIANTS.items()
    }
    print_tables(bf16, tables)
    result = {"bench": "linears", "tokens": NUM_TOKENS, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result |= {"triton": version("triton"), "commit": commit(), "gradients": gradients}
    result |= {"bf16_fused": fused, "bf16_separate": separate} | tables
    print(json.dumps(result))


def commit() -> str:
    """The checkout's commit, or what git says instead."""
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip()


if __name__ == "__main__":
    main()

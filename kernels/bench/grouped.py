"""Both linears of routed experts, forward and backward: bf16 torch._grouped_mm against 8-bit products.

    PYTHONPATH=kernels python kernels/bench/grouped.py           # tables and one JSON line
    PYTHONPATH=kernels python kernels/bench/grouped.py --tiles   # rates of the Triton kernels by tile, nothing else

Plain functions (no autograd), one process. Tokens are copied to their rows on both sides, as codes in ours; what comes
home and the activation between the linears are left out. Ours pays for the rest: tokens and rows quantized, weights
ternarized (once a pass: one micro-batch), transposed copies, dY rounded. With groups down, whose inputs are INT8, has
its weight gradient in bf16, as the layers do. Each variant of FP8 products is timed: torch._scaled_grouped_mm and the
Triton kernel. Times are CUDA events, medians. No number is printed unless the products are exact and the gradients
close to fp64.
"""

import itertools
import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from harness import Mark, machine, require, require_gpu, time_stages
from linears import MIN_COSINE, ternary_weight
from shapes import MOE_LAYERS, MoELayer

from bitmoe_kernels.act_quant import dequantize, quantize_int4, quantize_int8
from bitmoe_kernels.grouped_ternary_gemm import (
    grouped_input_grad,
    grouped_int8_weight_grad,
    grouped_outer,
    grouped_quantize_grad,
    grouped_scaled_code_matmul,
    grouped_weight_grad,
)
from bitmoe_kernels.grouped_ternary_gemm.float8_matmul import BACKENDS
from bitmoe_kernels.grouped_ternary_gemm.reference import grouped_transpose_codes_reference, padded_ends_reference
from bitmoe_kernels.token_permute import RowPlan, permute, plan_rows
from bitmoe_kernels.weight_quant import ternarize

# Shapes: T = tokens, R = rows (token copies) sorted by expert, E = experts, I = inputs, O = outputs, G = groups of
#         inputs.

FLOAT8 = torch.float8_e4m3fn
SMALL_LAYER = MoELayer(8, 512, 768, 2, 1024)
VARIANTS = {
    "8-bit torch FP8": {"backend": "torch"},
    "8-bit Triton FP8": {"backend": "triton"},
    "8-bit torch FP8, G=8": {"backend": "torch", "groups": 8},
}
STAGES = ("forward product", "dgrad product", "wgrad product")


def make_inputs(layer: MoELayer, seed: int = 0) -> tuple[RowPlan, dict[str, tuple]]:
    """Rows of a balanced router, and x [T, I] or (down) [R, I], w [E, O, I], dy [R, O] in bf16 of both linears."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator).mul_(size)

    logits_TE = torch.rand(layer.num_tokens, layer.num_experts, device="cuda", generator=generator)
    chosen_TK = logits_TE.topk(layer.top_k, dim=1).indices
    plan = plan_rows(torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, chosen_TK, True), layer.top_k)
    num_rows, linears = layer.num_tokens * layer.top_k, {}
    sizes = {"gate_up": (2 * layer.ffn_size, layer.hidden_size), "down": (layer.hidden_size, layer.ffn_size)}
    for name, (outputs, inputs) in sizes.items():
        dy_RO = normal(num_rows, outputs, size=1e-4).mul_(normal(num_rows, 1).exp())
        x = normal(layer.num_tokens if name == "gate_up" else num_rows, inputs)
        linears[name] = x, normal(layer.num_experts, outputs, inputs, size=0.02), dy_RO
    return plan, linears


def eight_bit_linear(name: str, plan, x, w_EOI, dy_RO, mark: Mark, backend: str = "torch", groups: int = 1):
    """One linear of all experts, forward and backward; ``mark(stage)`` is called after each. Returns y, dX, dW.

    gate and up read INT4 codes as e4m3 and have one scale each; down reads INT8 codes in ``groups`` groups.
    """
    BACKENDS.update(dict.fromkeys(BACKENDS, backend))
    is_column, ends_E = name == "gate_up", plan.ends_E
    x_codes, x_scale = quantize_int4(x, FLOAT8) if is_column else quantize_int8(x, groups)
    mark("quantize x")
    if is_column:
        x_codes, x_scale = permute(x_codes, plan), permute(x_scale, plan)
        mark("permute x")
    weight, w_scale = ternary_weight(w_EOI, is_column, 2 if is_column else groups, x_codes.dtype)
    mark("ternarize w")
    y_RO = grouped_scaled_code_matmul(x_codes, x_scale, weight.rows, w_scale, ends_E)
    mark("forward product")
    grad = grouped_quantize_grad(dy_RO, ends_E, *((w_scale, x_scale) if is_column else ()))
    mark("round dy")
    dx_RI = grouped_input_grad(grad, weight.columns, None if is_column else w_scale, ends_E)
    mark("dgrad product")
    if is_column:
        dw_EOI = grouped_weight_grad(grad, x_codes, w_scale, ends_E)
    elif groups == 1:
        dw_EOI = grouped_int8_weight_grad(dy_RO, x_codes, x_scale, ends_E)
    else:
        x_dq_RI = dequantize(x_codes, x_scale, dy_RO.dtype)
        mark("dequantize x")
        dw_EOI = grouped_outer(dy_RO, x_dq_RI, ends_E)
    mark("wgrad product")
    return y_RO, dx_RI, dw_EOI


def bf16_linear(name: str, plan, x, w_EOI, dy_RO, mark: Mark) -> None:
    """The same products by torch's grouped kernel in bf16."""
    if name == "gate_up":
        x = permute(x, plan)
        mark("permute x")
    torch._grouped_mm(x, w_EOI.transpose(1, 2), offs=plan.ends_E)
    mark("forward product")
    torch._grouped_mm(dy_RO, w_EOI, offs=plan.ends_E)
    mark("dgrad product")
    torch._grouped_mm(dy_RO.T, x, offs=plan.ends_E)
    mark("wgrad product")


def check_exactness(counts: tuple[int, ...] = (0, 300, 1, 0, 211)) -> None:
    """Forward of random and of worst-case codes against fp64, which is exact here, with experts without rows."""
    ends_E = torch.tensor(counts, device="cuda").cumsum(0).int()
    num_rows, num_experts = sum(counts), len(counts)
    for inputs, outputs in ((4096, 272), (14336, 144), (1408, 130)):
        w = torch.randint(-1, 2, (num_experts, outputs, inputs), dtype=torch.int8, device="cuda")
        x = torch.randint(-128, 128, (num_rows, inputs), dtype=torch.int8, device="cuda")
        cases = [("random INT4", x.clamp(-8, 7), w), ("random INT8", x, w)]
        cases += [(f"all {value}", torch.full_like(x, value), torch.ones_like(w)) for value in (7, -8, 127, -128)]
        for what, x_codes, w_codes in cases:
            parts = zip(x_codes.double().split(counts), w_codes.double(), strict=True)
            truth = torch.cat([rows @ matrix.T for rows, matrix in parts])
            for groups in (1, 8 if inputs % 128 == 0 else 2):
                ones = torch.ones(num_rows, groups, device="cuda"), torch.ones(num_experts, groups, device="cuda")
                for dtype in (torch.float32, torch.bfloat16):
                    y = grouped_scaled_code_matmul(x_codes, ones[0], w_codes, ones[1], ends_E, dtype)
                    is_exact = torch.equal(y, truth.to(dtype))
                    require(is_exact, f"INT8 product of {what}, K={inputs}, G={groups}, {dtype} is not exact")
            if x_codes.min() < -8 or x_codes.max() > 7:
                continue
            for backend in ("torch", "triton"):
                BACKENDS["forward"] = backend
                ones = torch.ones(num_rows, 1, device="cuda"), torch.ones(num_experts, 1, device="cuda")
                y = grouped_scaled_code_matmul(x_codes.to(FLOAT8), ones[0], w_codes.to(FLOAT8), ones[1], ends_E)
                require(torch.equal(y, truth.bfloat16()), f"{backend} FP8 product of {what}, K={inputs} is not exact")


def exact_values(codes: torch.Tensor, scale: torch.Tensor, dim: int) -> torch.Tensor:
    """codes * scale in fp64, the last dimension of scale being equal blocks of ``dim``."""
    shape = [*scale.shape[:-1], *[1] * (codes.dim() - scale.dim()), scale.shape[-1], 1]
    blocks = codes.double().movedim(dim, -1).unflatten(-1, (scale.shape[-1], -1))
    return (blocks * scale.double().view(shape)).flatten(-2).movedim(-1, dim)


def check_gradients() -> dict[str, dict[str, float]]:
    """Cosine and relative Frobenius error of dX and dW against fp64 on the same codes, over all experts."""
    report = {}
    plan, linears = make_inputs(SMALL_LAYER, seed=1)
    bounds = [0, *plan.ends_E.tolist()]
    for variant, options in VARIANTS.items():
        for name, (x, w, dy) in linears.items():
            _, dx, dw = eight_bit_linear(name, plan, x, w, dy, lambda stage: None, **options)
            groups = options.get("groups", 1)
            is_column = name == "gate_up"
            x_dq = exact_values(*(quantize_int4(x) if is_column else quantize_int8(x, groups)), 1)
            x_dq = x_dq[plan.source_R] if is_column else x_dq
            w_dq = exact_values(*ternarize(w, 2), 1) if is_column else exact_values(*ternarize(w, groups, dim=1), 2)
            rows = [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
            true_dx = torch.cat([dy[row].double() @ w_dq[e] for e, row in enumerate(rows)])
            true_dw = torch.stack([dy[row].double().T @ x_dq[row] for row in rows])
            for what, actual, truth in (("dx", dx.double(), true_dx), ("dw", dw.double(), true_dw)):
                cosine = float((actual * truth).sum() / actual.norm() / truth.norm())
                error = float((actual - truth).norm() / truth.norm())
                require(cosine > MIN_COSINE, f"{what} of {name}, {variant}: cosine {cosine:.6f}")
                report[f"{name} {what} {variant}"] = {"cosine": round(cosine, 6), "relative_error": round(error, 5)}
    return report


def time_layer(one_linear: Callable, plan: RowPlan, linears: dict) -> dict[str, float]:
    """Median milliseconds of each linear's stages, and of the pass over both."""

    def run(mark: Mark) -> None:
        for name, tensors in linears.items():
            one_linear(name, plan, *tensors, mark=lambda stage, name=name: mark(f"{name} {stage}"))

    return time_stages(run)


def print_tables(layer: MoELayer, tables: dict[str, dict[str, float]]) -> None:
    """Milliseconds of every stage, then the products' rates; the first table is bf16."""
    print(f"\n{layer.title}\n{'ms':28}" + "".join(f"{name:>22}" for name in tables))
    for stage in dict.fromkeys(stage for table in reversed(tables.values()) for stage in table):
        cells = [table.get(stage) for table in tables.values()]
        print(f"{stage:28}" + "".join(f"{cell:22.3f}" if cell is not None else f"{'-':>22}" for cell in cells))
    print(f"{'products, TFLOP/s':28}" + "".join(f"{name:>22}" for name in tables))
    down_flops = 2e-9 * layer.num_tokens * layer.top_k * layer.hidden_size * layer.ffn_size
    for name, flops in (("gate_up", 2 * down_flops), ("down", down_flops)):
        for stage in STAGES:
            rates = [flops / table[f"{name} {stage}"] for table in tables.values()]
            print(f"{name + ' ' + stage:28}" + "".join(f"{rate:22.0f}" for rate in rates))
    totals = [9 * down_flops / table["total"] for table in tables.values()]
    print(f"{'pass':28}" + "".join(f"{rate:22.0f}" for rate in totals))
    for name, table in list(tables.items())[1:]:
        print(f"{name}: {tables['bf16']['total'] / table['total']:.3f}x of bf16")


def sweep_tiles() -> None:
    """Rates of the Triton kernels by tile, for the down linear: products of rows, and e4m3 ones of columns."""
    from bitmoe_kernels.grouped_ternary_gemm.triton_kernels import grouped_matmul
    from bitmoe_kernels.ternary_gemm.triton_outer import outer

    # m, n, k, warps, stages.
    tiles = [(128, 256, 128, 8, 3), (128, 256, 128, 8, 4), (256, 128, 128, 8, 3), (128, 128, 128, 8, 4)]
    tiles += [(128, 128, 128, 4, 3), (64, 128, 128, 4, 3), (64, 256, 128, 4, 3), (64, 128, 128, 4, 4)]
    for layer in MOE_LAYERS:
        title, (plan, linears) = layer.title, make_inputs(layer)
        x_RI, w_EOI, dy_RO = linears["down"]
        flops = 2e-9 * w_EOI[0].numel() * len(x_RI)
        x_codes, x_scale = quantize_int8(x_RI)
        w_codes, w_scale = ternarize(w_EOI, 1, dim=1)
        w_scale_EO1 = w_scale[:, :, None].expand(-1, w_EOI.shape[1], 1)
        y_RO, dw_EOI = torch.empty_like(dy_RO), torch.empty_like(w_EOI)
        dy_columns, x_columns = (
            grouped_transpose_codes_reference(x, plan.ends_E) for x in (dy_RO.to(FLOAT8), x_codes.to(FLOAT8))
        )
        ones = torch.ones(w_EOI.shape[:2], device="cuda")
        columns = (dy_columns, ones, x_columns, padded_ends_reference(plan.ends_E), dw_EOI)
        for dtype in (torch.int8, FLOAT8):
            rows = (x_codes.to(dtype), x_scale, w_codes.to(dtype), w_scale_EO1, plan.ends_E, x_RI.shape[1], y_RO)
            products = {"rows": (grouped_matmul, rows)}
            if dtype == FLOAT8:
                products["columns"] = (outer, columns)
            for (what, (product, args)), shape in itertools.product(products.items(), tiles):
                tile = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), shape, strict=True))

                def run(mark: Mark, product=product, args=args, tile=tile) -> None:
                    product(*args, tile)
                    mark("product")

                try:
                    print(title, dtype, what, shape, f"{flops / time_stages(run)['product']:.0f} TOPS", flush=True)
                except Exception as error:  # noqa: BLE001
                    print(title, dtype, what, shape, f"does not run: {type(error).__name__}: {error}"[:200])


def main() -> None:
    """Check, time, print."""
    require_gpu()
    torch.manual_seed(0)
    check_exactness()
    if "--tiles" in sys.argv:
        sweep_tiles()
        return
    gradients = check_gradients()
    for what, figures in gradients.items():
        print(f"{what:36} cosine {figures['cosine']:.6f}  relative error {figures['relative_error']:.4f}")
    result = {"bench": "grouped", **machine(), "gradients": gradients, "layers": {}}
    for layer in MOE_LAYERS:
        plan, linears = make_inputs(layer)
        tables = {"bf16": time_layer(bf16_linear, plan, linears)}
        for variant, options in VARIANTS.items():
            tables[variant] = time_layer(partial(eight_bit_linear, **options), plan, linears)
        print_tables(layer, tables)
        result["layers"][layer.title] = tables
        del linears
    print(json.dumps(result))


if __name__ == "__main__":
    main()

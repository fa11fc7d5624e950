"""What others train linears with, for ``linears.py``: BitLinear by fake quantization, torchao's BitNet, FP8.

Each baseline is a function that takes the inputs of a layer's linears and returns one pass over them, forward and
backward through autograd. They pay for what ours pays for: weights and inputs are quantized in every pass. Where they
do less than ours (one scale for q, k and v together), that is to their advantage.

A baseline whose library is missing, that does not run, or whose results are not close to fp64 is left out, and the
results say why.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from harness import closeness
from shapes import COLUMN_LINEARS
from torch.nn.functional import linear

from bitmoe_kernels.act_quant import quantize_int4, quantize_int8
from bitmoe_kernels.weight_quant import ternarize

# Shapes: T = tokens, I = inputs, O = outputs.

FLOAT8, MAX_FLOAT8 = torch.float8_e4m3fn, 448.0
MIN_SCALE = 1e-5
# Quantizers that compute in bf16 move codes at the edges: closeness here tells a wrong baseline, not a coarse one.
MIN_COSINE = 0.99
Inputs = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""x [T, I], w [O, I] and dy [T, O] by linear."""
Forward = Callable[[str, torch.Tensor], torch.Tensor]
"""y [T, O] of a linear by its name and input."""


class Baseline(NamedTuple):
    """How to make a layer's linears of its weights, and what they compute."""

    make: Callable[[Inputs], tuple[Forward, dict[str, torch.Tensor]]]
    """The forward, and the weights that get gradients."""
    input_formats: tuple[str, str]
    """Of column-parallel linears and of the others: bf16, int4 or int8."""
    is_ternary: bool


def layer_pass(forward: Forward, weights: dict[str, torch.Tensor], inputs: Inputs) -> Callable[[], None]:
    """One pass over all linears, one after the other; gradients of input and weight are computed and dropped."""
    leaves = {name: x_TI.detach().requires_grad_() for name, (x_TI, _, _) in inputs.items()}

    def run() -> None:
        for name, x_TI in leaves.items():
            torch.autograd.grad(forward(name, x_TI), (x_TI, weights[name]), inputs[name][2])

    return run


def check_baseline(baseline: Baseline, forward: Forward, weights: dict, inputs: Inputs, name: str) -> None:
    """Compare one linear's result and gradients with fp64 on what the baseline is said to quantize.

    Raises:
        ValueError: they are not close.
    """
    x_TI, w_OI, dy_TO = inputs[name]
    leaf_TI = x_TI.detach().requires_grad_()
    y_TO = forward(name, leaf_TI)
    dx_TI, dw_OI = torch.autograd.grad(y_TO, (leaf_TI, weights[name]), dy_TO)
    x_dq = dequantized(x_TI, baseline.input_formats[name not in COLUMN_LINEARS])
    w_dq, dy = w_OI.double(), dy_TO.double()
    if baseline.is_ternary:
        codes, scale = ternarize(w_OI)
        w_dq = codes.double() * scale.double()
    for what, actual, truth in (("y", y_TO, x_dq @ w_dq.T), ("dx", dx_TI, dy @ w_dq), ("dw", dw_OI, dy.T @ x_dq)):
        cosine = closeness(actual, truth).cosine
        if not cosine > MIN_COSINE:
            raise ValueError(f"{what} of {name} has cosine {cosine:.6f} with fp64")


def dequantized(x_TI: torch.Tensor, input_format: str) -> torch.Tensor:
    """Codes times scale by the operators' quantizers, fp64; for bf16 the input itself."""
    if input_format == "bf16":
        return x_TI.double()
    codes, scale = {"int4": quantize_int4, "int8": quantize_int8}[input_format](x_TI)
    return codes.double() * scale.double()


def fake_quant_linear(x_TI: torch.Tensor, w_OI: torch.Tensor, is_int4: bool) -> torch.Tensor:
    """BitLinear as it is usually written: quantize and dequantize, straight-through, then a product in bf16."""
    with torch.no_grad():
        magnitude_TI = x_TI.abs()
        if is_int4:
            scale_T1, low, high = magnitude_TI.mean(-1, keepdim=True) / math.sqrt(7), -8, 7
        else:
            scale_T1, low, high = magnitude_TI.amax(-1, keepdim=True) / 127, -128, 127
        scale_T1 = scale_T1.clamp(min=MIN_SCALE)
        dx_TI = (x_TI / scale_T1).round().clamp(low, high) * scale_T1 - x_TI
        w_scale = w_OI.abs().mean().clamp(min=MIN_SCALE)
        dw_OI = (w_OI / w_scale).round().clamp(-1, 1) * w_scale - w_OI
    return linear(x_TI + dx_TI, w_OI + dw_OI)


def _fake_quant(inputs: Inputs, compiled: bool) -> tuple[Forward, dict[str, torch.Tensor]]:
    weights = {name: w_OI.detach().requires_grad_() for name, (_, w_OI, _) in inputs.items()}
    function = torch.compile(fake_quant_linear, dynamic=False) if compiled else fake_quant_linear
    return lambda name, x_TI: function(x_TI, weights[name], name in COLUMN_LINEARS), weights


def _torchao(inputs: Inputs) -> tuple[Forward, dict[str, torch.Tensor]]:
    """torchao's training linear, compiled: INT8 inputs throughout, INT8 products forward, bf16 backward."""
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    linears = {}
    for name, (_, w_OI, _) in inputs.items():
        module = torch.nn.Linear(*w_OI.T.shape, bias=False, device="meta")
        module.weight = torch.nn.Parameter(w_OI.detach())
        quantize_(module, bitnet_training())
        linears[name] = module
    compiled = {name: torch.compile(module, dynamic=False) for name, module in linears.items()}
    return lambda name, x_TI: compiled[name](x_TI), {name: module.weight for name, module in linears.items()}


class Float8Linear(torch.autograd.Function):
    """A linear whose three products are FP8 with a scale a row of either operand, made anew each time."""

    @staticmethod
    def forward(ctx, x_TI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TI, w_OI)
        return float8_matmul(x_TI, w_OI)

    @staticmethod
    def backward(ctx, dy_TO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TI, w_OI = ctx.saved_tensors
        return float8_matmul(dy_TO, w_OI.T), float8_matmul(dy_TO.T, x_TI.T)


def float8_matmul(a_MK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """a @ b^T in bf16: both are rounded to e4m3 row by row, and written with K contiguous."""
    (a_codes, a_scale), (b_codes, b_scale) = float8_rows(a_MK), float8_rows(b_NK)
    return torch._scaled_mm(a_codes, b_codes.T, a_scale, b_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True)


def float8_rows(x_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes, contiguous, and a scale [R, 1] for each row."""
    scale_R1 = (x_RK.abs().amax(1, keepdim=True).float() / MAX_FLOAT8).clamp(min=1e-12)
    return (x_RK.float() / scale_R1).to(FLOAT8).contiguous(), scale_R1


def _float8(inputs: Inputs) -> tuple[Forward, dict[str, torch.Tensor]]:
    weights = {name: w_OI.detach().requires_grad_() for name, (_, w_OI, _) in inputs.items()}
    function = torch.compile(Float8Linear.apply, dynamic=False)
    return lambda name, x_TI: function(x_TI, weights[name]), weights


BASELINES = {
    "fake quant, eager": Baseline(partial(_fake_quant, compiled=False), ("int4", "int8"), True),
    "fake quant, compiled": Baseline(partial(_fake_quant, compiled=True), ("int4", "int8"), True),
    "torchao bitnet_training": Baseline(_torchao, ("int8", "int8"), True),
    "FP8 row-wise, compiled": Baseline(_float8, ("bf16", "bf16"), False),
}
"""By title; the compiled ones by ``torch.compile``."""

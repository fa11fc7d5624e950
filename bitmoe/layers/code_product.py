"""Products of a ternary linear on one rank: codes forward, and the two products of the backward.

Forward: exact integer products, scales after. Backward (straight-through, BitNet a4.8 section 3): the input's gradient
is dY times the dequantized ternary weight, dense and unmasked; the weight's gradient is dY^T times the dequantized
input; scales get none. With ``quant.backward = 8bit`` dY is rounded to e4m3 for the input's gradient; for the weight's
to e4m3 or INT8, whichever the input's codes are, and not at all where INT8 inputs have more than one group.
"""

import torch

from bitmoe.layers.collectives import tree_sum
from bitmoe.quant.ternary_codes import WeightOperands
from bitmoe_kernels.act_quant import dequantize
from bitmoe_kernels.relu2_glu import relu2_glu_quantize_backward, relu2_glu_quantize_backward_codes
from bitmoe_kernels.ternary_gemm import (
    QuantizedGrad,
    code_matmul,
    input_grad,
    int8_weight_grad,
    quantize_grad,
    scaled_code_matmul,
    weight_grad,
)

# Shapes: T = tokens, I = inputs, O = outputs, G = groups of inputs, F = inner features of a
#         feed-forward.


def scaled_product(
    x_codes_TI: torch.Tensor, x_scale_TG: torch.Tensor, weight: WeightOperands, dtype: torch.dtype
) -> torch.Tensor:
    """Multiply codes with the weight's codes, then apply scales.

    Groups are added as a binary tree, so that ranks that hold some of them each can add theirs first and the sum keeps
    its bits; in order, in the product's own kernel, where rounding to bf16 would lose those bits anyway.

    Args:
        x_codes_TI: codes of the input.
        x_scale_TG: their scales.
        weight: codes, and a scale for each output (then G = 1) or for each group of inputs.
        dtype: of the result.

    Returns:
        [T, O].
    """
    num_groups = x_scale_TG.shape[1]
    if x_scale_TG.dtype == torch.float32 and (num_groups == 1 or dtype == torch.bfloat16):
        return scaled_code_matmul(x_codes_TI, x_scale_TG, weight.rows, weight.scale, dtype)
    x_codes, w_codes = x_codes_TI.chunk(num_groups, 1), weight.rows.chunk(num_groups, 1)
    w_scales = weight.scale.split(1) if num_groups > 1 else [weight.scale]

    def part(group: int) -> torch.Tensor:
        sums_TO = code_matmul(x_codes[group], w_codes[group]).to(x_scale_TG.dtype)
        return sums_TO * x_scale_TG[:, group, None] * w_scales[group]

    return tree_sum(part, num_groups).to(dtype)


def gradients(
    dy_TO: torch.Tensor, x_codes_TI: torch.Tensor, x_scale_TG: torch.Tensor, weight: WeightOperands, is_column: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input [T, I] and of the weight [O, I], in the dtype of ``dy_TO``.

    Args:
        dy_TO: gradient of the output.
        x_codes_TI: codes of the input.
        x_scale_TG: their scales.
        weight: as in ``scaled_product``; with transposed codes, the backward is the 8-bit one.
        is_column: the weight has a scale for each output, not for each group of inputs.
    """
    dtype = dy_TO.dtype
    if weight.columns is None:
        dx_TI = dy_TO @ dequantized(weight, is_column, dtype)
        return dx_TI, dy_TO.T @ dequantize(x_codes_TI, x_scale_TG, dtype)
    w_scale_O, w_scale_G = (weight.scale, None) if is_column else (None, weight.scale)
    if x_codes_TI.dtype == torch.int8:
        dx_TI = input_grad(quantize_grad(dy_TO, w_scale_O), weight.columns, w_scale_G)
        return dx_TI.to(dtype), _int8_inputs_weight_grad(dy_TO, x_codes_TI, x_scale_TG)
    grad = quantize_grad(dy_TO, w_scale_O, x_scale_TG)
    dx_TI = input_grad(grad, weight.columns, w_scale_G)
    return dx_TI.to(dtype), weight_grad(grad, x_codes_TI, w_scale_O).to(dtype)


def _int8_inputs_weight_grad(dy_TO: torch.Tensor, x_codes_TI: torch.Tensor, x_scale_TG: torch.Tensor) -> torch.Tensor:
    # For each group dY would be rounded again, which takes as long as INT8 products gain.
    if x_scale_TG.shape[1] == 1:
        return int8_weight_grad(dy_TO, x_codes_TI, x_scale_TG)
    return dy_TO.T @ dequantize(x_codes_TI, x_scale_TG, dy_TO.dtype)


def activated_gradients(
    dy_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    gain_F: torch.Tensor | None,
    rstd_TG: torch.Tensor | None,
    x_codes_TI: torch.Tensor,
    x_scale_T1: torch.Tensor,
    weight: WeightOperands,
    num_groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``gradients`` of gate and up behind their activation and sub-norm, and the gradient of the sub-norm's gain.

    Args:
        dy_TF: gradient of the normalized activations.
        gate_up_T2F: outputs of the linear.
        gain_F: of the sub-norm; None without one.
        rstd_TG: what the forward of the sub-norm returned.
        x_codes_TI: codes of the input.
        x_scale_T1: their scales.
        weight: of gate and up, with a scale for each output.
        num_groups: scales of each of the two.
    """
    if weight.columns is None or x_codes_TI.dtype == torch.int8 or num_groups > 1:
        dgate_up_T2F, dgain, _ = relu2_glu_quantize_backward(dy_TF, gate_up_T2F, gain_F, rstd_TG)
        return *gradients(dgate_up_T2F, x_codes_TI, x_scale_T1, weight, is_column=True), dgain
    w_scale_2 = weight.scale.unflatten(0, (2, -1))[:, 0]
    grad, dgain, _ = relu2_glu_quantize_backward_codes(dy_TF, gate_up_T2F, gain_F, rstd_TG, w_scale_2, x_scale_T1)
    grad, dtype = QuantizedGrad(*grad), dy_TF.dtype
    return input_grad(grad, weight.columns).to(dtype), weight_grad(grad, x_codes_TI, weight.scale).to(dtype), dgain


def dequantized(weight: WeightOperands, is_column: bool, dtype: torch.dtype) -> torch.Tensor:
    """The weight [O, I] (or [E, O, I]) that its codes and scales stand for, rounded once."""
    scale = weight.scale.unsqueeze(-1) if is_column else weight.scale.unsqueeze(-2)
    return dequantize(weight.rows, scale.expand(*weight.rows.shape[:-1], -1), dtype)

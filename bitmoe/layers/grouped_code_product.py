"""Products of the ternary linears of routed experts on one rank: ``code_product`` for rows sorted by expert."""

from typing import NamedTuple

import torch

from bitmoe.layers.code_product import dequantized
from bitmoe.layers.collectives import tree_sum
from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.quant.ternary_codes import WeightOperands
from bitmoe_kernels.act_quant import dequantize
from bitmoe_kernels.grouped_ternary_gemm import (
    GroupedQuantizedGrad,
    grouped_code_matmul,
    grouped_input_grad,
    grouped_int8_weight_grad,
    grouped_matmul,
    grouped_outer,
    grouped_quantize_grad,
    grouped_quantize_token_grad,
    grouped_scaled_code_matmul,
    grouped_weight_grad,
)
from bitmoe_kernels.relu2_glu import relu2_glu_quantize_backward, relu2_glu_quantize_backward_codes

# Shapes: R = rows (token copies) sorted by local expert, E = local experts, I = inputs, O = outputs,
#         G = groups of inputs, F = inner features of an expert.


def grouped_scaled_product(
    x_codes_RI: torch.Tensor,
    x_scale_RG: torch.Tensor,
    weight: WeightOperands,
    ends_E: torch.Tensor,
    expert_R: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply each expert's codes, then apply scales.

    Args:
        x_codes_RI: codes of the input.
        x_scale_RG: their scales.
        weight: codes [E, O, I], and a scale for each output [E, O] (then G = 1) or for each group of inputs [E, G].
        ends_E: where each expert's rows end, int32.
        expert_R: which expert each row belongs to, int32.
        dtype: of the result; groups are added as in ``scaled_product``.

    Returns:
        [R, O].
    """
    num_groups = x_scale_RG.shape[1]
    if x_scale_RG.dtype == torch.float32 and (num_groups == 1 or dtype == torch.bfloat16):
        return grouped_scaled_code_matmul(x_codes_RI, x_scale_RG, weight.rows, weight.scale, ends_E, dtype)
    x_codes, w_codes = x_codes_RI.chunk(num_groups, 1), weight.rows.chunk(num_groups, 2)
    w_scale_R = weight.scale[expert_R]

    def part(group: int) -> torch.Tensor:
        sums_RO = grouped_code_matmul(x_codes[group], w_codes[group], ends_E).to(x_scale_RG.dtype)
        return sums_RO * x_scale_RG[:, group, None] * (w_scale_R[:, group, None] if num_groups > 1 else w_scale_R)

    return tree_sum(part, num_groups).to(dtype)


class RowCodes(NamedTuple):
    """What experts' rows were multiplied from: their own codes, or those of the tokens they are copies of."""

    codes: torch.Tensor
    """[R, I], or of tokens [T, I]."""
    scale_RG: torch.Tensor
    dispatch: LocalDispatch | None = None
    """What copied tokens to rows; None where rows have codes of their own."""

    @property
    def source_R(self) -> torch.Tensor | None:
        """int32 [R]: the token of each row, if codes are those of tokens."""
        return None if self.dispatch is None else self.dispatch.source_R

    def rows(self) -> torch.Tensor:
        """Codes of rows, [R, I]."""
        return self.codes if self.dispatch is None else self.dispatch.spread(self.codes)


def grouped_gradients(
    dy_RO: torch.Tensor, x: RowCodes, weight: WeightOperands, ends_E: torch.Tensor, is_column: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input [R, I] and of the weights [E, O, I], in the dtype of ``dy_RO``; as ``gradients``."""
    dtype, dy_RO = dy_RO.dtype, dy_RO.contiguous()
    if weight.columns is None:
        dx_RI = grouped_matmul(dy_RO, dequantized(weight, is_column, dtype), ends_E)
        return dx_RI, grouped_outer(dy_RO, dequantize(x.rows(), x.scale_RG, dtype), ends_E)
    w_scale_EO, w_scale_EG = (weight.scale, None) if is_column else (None, weight.scale)
    if x.codes.dtype == torch.int8:
        dx_RI = grouped_input_grad(grouped_quantize_grad(dy_RO, ends_E, w_scale_EO), weight.columns, w_scale_EG, ends_E)
        return dx_RI.to(dtype), _int8_inputs_weight_grad(dy_RO, x.rows(), x.scale_RG, ends_E)
    grad = grouped_quantize_grad(dy_RO, ends_E, w_scale_EO, x.scale_RG)
    dx_RI = grouped_input_grad(grad, weight.columns, w_scale_EG, ends_E)
    dw_EOI = grouped_weight_grad(grad, x.codes, w_scale_EO, ends_E, source_R=x.source_R)
    return dx_RI.to(dtype), dw_EOI.to(dtype)


def _int8_inputs_weight_grad(
    dy_RO: torch.Tensor,
    x_codes_RI: torch.Tensor,
    x_scale_RG: torch.Tensor,
    ends_E: torch.Tensor,
    dispatch: LocalDispatch | None = None,
) -> torch.Tensor:
    """As in ``code_product``; with a ``dispatch`` ``dy_RO`` is that of tokens, [T, O]."""
    if x_scale_RG.shape[1] == 1:
        source_R = None if dispatch is None else dispatch.source_R
        return grouped_int8_weight_grad(dy_RO, x_codes_RI, x_scale_RG, ends_E, source_R=source_R)
    dy_RO = dy_RO if dispatch is None else dispatch.spread(dy_RO)
    return grouped_outer(dy_RO, dequantize(x_codes_RI, x_scale_RG, dy_RO.dtype), ends_E)


def spread_gradients(
    dy_TO: torch.Tensor,
    dispatch: LocalDispatch,
    x_codes_RI: torch.Tensor,
    x_scale_RG: torch.Tensor,
    weight: WeightOperands,
) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit ``grouped_gradients`` where all rows of a token have its gradient: rounded once a token.

    Args:
        dy_TO: gradient of the sum of each token's rows.
        dispatch: copies tokens to their rows.
        x_codes_RI: INT8 codes of the input.
        x_scale_RG: their scales.
        weight: codes, transposed ones too, and a scale for each group of inputs [E, G].
    """
    grad = grouped_quantize_token_grad(dy_TO, dispatch.row_TK)
    dx_RI = grouped_input_grad(grad, weight.columns, weight.scale, dispatch.ends_E)
    return dx_RI.to(dy_TO.dtype), _int8_inputs_weight_grad(dy_TO, x_codes_RI, x_scale_RG, dispatch.ends_E, dispatch)


class ActivatedGradients(NamedTuple):
    """What the backward of gate and up behind activation and sub-norm computes."""

    input_RI: torch.Tensor
    weight_EOI: torch.Tensor
    gain_EF: torch.Tensor | None
    probs_R1: torch.Tensor
    """Of the routing probabilities, fp32 (fp64 for fp64)."""


def grouped_activated_gradients(
    dy_RF: torch.Tensor,
    gate_up_R2F: torch.Tensor,
    gain_EF: torch.Tensor | None,
    rstd_RG: torch.Tensor | None,
    probs_R1: torch.Tensor,
    x: RowCodes,
    weight: WeightOperands,
    ends_E: torch.Tensor,
    expert_R: torch.Tensor,
    num_groups: int,
) -> ActivatedGradients:
    """``activated_gradients`` for rows sorted by expert, multiplied by their routing probabilities in front of down."""
    activation, where = (gate_up_R2F, gain_EF, rstd_RG), (expert_R, probs_R1, ends_E)
    if weight.columns is None or x.codes.dtype == torch.int8 or num_groups > 1:
        dgate_up_R2F, *others = relu2_glu_quantize_backward(dy_RF, *activation, *where)
        gradients = grouped_gradients(dgate_up_R2F, x, weight, ends_E, is_column=True)
        return ActivatedGradients(*gradients, *others)
    w_scale_E2, dtype = weight.scale.unflatten(1, (2, -1))[:, :, 0], dy_RF.dtype
    grad, *others = relu2_glu_quantize_backward_codes(dy_RF, *activation, w_scale_E2, x.scale_RG, *where)
    grad = GroupedQuantizedGrad(*grad)
    dx_RI = grouped_input_grad(grad, weight.columns, None, ends_E)
    dw_EOI = grouped_weight_grad(grad, x.codes, weight.scale, ends_E, source_R=x.source_R)
    return ActivatedGradients(dx_RI.to(dtype), dw_EOI.to(dtype), *others)

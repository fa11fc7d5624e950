"""A linear over packed ternary weights, and the quantization of its input.

Input and product are apart because q, k and v (and gate and up) are matrices of their own with one input, which is
quantized once. As in training, codes are multiplied exactly, scales come after. In a model without quantization the
same classes carry plain numbers.
"""

# Shapes: T = tokens (any leading dims), I = input features, G = groups of the input, i = I / G, O = output rows,
#         B = bytes of a packed row, E = experts, R = chosen experts, * = optional batch (R).

from typing import NamedTuple

import torch
from torch import nn

from bitmoe.infer.code_product import code_product
from bitmoe.infer.configuration import BitmoeConfig
from bitmoe_kernels.act_quant import quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.sparsify import topk_mask
from bitmoe_kernels.ternary_pack import pack, packed_width, unpack

_QUANTIZE = {"int8": quantize_int8, "int4": quantize_int4, "fp4": quantize_fp4}


class LinearInput(NamedTuple):
    """What linears with one input share: codes and scales, or plain numbers."""

    codes_TGi: torch.Tensor
    """int8 [T, G, i]; in a model without quantization the input itself, [T, 1, I]."""
    scale_TG1: torch.Tensor | None
    """fp32 [T, G, 1]; None without quantization."""
    dtype: torch.dtype
    """Of the input, and of what the linear returns."""

    def weighted(self, weight_T1: torch.Tensor) -> "LinearInput":
        """Each token times a number, [T, 1]; codes do not change, so their scales do."""
        weight_T11 = weight_T1.unsqueeze(-1)
        if self.scale_TG1 is None:
            return self._replace(codes_TGi=self.codes_TGi * weight_T11)
        return self._replace(scale_TG1=self.scale_TG1 * weight_T11)


def linear_input(x_TI: torch.Tensor, config: BitmoeConfig, role: str) -> LinearInput:
    """Quantize the input of the linears of a role.

    Args:
        x_TI: [T, I].
        config: number formats.
        role: ``qkv``, ``o``, ``gate_up`` or ``down``; groups, and top-K, cut the input of ``o`` and ``down``.
    """
    if config.weights == "none":
        return LinearInput(x_TI.unsqueeze(-2), None, x_TI.dtype)
    num_groups = config.quant_groups if role in ("o", "down") else 1
    x_TGi = x_TI.unflatten(-1, (num_groups, -1))
    codes_TGi, scale_TG1 = _QUANTIZE[config.input_formats[role]](x_TGi)
    if role == "o" and config.o_keep < 1:
        codes_TGi = codes_TGi * topk_mask(x_TGi, config.o_keep)
    return LinearInput(codes_TGi, scale_TG1, x_TI.dtype)


class UncastBuffers(nn.Module):
    """A module whose buffers keep their dtype when the model is cast: codes are no numbers and scales stay exact."""

    def _apply(self, fn, recurse=True):
        originals = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, original in originals.items():
            moved = getattr(self, name)
            if moved.dtype != original.dtype:
                setattr(self, name, original.to(moved.device))
        return self


class PackedLinear(UncastBuffers):
    """Ternary weight ``[O, I]`` as packed codes and G scales, or one for each expert.

    The groups of a row-parallel matrix (o, down) cut its columns, so its input comes in G groups; those of a
    column-parallel one (q, k, v, gate, up) cut its rows, and its input is whole.

    Args:
        config: number formats.
        in_features: I.
        out_features: O.
        num_experts: E; None for a single matrix.
    """

    def __init__(self, config: BitmoeConfig, in_features: int, out_features: int, num_experts: int | None = None):
        super().__init__()
        self.in_features, self.out_features, self.packing = in_features, out_features, config.packing
        lead = () if num_experts is None else (num_experts,)
        if config.weights == "none":
            self.weight = nn.Parameter(torch.empty(*lead, out_features, in_features))
            return
        width = packed_width(in_features, config.packing)
        self.register_buffer("weight", torch.zeros(*lead, out_features, width, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(*lead, config.quant_groups, dtype=torch.float32))

    def forward(self, x: LinearInput, expert: int | torch.Tensor | None = None) -> torch.Tensor:
        """The product [T, O].

        Args:
            x: from ``linear_input``.
            expert: which matrix; a tensor [R] takes one matrix for each entry and an input [R, T, ...].
        """
        weight = self.weight if expert is None else self.weight[expert]
        if x.scale_TG1 is None:
            return torch.matmul(x.codes_TGi.flatten(-2), weight.mT)
        w_scale_G = self.weight_scale if expert is None else self.weight_scale[expert]
        batch = weight.dim() - 2
        y_TO = _scaled_product(x.codes_TGi.flatten(batch, -3), x.scale_TG1.flatten(batch, -3), weight, w_scale_G)
        return y_TO.view(*x.codes_TGi.shape[:-2], -1).to(x.dtype)

    @torch.no_grad()
    def repack(self) -> None:
        """Turn codes as a file stores them into those that products read (``2bit``).

        Raises:
            ValueError: bytes that are no codes.
        """
        if self.packing == "2bit" or self.weight.is_floating_point():
            return
        # A matrix at a time: codes in between take four times the room.
        matrices = self.weight.unsqueeze(0) if self.weight.dim() == 2 else self.weight
        repacked = torch.stack([pack(unpack(matrix, self.in_features, self.packing)) for matrix in matrices])
        self.weight, self.packing = repacked.view(*self.weight.shape[:-1], -1), "2bit"


def _scaled_product(
    codes_TGi: torch.Tensor, scale_TG1: torch.Tensor, packed_OB: torch.Tensor, w_scale_G: torch.Tensor
) -> torch.Tensor:
    """Exact sums, then scales, then the sum of the groups of the input: fp32 [*, T, O]."""
    sums_GTO = code_product(codes_TGi, packed_OB)
    if codes_TGi.shape[-2] == 1:
        rows_of_group = packed_OB.shape[-2] // w_scale_G.shape[-1]
        w_scale = w_scale_G.repeat_interleave(rows_of_group, dim=-1)[..., None, None, :]
    else:
        w_scale = w_scale_G[..., None, None]
    return _sum_as_tree(sums_GTO * scale_TG1.transpose(-3, -2) * w_scale)


def _sum_as_tree(parts_GTO: torch.Tensor) -> torch.Tensor:
    """[*, T, O]: the sum of each half, added: the order that training adds in."""
    half = parts_GTO.shape[-3] // 2
    if half == 0:
        return parts_GTO.squeeze(-3)
    first_GTO, second_GTO = parts_GTO.tensor_split([half], dim=-3)
    return _sum_as_tree(first_GTO) + _sum_as_tree(second_GTO)

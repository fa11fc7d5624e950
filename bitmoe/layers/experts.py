"""Routed experts: ternary gated FFNs with scales of their own, multiplied as grouped products.

Dispatch is one autograd function with the first product: a token is quantized once, where it lives; codes travel; the
backward pass brings bf16 (or fp32) gradients home. The routing probability multiplies the input of the second product
(the scale of its codes), whose output is then weighted. Expert parallelism cuts whole experts over ranks, expert
tensor parallelism the inner features of each.
"""

import torch
import torch.distributed as dist

from bitmoe.config.choices import Activation, Recompute
from bitmoe.layers.activation import gated_activation
from bitmoe.layers.context import LayerContext
from bitmoe.layers.dispatch import Dispatch
from bitmoe.layers.grouped_code_product import (
    RowCodes,
    grouped_activated_gradients,
    grouped_gradients,
    grouped_scaled_product,
    spread_gradients,
)
from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.layers.main_grad import into_main_grad
from bitmoe.layers.norm import sub_norm
from bitmoe.layers.quantize_input import (
    DownInput,
    Quantized,
    quantize_groups,
    quantize_rows,
    stand_in,
    without_code_gradients,
)
from bitmoe.layers.sharding import ShardedParameters, mark_expert
from bitmoe.quant.policy import split_groups
from bitmoe.quant.ternary_codes import CodeCache, absmean_blocks
from bitmoe_kernels.grouped_ternary_gemm import grouped_code_matmul, grouped_matmul, grouped_outer

# Shapes: T = tokens of this rank, R = rows (token copies) sorted by local expert, E = local experts, H = hidden,
#         F = inner features on this rank, G = quantization groups on this rank.


class RoutedExperts(torch.nn.Module, ShardedParameters):
    """All experts of one layer that live on this rank.

    Weights are [E, 2, F, H] (gate, up) and [E, H, F] (down), gains [E, F]; the checkpoint sees the global tensors.

    Args:
        context: model, policy and groups.
    """

    is_expert = True

    def __init__(self, context: LayerContext):
        super().__init__()
        self.groups, self.policy = context.groups, context.policy
        self.activation, self.eps = context.model.activation, context.model.norm_eps
        num_experts = context.moe.num_experts // self.groups.ep.size()
        num_features = context.moe.ffn_hidden_size // self.groups.etp.size()
        hidden_size = context.model.hidden_size
        self.fc1_weight = context.parameter(num_experts, 2, num_features, hidden_size)
        self.fc2_weight = context.parameter(num_experts, hidden_size, num_features)
        self.sub_norm_weight = context.parameter(num_experts, num_features) if context.model.sub_norm else None
        for parameter in self.parameters():
            mark_expert(parameter, dim=0)
        self.num_groups, is_shared = split_groups(self.policy.groups, self.groups.etp.size())
        self.reduce_group = self.groups.etp if is_shared else None
        self.is_source_kept = context.recompute is not Recompute.ffn
        self.fc1_cache = CodeCache(self.policy, "gate_up", self._fc1_with_scales)
        self.fc2_cache = CodeCache(self.policy, "down", self._fc2_with_scales)

    def cuts(self) -> dict:
        """Experts are split over ep, inner features over etp."""
        ep, etp = self.groups.ep, self.groups.etp
        return {
            "fc1_weight": ((0, ep), (2, etp)),
            "fc2_weight": ((0, ep), (2, etp)),
            "sub_norm_weight": ((0, ep), (1, etp)),
        }

    def _fc1_with_scales(self):
        return absmean_blocks(self.fc1_weight.flatten(1, 2), 2 * self.num_groups, 0, self.reduce_group)

    def _fc2_with_scales(self):
        return absmean_blocks(self.fc2_weight, self.num_groups, 1, self.reduce_group)

    def forward(
        self, x_TH: Quantized | torch.Tensor, dispatch: Dispatch | LocalDispatch, probs_TE: torch.Tensor
    ) -> torch.Tensor:
        """Send this rank's tokens to their experts, compute there, bring outputs home and add them, weighted.

        Args:
            x_TH: normalized tokens of this rank, [T, H], quantized if weights are.
            dispatch: the trip to take.
            probs_TE: routing probabilities, [T, E].

        Returns:
            [T, H].
        """
        if not self.policy.is_ternary:
            gate_up, probs_R1 = _PlainDispatchedProduct.apply(x_TH, probs_TE, self.fc1_weight.flatten(1, 2), dispatch)
            x_RF = self._normalized(gate_up, dispatch)
            x_RF = (x_RF * probs_R1).to(x_RF.dtype)
            return dispatch.combine(_PlainExpertProduct.apply(x_RF, self.fc2_weight, dispatch.ends_E))
        policy = self.policy
        if isinstance(x_TH, torch.Tensor):
            x_TH = quantize_rows(x_TH, "gate_up", policy)
        operands = self.fc1_cache.operands(x_TH.codes_TD.dtype, policy.is_backward_8bit)
        x_RF = self._down_input((*x_TH, probs_TE, self.fc1_weight, operands, dispatch), dispatch)
        operands = self.fc2_cache.operands(torch.int8, policy.is_backward_8bit)
        if isinstance(dispatch, LocalDispatch) and policy.is_backward_8bit:
            return _SummedProduct.apply(*x_RF, self.fc2_weight, operands, dispatch)
        return dispatch.combine(_ExpertProduct.apply(*x_RF, self.fc2_weight, operands, dispatch, self.reduce_group))

    def _down_input(self, product: tuple, dispatch: Dispatch | LocalDispatch) -> Quantized:
        """Product with gate and up, activation, sub-norm and quantization; one function where groups are whole."""
        if self.activation is Activation.relu2_glu and self.reduce_group is None:
            down = DownInput(self.eps, self.policy, self.num_groups, self.is_source_kept)
            return Quantized(*_ActivatedProduct.apply(*product, self.sub_norm_weight, down))
        gate_up, probs_R1 = _DispatchedProduct.apply(*product)
        where = self.num_groups, self.reduce_group, probs_R1
        return quantize_groups(self._normalized(gate_up, dispatch), "down", self.policy, *where)

    def _normalized(self, gate_up: torch.Tensor, dispatch: Dispatch | LocalDispatch) -> torch.Tensor:
        """Activation and sub-norm, where there is one."""
        x_RF = gated_activation(self.activation, gate_up)
        if self.sub_norm_weight is None:
            return x_RF
        gain_RF = _RepeatedGain.apply(self.sub_norm_weight, dispatch.expert_R)
        return sub_norm(x_RF, gain_RF, self.eps, self.num_groups, self.reduce_group)


class _RepeatedGain(torch.autograd.Function):
    """Each expert's gain for each of its rows; its gradient is added up over the rows in fp32."""

    @staticmethod
    def forward(ctx, gain_EF, expert_R):
        ctx.num_experts = len(gain_EF)
        ctx.save_for_backward(expert_R)
        return gain_EF[expert_R]

    @staticmethod
    def backward(ctx, grad_RF):
        (expert_R,) = ctx.saved_tensors
        dtype = torch.promote_types(grad_RF.dtype, torch.float32)
        grad_EF = torch.zeros(ctx.num_experts, grad_RF.shape[1], dtype=dtype, device=grad_RF.device)
        return grad_EF.index_add_(0, expert_R, grad_RF.to(dtype)).to(grad_RF.dtype), None


class _PlainDispatchedProduct(torch.autograd.Function):
    """Dispatch, multiply by gate and up; gradients come home along the same way. Unquantized."""

    @staticmethod
    def forward(ctx, x_TH, probs_TE, w_EOH, dispatch):
        ones_T1 = torch.ones_like(x_TH[:, :1], dtype=torch.float32)
        rows_RH, _, probs_R1 = dispatch.send(x_TH, ones_T1, probs_TE)
        ctx.dispatch = dispatch
        ctx.save_for_backward(rows_RH, w_EOH)
        return grouped_matmul(rows_RH, w_EOH.transpose(1, 2), dispatch.ends_E), probs_R1

    @staticmethod
    def backward(ctx, grad_RO, grad_probs_R1):
        rows_RH, w_EOH = ctx.saved_tensors
        ends_E, grad_RO = ctx.dispatch.ends_E, grad_RO.contiguous()
        grads = ctx.dispatch.send_back(grouped_matmul(grad_RO, w_EOH, ends_E), grad_probs_R1)
        return *grads, grouped_outer(grad_RO, rows_RH, ends_E), None


class _PlainExpertProduct(torch.autograd.Function):
    """Multiply each expert's rows by its down projection; partial over etp. Unquantized."""

    @staticmethod
    def forward(ctx, x_RF, w_EHF, ends_E):
        ctx.save_for_backward(x_RF, w_EHF, ends_E)
        return grouped_matmul(x_RF, w_EHF.transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx, grad_RH):
        x_RF, w_EHF, ends_E = ctx.saved_tensors
        grad_RH = grad_RH.contiguous()
        return grouped_matmul(grad_RH, w_EHF, ends_E), grouped_outer(grad_RH, x_RF, ends_E), None


class _DispatchedProduct(torch.autograd.Function):
    """Dispatch codes and probabilities, multiply by gate and up; gradients come home along the same way."""

    @staticmethod
    def forward(ctx, carrier_TH, codes_TH, scale_T1, probs_TE, weight, operands, dispatch):
        x = carrier_TH, codes_TH, scale_T1, probs_TE
        kept, probs_R1, gate_up_R2F = _dispatch_and_multiply(ctx, *x, weight, operands, dispatch)
        ctx.save_for_backward(*kept)
        return gate_up_R2F, probs_R1

    @staticmethod
    def backward(ctx, grad_RO, grad_probs_R1):
        ends_E, operands, x = ctx.dispatch.ends_E, ctx.operands, _row_codes(ctx.dispatch, *ctx.saved_tensors)
        grad_RH, grad_weight = grouped_gradients(grad_RO, x, operands, ends_E, is_column=True)
        grad_TH, grad_probs_TE = ctx.dispatch.send_back(grad_RH, grad_probs_R1)
        return grad_TH, None, None, grad_probs_TE, into_main_grad(ctx.weight, grad_weight), None, None


def _dispatch_and_multiply(
    ctx, carrier_TH, codes_TH, scale_T1, probs_TE, weight, operands, dispatch
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    """What ``_row_codes`` makes rows of, their probabilities, and gate and up; ``ctx`` keeps what is no tensor."""
    ctx.dispatch, ctx.operands, ctx.weight = dispatch, operands, weight
    rows_RH, scale_R1, probs_R1 = dispatch.send(codes_TH, scale_T1, probs_TE)
    where = dispatch.ends_E, dispatch.expert_R
    gate_up_R2F = grouped_scaled_product(rows_RH, scale_R1, operands, *where, carrier_TH.dtype)
    # Where rows are copies of tokens of this rank, codes are kept once a token.
    kept_codes = codes_TH if isinstance(dispatch, LocalDispatch) else rows_RH
    return (kept_codes, scale_R1), probs_R1, gate_up_R2F


def _row_codes(dispatch: Dispatch | LocalDispatch, codes: torch.Tensor, scale_R1: torch.Tensor) -> RowCodes:
    return RowCodes(codes, scale_R1, dispatch if isinstance(dispatch, LocalDispatch) else None)


class _ActivatedProduct(torch.autograd.Function):
    """``_DispatchedProduct``, and the quantized input of down; the backward activates (multiplies) again."""

    @staticmethod
    def forward(ctx, carrier_TH, codes_TH, scale_T1, probs_TE, weight, operands, dispatch, gain_EF, down: DownInput):
        x = carrier_TH, codes_TH, scale_T1, probs_TE
        kept, probs_R1, gate_up_R2F = _dispatch_and_multiply(ctx, *x, weight, operands, dispatch)
        codes_RF, scale_RG, rstd_RG = down.quantize(gate_up_R2F, gain_EF, dispatch.expert_R, probs_R1)
        ctx.num_groups = down.num_groups
        ctx.save_for_backward(*kept, gate_up_R2F if down.is_source_kept else None, gain_EF, rstd_RG, probs_R1)
        without_code_gradients(ctx, codes_RF, scale_RG)
        return stand_in(gate_up_R2F, codes_RF.shape), codes_RF, scale_RG

    @staticmethod
    def backward(ctx, grad_RF, *unused):
        *kept, gate_up_R2F, gain_EF, rstd_RG, probs_R1 = ctx.saved_tensors
        x, where = _row_codes(ctx.dispatch, *kept), (ctx.dispatch.ends_E, ctx.dispatch.expert_R)
        if gate_up_R2F is None:
            gate_up_R2F = grouped_scaled_product(x.rows(), x.scale_RG, ctx.operands, *where, grad_RF.dtype)
        activation = gate_up_R2F, gain_EF, rstd_RG, probs_R1
        grad = grouped_activated_gradients(grad_RF, *activation, x, ctx.operands, *where, ctx.num_groups)
        grad_gain_EF = None if gain_EF is None else grad.gain_EF.to(gain_EF.dtype)
        grad_TH, grad_probs_TE = ctx.dispatch.send_back(grad.input_RI, grad.probs_R1)
        grad_weight = into_main_grad(ctx.weight, grad.weight_EOI)
        return grad_TH, None, None, grad_probs_TE, grad_weight, None, None, grad_gain_EF, None


class _SummedProduct(torch.autograd.Function):
    """``_ExpertProduct`` and the sum of each token's rows, on one rank, for the 8-bit backward."""

    @staticmethod
    def forward(ctx, carrier_RF, codes_RF, scale_RG, weight, operands, dispatch: LocalDispatch):
        ctx.dispatch, ctx.operands, ctx.weight = dispatch, operands, weight
        ctx.save_for_backward(codes_RF, scale_RG)
        where = dispatch.ends_E, dispatch.expert_R
        return dispatch.sum(grouped_scaled_product(codes_RF, scale_RG, operands, *where, carrier_RF.dtype))

    @staticmethod
    def backward(ctx, grad_TH):
        dispatch, x = ctx.dispatch, ctx.saved_tensors
        grads = spread_gradients(grad_TH.contiguous(), dispatch, *x, ctx.operands)
        return grads[0], None, None, into_main_grad(ctx.weight, grads[1]), None, None


class _ExpertProduct(torch.autograd.Function):
    """Multiply each expert's codes by its down projection; partial over etp."""

    @staticmethod
    def forward(
        ctx,
        carrier_RF,
        codes_RF,
        scale_RG,
        weight,
        operands,
        dispatch,
        reduce_group: dist.ProcessGroup | None,
    ):
        ctx.dispatch, ctx.operands, ctx.weight = dispatch, operands, weight
        ctx.save_for_backward(codes_RF, scale_RG)
        where, dtype = (dispatch.ends_E, dispatch.expert_R), carrier_RF.dtype
        if reduce_group is None:
            return grouped_scaled_product(codes_RF, scale_RG, operands, *where, dtype)
        # One group over all etp ranks: add integers before scaling, and hand the sum on from one rank only.
        sums_RH = grouped_code_matmul(codes_RF, operands.rows, dispatch.ends_E)
        dist.all_reduce(sums_RH, group=reduce_group)
        sums_RH = sums_RH if reduce_group.rank() == 0 else torch.zeros_like(sums_RH)
        return (sums_RH.to(scale_RG.dtype) * scale_RG * operands.scale[dispatch.expert_R]).to(dtype)

    @staticmethod
    def backward(ctx, grad_RH):
        ends_E, operands = ctx.dispatch.ends_E, ctx.operands
        x = RowCodes(*ctx.saved_tensors)
        grad_RF, grad_weight = grouped_gradients(grad_RH, x, operands, ends_E, is_column=False)
        return grad_RF, None, None, into_main_grad(ctx.weight, grad_weight), *[None] * 3

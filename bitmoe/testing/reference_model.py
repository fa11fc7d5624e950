"""The whole language model on one page of plain torch: what every layout and every kernel is tested against.

One process, no megatron, nothing from ``bitmoe.layers``: the model is written down a second time, the simple way. It
takes the weights by their names in a checkpoint and the formulas from the reference quantizers of ``bitmoe_kernels``.

Two ideas carry it. A quantization group is a BitLinear of its own: a column-parallel linear with G groups puts the
outputs of G BitLinears side by side, a row-parallel one adds those of G BitLinears, each over its own slice of the
input. And straight-through is an addition of zero: ``straight_through(value, x)`` has the value of ``value`` and the
gradient of ``x``, so the forward multiplies codes exactly and autograd differentiates the dequantized product.

Not here, because they are no part of the function: load balancing losses, dropping of tokens, dropout.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from bitmoe.config.choices import ActFormat, Activation, Score, WeightFormat
from bitmoe.config.schema import Config
from bitmoe_kernels.act_quant.reference import (
    quantize_fp4_reference,
    quantize_int4_reference,
    quantize_int8_reference,
)
from bitmoe_kernels.relu2_glu.reference import relu2_glu_reference
from bitmoe_kernels.sparsify.reference import topk_mask_reference
from bitmoe_kernels.ternary_gemm.reference import code_matmul_reference
from bitmoe_kernels.weight_quant.reference import (
    absmean_scale_reference,
    absmean_sums_reference,
    ternary_codes_reference,
)

# Shapes: B = batch, S = sequence, T = tokens (any leading dims), H = hidden, V = vocabulary, N = query heads,
#         K = key/value heads, D = width of a head, I = input features, O = output features, F = inner features of a
#         feed-forward, E = experts, k = experts of a token.

_QUANTIZE = {
    ActFormat.int8: quantize_int8_reference,
    ActFormat.int4: quantize_int4_reference,
    ActFormat.fp4: quantize_fp4_reference,
}


class ReferenceModel:
    """BitNet language model, dense or mixture of experts.

    Args:
        config: model, experts and the first stage of quantization; the layout in it means nothing here.
        weights: global tensors by their checkpoint names, layers stacked in front; all of one dtype, fp32 or fp64,
            which is the dtype of the computation. Gradients go to those that require one.
    """

    def __init__(self, config: Config, weights: dict[str, torch.Tensor]):
        self.model, self.moe, self.quant = config.model, config.moe, config.quant
        self.weights, self.stage = weights, config.quant.stages[0]

    def loss(self, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats per token."""
        return cross_entropy(self.logits(tokens_BS).flatten(0, 1), labels_BS.flatten())

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Next-token logits [B, S, V]; V is the padded vocabulary."""
        embedding_VH = self.weights["embedding.word_embeddings.weight"]
        x_BSH = embedding_VH[tokens_BS]
        for layer in range(self.model.num_layers):
            x_BSH = x_BSH + self._attention(self._norm(x_BSH, "input_layernorm.weight", layer), layer)
            x_BSH = x_BSH + self._feed_forward(self._norm(x_BSH, "pre_mlp_layernorm.weight", layer), layer)
        x_BSH = rms_norm(x_BSH, self.weights["decoder.final_layernorm.weight"], self.model.norm_eps)
        return x_BSH @ (embedding_VH if self.model.tie_embeddings else self.weights["output_layer.weight"]).T

    def _weight(self, name: str, layer: int) -> torch.Tensor:
        return self.weights[f"decoder.layers.{name}"][layer]

    def _norm(self, x_BSH: torch.Tensor, name: str, layer: int) -> torch.Tensor:
        return rms_norm(x_BSH, self._weight(name, layer), self.model.norm_eps)

    def _attention(self, x_BSH: torch.Tensor, layer: int) -> torch.Tensor:
        """Causal attention with grouped queries and rotary positions: [B, S, H] to the same shape."""
        model = self.model
        num_heads, num_kv_heads = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
        head_dim, queries_per_kv = model.head_dim or model.hidden_size // num_heads, num_heads // num_kv_heads
        # The fused weight holds, for one key/value head after the other, its query heads, its key, its value.
        fused_OH = self._weight("self_attention.linear_qkv.weight", layer)
        heads = fused_OH.unflatten(0, (num_kv_heads, queries_per_kv + 2, head_dim))
        w_q, w_k, w_v = (part.flatten(0, 2) for part in heads.split([queries_per_kv, 1, 1], dim=1))
        q, k, v = (self._column_linear(x_BSH, w, "qkv").unflatten(-1, (-1, head_dim)) for w in (w_q, w_k, w_v))
        q, k = rotate(q, model.rope_theta), rotate(k, model.rope_theta)
        k, v = (t.repeat_interleave(queries_per_kv, dim=2) for t in (k, v))
        out_BNSD = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        out_BSI = out_BNSD.transpose(1, 2).flatten(2)
        w_o = self._weight("self_attention.linear_proj.weight", layer)
        gain = self._weight("self_attention.linear_proj.sub_norm.weight", layer) if model.sub_norm else None
        return self._row_linear(out_BSI, w_o, gain, "o")

    def _feed_forward(self, x_BSH: torch.Tensor, layer: int) -> torch.Tensor:
        if not self.moe.num_experts:
            return self._dense("mlp", x_BSH, layer)
        y_BSH = self._routed_experts(x_BSH.flatten(0, 1), layer).view_as(x_BSH)
        return y_BSH + self._dense("mlp.shared_experts", x_BSH, layer) if self.moe.shared_expert_size else y_BSH

    def _dense(self, name: str, x_TH: torch.Tensor, layer: int) -> torch.Tensor:
        """The feed-forward of a dense layer, or the shared expert."""
        gain = self._weight(f"{name}.linear_fc2.sub_norm.weight", layer) if self.model.sub_norm else None
        w_gate_up = self._weight(f"{name}.linear_fc1.weight", layer)
        return self._gated(x_TH, w_gate_up, self._weight(f"{name}.linear_fc2.weight", layer), gain)

    def _gated(
        self,
        x_TH: torch.Tensor,
        w_gate_up_2FH: torch.Tensor,
        w_down_HF: torch.Tensor,
        gain_F: torch.Tensor | None,
        prob_T1: torch.Tensor | None = None,
    ) -> torch.Tensor:
        gate_TF, up_TF = (self._column_linear(x_TH, w_FH, "gate_up") for w_FH in w_gate_up_2FH)
        is_relu2 = self.model.activation is Activation.relu2_glu
        x_TF = relu2_glu_reference(gate_TF, up_TF) if is_relu2 else silu(gate_TF) * up_TF
        return self._row_linear(x_TF, w_down_HF, gain_F, "down", prob_T1)

    def _routed_experts(self, x_TH: torch.Tensor, layer: int) -> torch.Tensor:
        """Every token's experts, weighted by their probabilities and added in the order of the experts: [T, H]."""
        probs_Tk, experts_Tk = self._route(x_TH, layer)
        w_gate_up_E2FH = self._weight("mlp.experts.fc1_weight", layer)
        w_down_EHF = self._weight("mlp.experts.fc2_weight", layer)
        gain_EF = self._weight("mlp.experts.sub_norm_weight", layer) if self.model.sub_norm else None
        y_TH = torch.zeros_like(x_TH)
        for expert in range(self.moe.num_experts):
            tokens, choice = (experts_Tk == expert).nonzero(as_tuple=True)
            gain_F = None if gain_EF is None else gain_EF[expert]
            prob_T1 = probs_Tk[tokens, choice, None]
            out = self._gated(x_TH[tokens], w_gate_up_E2FH[expert], w_down_EHF[expert], gain_F, prob_T1)
            y_TH = y_TH.index_add(0, tokens, out)
        return y_TH

    def _route(self, x_TH: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and numbers of each token's experts, [T, k] each, as megatron-core computes them (in fp32)."""
        logits_TE = x_TH @ self._weight("mlp.router.weight", layer).T
        if self.moe.score is Score.softmax:
            chosen_Tk, experts_Tk = logits_TE.topk(self.moe.router_topk, dim=-1)
            probs_Tk = chosen_Tk.float().softmax(-1)
        else:
            scores_TE = logits_TE.float().sigmoid()
            biased_TE = scores_TE + self._weight("mlp.router.expert_bias", layer) if self.moe.expert_bias else scores_TE
            experts_Tk = biased_TE.topk(self.moe.router_topk, dim=-1).indices
            probs_Tk = scores_TE.gather(-1, experts_Tk)
            if self.moe.router_topk > 1:
                probs_Tk = probs_Tk / (probs_Tk.sum(-1, keepdim=True) + 1e-20)
        return probs_Tk.to(x_TH.dtype) * (self.moe.scaling_factor or 1.0), experts_Tk

    def _column_linear(self, x_TI: torch.Tensor, w_OI: torch.Tensor, role: str) -> torch.Tensor:
        """A linear whose G groups are blocks of output rows: [T, O]."""
        if self.quant.weights is WeightFormat.none:
            return x_TI @ w_OI.T
        return torch.cat([self._bit_linear(x_TI, w, role) for w in w_OI.chunk(self.quant.groups)], dim=-1)

    def _row_linear(
        self,
        x_TI: torch.Tensor,
        w_OI: torch.Tensor,
        gain_I: torch.Tensor | None,
        role: str,
        prob_T1: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A linear whose G groups are blocks of input features, each with its sub-norm, scales and top-K: [T, O].

        Probabilities multiply the normalized input: in front of a sub-norm they would cancel.
        """
        groups = self.quant.groups
        if gain_I is not None:
            parts = zip(x_TI.chunk(groups, -1), gain_I.chunk(groups), strict=True)
            x_TI = torch.cat([rms_norm(x, gain, self.model.norm_eps) for x, gain in parts], dim=-1)
        if self.quant.weights is WeightFormat.none:
            return (x_TI if prob_T1 is None else x_TI * prob_T1) @ w_OI.T
        parts = zip(x_TI.chunk(groups, -1), w_OI.chunk(groups, -1), strict=True)
        return _add_as_tree([self._bit_linear(x, w, role, prob_T1) for x, w in parts])

    def _bit_linear(
        self, x_TI: torch.Tensor, w_OI: torch.Tensor, role: str, prob_T1: torch.Tensor | None = None
    ) -> torch.Tensor:
        keep = self.stage.o_keep if role == "o" else 1.0
        return bit_linear(x_TI, w_OI, _QUANTIZE[getattr(self.stage, role)], keep, prob_T1)


def bit_linear(
    x_TI: torch.Tensor,
    w_OI: torch.Tensor,
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    keep: float,
    prob_T1: torch.Tensor | None = None,
) -> torch.Tensor:
    """One ternary scale, one input scale a token, optionally top-K: codes multiplied exactly, scales after: [T, O].

    Args:
        x_TI: input.
        w_OI: latent weight.
        quantize: makes codes and a scale [T, 1] of the input.
        keep: share of the input that top-K keeps.
        prob_T1: what the input is multiplied by; codes do not change, so their scale is.
    """
    with torch.no_grad():
        codes_TI, scale_T1 = quantize(x_TI)
        if prob_T1 is not None:
            scale_T1 = scale_T1 * prob_T1
        if keep < 1:
            codes_TI = codes_TI * topk_mask_reference(x_TI, keep)
        w_scale_1 = absmean_scale_reference(absmean_sums_reference(w_OI, groups=1, axis=-2), w_OI.numel())
        w_codes_OI = ternary_codes_reference(w_OI, w_scale_1, axis=-2)
        exact_TO = code_matmul_reference(codes_TI, w_codes_OI).to(scale_T1.dtype) * scale_T1 * w_scale_1
    x_TI = straight_through(codes_TI * scale_T1, x_TI if prob_T1 is None else x_TI * prob_T1)
    w_OI = straight_through((w_codes_OI * w_scale_1).to(w_OI.dtype), w_OI)
    return straight_through(exact_TO, x_TI @ w_OI.T)


def straight_through(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``value``, with the gradient of ``x``."""
    return value + (x - x.detach())


def rms_norm(x_TI: torch.Tensor, gain_I: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension.

    The mean is taken in fp64: there the model promises one value, however a row is split.
    """
    mean_square_T1 = x_TI.square().mean(-1, keepdim=True, dtype=torch.float64)
    return x_TI * torch.rsqrt(mean_square_T1 + eps).to(x_TI.dtype) * gain_I


def rotate(x_BSND: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary position embedding: features i and i + D/2 turn by position / theta^(2i/D), angles in fp32."""
    half = x_BSND.shape[-1] // 2
    frequency_h = 1.0 / theta ** (torch.arange(half, dtype=torch.float32) / half)
    angle_Sh = torch.outer(torch.arange(x_BSND.shape[1], dtype=torch.float32), frequency_h)
    cos_S1h, sin_S1h = (f(angle_Sh).to(x_BSND.dtype).unsqueeze(1) for f in (torch.cos, torch.sin))
    first, second = x_BSND.chunk(2, dim=-1)
    return torch.cat([first * cos_S1h - second * sin_S1h, second * cos_S1h + first * sin_S1h], dim=-1)


def _add_as_tree(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum of each half, added: the order ranks would add in, each its own parts first."""
    half = len(parts) // 2
    return parts[0] if half == 0 else _add_as_tree(parts[:half]) + _add_as_tree(parts[half:])

"""What every contender gets: tokens, their routing, weights of all experts, and the gradient of the output."""

from dataclasses import dataclass

import torch

from bench.shapes import MoELayer

# Shapes: T = tokens, E = experts, K = experts of each token, H = hidden, F = inner features.


@dataclass(frozen=True)
class Inputs:
    """One layer's problem, the same for all; nothing of it is computed inside a pass."""

    layer: MoELayer
    x_TH: torch.Tensor
    dy_TH: torch.Tensor
    """Gradient of the output; tokens differ in size, as those of a loss do."""
    experts_TK: torch.Tensor
    """int64, the experts of each token, ascending."""
    routing_map_TE: torch.Tensor
    """The same as bool."""
    probs_TE: torch.Tensor
    """fp32, zero where a token does not go."""
    w1_E2FH: torch.Tensor
    """Gate and up."""
    w2_EHF: torch.Tensor
    """Down."""
    gain_EF: torch.Tensor
    """Of the sub-norm, which the bf16 baselines do not have."""


def make_inputs(
    layer: MoELayer, device: str, dtype: torch.dtype = torch.bfloat16, idle_expert: int | None = None, seed: int = 0
) -> Inputs:
    """Random tokens and weights under a balanced router.

    Args:
        layer: sizes.
        device: where.
        dtype: of tokens and weights.
        idle_expert: an expert that gets no token.
        seed: of the generator.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator).mul_(size)

    num_experts, hidden, ffn, top_k, num_tokens = layer
    scores_TE = torch.rand(num_tokens, num_experts, device=device, generator=generator)
    if idle_expert is not None:
        scores_TE[:, idle_expert] = -1
    chosen = scores_TE.topk(top_k, dim=1)
    probs_TE = torch.zeros_like(scores_TE).scatter_(1, chosen.indices, chosen.values.softmax(1))
    return Inputs(
        layer,
        x_TH=normal(num_tokens, hidden),
        dy_TH=normal(num_tokens, hidden, size=1e-4) * normal(num_tokens, 1).exp(),
        experts_TK=chosen.indices.sort(1).values,
        routing_map_TE=torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen.indices, True),
        probs_TE=probs_TE,
        w1_E2FH=normal(num_experts, 2, ffn, hidden, size=0.02),
        w2_EHF=normal(num_experts, hidden, ffn, size=0.02),
        gain_EF=1 + normal(num_experts, ffn, size=0.2),
    )

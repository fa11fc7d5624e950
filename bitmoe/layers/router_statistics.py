"""Health of one layer's router: how evenly experts are loaded, how sure it is, what it drops.

Counted only while the model's quantization statistics record (the steps that are logged).
"""

import torch

# Shapes: T = tokens, E = experts.


class RouterStatistics:
    """Counts of one MoE layer since the last ``take``.

    Args:
        num_experts: E.
        topk: experts each token asks for.
    """

    def __init__(self, num_experts: int, topk: int):
        self.topk = topk
        self._counts = torch.zeros(num_experts + 3, dtype=torch.float64)

    def add(self, logits_TE: torch.Tensor, routing_map_TE: torch.Tensor) -> None:
        """Count one micro-batch: its router logits and where its tokens went."""
        log_p = torch.log_softmax(logits_TE.detach().double(), dim=-1)
        entropy = -(log_p.exp() * log_p).sum()
        load_E = routing_map_TE.sum(0).double()
        num_tokens = torch.full_like(entropy, len(logits_TE))
        asked = num_tokens * self.topk
        counts = torch.cat([load_E, torch.stack([entropy, num_tokens, asked - load_E.sum()])])
        # In place, at one address: recorded forward passes add to it.
        if self._counts.device != counts.device:
            self._counts = self._counts.to(counts.device)
        self._counts += counts

    def take(self) -> torch.Tensor:
        """Tokens of each expert, then sum of entropies, tokens, dropped copies: fp64 [E + 3]; starts anew."""
        counts = self._counts.clone()
        self._counts.zero_()
        return counts


def summarize(counts_LN: torch.Tensor, topk: int) -> dict[str, float | list[float]]:
    """Turn the counts of all layers, added over ranks, into metrics.

    Args:
        counts_LN: what ``take`` returned, one row a layer, [L, E + 3].
        topk: experts each token asks for.

    Returns:
        ``moe/load_max_over_mean`` and ``moe/load_min_over_mean`` (mean over layers; 1 is even),
        ``moe/load_max_over_mean_by_layer``, ``moe/idle_experts`` (experts without a token, all layers),
        ``moe/router_entropy`` (nats per token, mean over layers), ``moe/dropped`` (share of token copies).
    """
    load_LE = counts_LN[:, :-3]
    entropy, num_tokens, dropped = counts_LN[:, -3:].unbind(1)
    mean_L = load_LE.mean(1).clamp(min=1e-9)
    max_L = load_LE.amax(1) / mean_L
    return {
        "moe/load_max_over_mean": max_L.mean().item(),
        "moe/load_min_over_mean": (load_LE.amin(1) / mean_L).mean().item(),
        "moe/load_max_over_mean_by_layer": max_L.tolist(),
        "moe/idle_experts": (load_LE == 0).sum().item(),
        "moe/router_entropy": (entropy / num_tokens.clamp(min=1)).mean().item(),
        "moe/dropped": (dropped.sum() / (num_tokens.sum() * topk).clamp(min=1)).item(),
    }

"""Mixture of experts: a router in fp32, routed experts over packed weights, a shared expert.

Experts that no token chose are not touched. On a CPU that is a loop over those that were chosen. On other devices a few
tokens take copies of their experts' packed weights, which needs neither a look at the choice nor shapes that depend on
it, so that decoding can be captured in a graph; many tokens are worth the wait for the choice.
"""

# Shapes: T = tokens, H = hidden, E = experts, k = experts of a token, R = T k copies of tokens.

import torch
from torch import nn
from torch.nn.functional import linear

from bitmoe.infer.configuration import BitmoeConfig
from bitmoe.infer.feed_forward import BitmoeFeedForward
from bitmoe.infer.packed_linear import LinearInput, UncastBuffers, linear_input

# Each copy unpacks three matrices: more of them take more room than the wait is worth.
_FEW_COPIES = 16


class BitmoeRouter(UncastBuffers):
    """Chooses the experts of a token and their probabilities; its weight is never quantized."""

    def __init__(self, config: BitmoeConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.router_bias:
            self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, in the dtype of the input, and numbers of each token's experts: [T, k] each."""
        num_chosen = self.config.num_experts_per_tok
        logits_TE = linear(x_TH.float(), self.weight.float())
        if self.config.router_score == "softmax":
            chosen_Tk, experts_Tk = logits_TE.topk(num_chosen, dim=-1)
            probs_Tk = chosen_Tk.softmax(-1)
        else:
            scores_TE = logits_TE.sigmoid()
            biased_TE = scores_TE + self.expert_bias if self.config.router_bias else scores_TE
            experts_Tk = biased_TE.topk(num_chosen, dim=-1).indices
            probs_Tk = scores_TE.gather(-1, experts_Tk)
            if num_chosen > 1:
                probs_Tk = probs_Tk / (probs_Tk.sum(-1, keepdim=True) + 1e-20)
        return probs_Tk.to(x_TH.dtype) * self.config.routed_scaling_factor, experts_Tk


class BitmoeMoE(nn.Module):
    """The feed-forward of a layer with experts."""

    def __init__(self, config: BitmoeConfig):
        super().__init__()
        self.config = config
        self.router = BitmoeRouter(config)
        self.experts = BitmoeFeedForward(config, config.moe_intermediate_size, config.num_experts)
        self.shared_expert = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = BitmoeFeedForward(config, config.shared_expert_intermediate_size)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        x_TH = x_BSH.flatten(0, -2)
        probs_Tk, experts_Tk = self.router(x_TH)
        x = linear_input(x_TH, self.config, "gate_up")
        is_few = not x_TH.is_cpu and experts_Tk.numel() <= _FEW_COPIES
        mix = gathered_experts if is_few else looped_experts
        y_TH = mix(self.experts, x, probs_Tk, experts_Tk)
        if self.shared_expert is not None:
            y_TH = y_TH + self.shared_expert.transform(x)
        return y_TH.view_as(x_BSH)


def looped_experts(
    experts: BitmoeFeedForward, x: LinearInput, probs_Tk: torch.Tensor, experts_Tk: torch.Tensor
) -> torch.Tensor:
    """Expert by expert, only those that were chosen; outputs are added in the order of the experts: [T, H]."""
    y_TH = probs_Tk.new_zeros(len(probs_Tk), experts.down_proj.out_features)
    for expert in experts_Tk.unique().tolist():
        tokens, choice = (experts_Tk == expert).nonzero(as_tuple=True)
        prob_T1 = probs_Tk[tokens, choice, None]
        y_TH.index_add_(0, tokens, experts.transform(_take(x, tokens), expert, prob_T1))
    return y_TH


def gathered_experts(
    experts: BitmoeFeedForward, x: LinearInput, probs_Tk: torch.Tensor, experts_Tk: torch.Tensor
) -> torch.Tensor:
    """All copies of tokens at once, each with its expert's weights: static shapes, [T, H]."""
    num_tokens, num_chosen = experts_Tk.shape
    tokens_R = torch.arange(num_tokens, device=experts_Tk.device).repeat_interleave(num_chosen)
    copies = _take(x, tokens_R)
    scale = None if copies.scale_TG1 is None else copies.scale_TG1.unsqueeze(1)
    copies = LinearInput(copies.codes_TGi.unsqueeze(1), scale, copies.dtype)
    out_R1H = experts.transform(copies, experts_Tk.flatten(), probs_Tk.view(-1, 1, 1))
    return out_R1H.view(num_tokens, num_chosen, -1).sum(1)


def _take(x: LinearInput, tokens_R: torch.Tensor) -> LinearInput:
    """The input of some tokens."""
    scale = None if x.scale_TG1 is None else x.scale_TG1[tokens_R]
    return LinearInput(x.codes_TGi[tokens_R], scale, x.dtype)

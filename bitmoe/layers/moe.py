"""Mixture-of-experts layer: router, routed experts, shared expert."""

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from bitmoe.layers.context import LayerContext
from bitmoe.layers.dispatch import make_dispatch
from bitmoe.layers.experts import RoutedExperts
from bitmoe.layers.feed_forward import FeedForward
from bitmoe.layers.quantize_input import Quantized, flat_tokens
from bitmoe.layers.router import Router
from bitmoe.layers.router_statistics import RouterStatistics
from bitmoe.layers.sharding import ShardedParameters
from bitmoe.layers.wire import CodeWire

# Shapes: S = sequence (this rank's slice under sequence parallelism), B = batch, T = S*B, H = hidden, E = experts.


class MoELayer(torch.nn.Module, ShardedParameters):
    """Each token goes to its top-K routed experts and, where there is one, through the shared expert.

    Args:
        config: megatron-core's TransformerConfig.
        context: model, policy and groups.
    """

    def __init__(self, config, context: LayerContext):
        super().__init__()
        self.groups, self.policy, self.wire = context.groups, context.policy, context.wire
        self.statistics = RouterStatistics(context.moe.num_experts, context.moe.router_topk)
        self.layer_number = 0
        self.router = Router(config, context.groups.mcore, context.policy)
        self.experts = RoutedExperts(context)
        size = context.moe.shared_expert_size
        self.shared_experts = FeedForward(size, context) if size else None
        num_local = context.moe.num_experts // self.groups.ep.size()
        first = self.groups.ep.rank() * num_local
        self.dispatcher = MoEAlltoAllTokenDispatcher(
            num_local, list(range(first, first + num_local)), config=config, pg_collection=context.groups.mcore
        )

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the router which layer it balances."""
        self.layer_number = layer_number
        self.router.set_layer_number(layer_number)

    def forward(self, x_SBH: torch.Tensor, quantized: Quantized | None = None) -> torch.Tensor:
        """[S, B, H] to the same shape.

        Args:
            x_SBH: normalized residual stream, which the router multiplies.
            quantized: its codes, for routed and shared experts alike; None where weights are not quantized.
        """
        probs_TE, routing_map_TE = self.router(x_SBH)
        if self.policy.statistics.recording:
            self.statistics.add(self.router.last_logits_TE, routing_map_TE)
        x = x_SBH if quantized is None else quantized
        wire = CodeWire(self.wire, self.policy.act_format("gate_up"))
        dispatch = make_dispatch(self.dispatcher, routing_map_TE, wire)
        y_SBH = self.experts(flat_tokens(x), dispatch, probs_TE).view_as(x_SBH)
        return y_SBH if self.shared_experts is None else y_SBH + self.shared_experts(x)

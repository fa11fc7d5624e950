"""megatron-core's top-K router with a gate of our own.

The original's gate needs Transformer Engine's GEMM. This one multiplies in fp32 whatever the model's dtype, and in fp64
rounded once when the run is deterministic, so that logits do not depend on how many tokens a rank sees.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter

from bitmoe.quant.policy import QuantPolicy

# Shapes: S = sequence, B = batch, H = hidden, E = experts.


class Router(TopKRouter):
    """Chooses experts and probabilities for each token; its weight is never quantized.

    Args:
        config: megatron-core's TransformerConfig, which holds top-k, score function and balancing.
        pg_collection: megatron-core's process groups.
        policy: deterministic runs multiply in fp64 and round once; recording runs keep the logits.
    """

    def __init__(self, config, pg_collection: ProcessGroupCollection, policy: QuantPolicy):
        super().__init__(config, pg_collection=pg_collection)
        self.policy = policy
        self.last_logits_TE: torch.Tensor | None = None

    def gating(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Router logits [S, B, E] of normalized tokens [S, B, H], in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(x_SBH.dtype, torch.float32)
        compute_dtype = torch.float64 if self.policy.deterministic else dtype
        logits_SBE = torch.nn.functional.linear(x_SBH.to(compute_dtype), self.weight.to(compute_dtype)).to(dtype)
        if self.policy.statistics.recording:
            self.last_logits_TE = logits_SBE.detach().flatten(0, -2)
        return logits_SBE

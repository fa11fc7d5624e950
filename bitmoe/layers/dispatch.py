"""One trip of tokens to their experts and back, over megatron-core's all-to-all dispatcher.

The dispatcher permutes, exchanges and sorts rows of any dtype, so codes travel as int8 with their scale where the
dispatcher expects probabilities: half the bytes of bf16, bit for bit the same result, because an expert's input is
exactly those codes. Probabilities stay at home and multiply what comes back: applied in front of a sub-norm they would
cancel and the router would not learn.

A dispatcher keeps the splits of its last call in itself; ``Dispatch`` copies it per forward, so that several
micro-batches can be in flight (pipelines) and the backward pass uses the splits of its own forward.
"""

import copy

import torch
from megatron.core.transformer.moe.moe_utils import unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

# Shapes: T = tokens of this rank, E = experts, R = rows (token copies) on the experts' rank, H = hidden.


class Dispatch:
    """Moves tokens to experts (``send``), their outputs home (``combine``) and gradients home (``send_back``).

    Args:
        dispatcher: the layer's dispatcher, used as a template.
        routing_map_TE: which experts each token goes to, bool [T, E].
    """

    def __init__(self, dispatcher: MoEAlltoAllTokenDispatcher, routing_map_TE: torch.Tensor):
        self._dispatcher = copy.copy(dispatcher)
        self._routing_map_TE = routing_map_TE
        self.counts_E: torch.Tensor | None = None

    @torch.no_grad()
    def send(self, x_TH: torch.Tensor, scale_T1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring rows and their scales to the ranks of their experts, sorted by local expert.

        Args:
            x_TH: codes or values of this rank's tokens, [T, H].
            scale_T1: one number that travels with each token, [T, 1].

        Returns:
            rows [R, H] and their scales [R, 1]; ``counts_E`` then holds the rows of each local expert.
        """
        dispatcher = self._dispatcher
        scale_TE = scale_T1.expand_as(self._routing_map_TE)
        rows, scales = dispatcher.dispatch_preprocess(x_TH, self._routing_map_TE, scale_TE)
        rows, scales = dispatcher.token_dispatch(rows, scales)
        rows_RH, counts_E, scale_R = dispatcher.dispatch_postprocess(rows, scales)
        self.counts_E = torch.as_tensor(counts_E).cpu()
        return rows_RH, scale_R.unsqueeze(-1)

    @torch.no_grad()
    def send_back(self, grad_RH: torch.Tensor) -> torch.Tensor:
        """The adjoint of ``send``: bring gradients of rows home and add those of one token, [T, H]."""
        dispatcher = copy.copy(self._dispatcher)
        dispatcher.probs = grad_RH
        rows = dispatcher.token_combine(dispatcher.combine_preprocess(grad_RH))
        return dispatcher.combine_postprocess(rows)

    def combine(self, y_RH: torch.Tensor, probs_TE: torch.Tensor) -> torch.Tensor:
        """Bring experts' outputs home and add them weighted by the routing probabilities, [T, H]; differentiable.

        Partial outputs of experts split over ranks (ETP) are added on the way, before the probabilities multiply.
        """
        dispatcher = copy.copy(self._dispatcher)
        rows = dispatcher.token_combine(dispatcher.combine_preprocess(y_RH))
        return unpermute(
            rows,
            dispatcher.reversed_local_input_permutation_mapping,
            restore_shape=dispatcher.hidden_shape_before_permute,
            probs=probs_TE,
            routing_map=self._routing_map_TE,
        )

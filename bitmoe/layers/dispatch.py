"""One trip of tokens to their experts and back, over megatron-core's all-to-all dispatcher.

The dispatcher permutes, exchanges and sorts rows of any dtype and width, so codes travel in the bytes that ``CodeWire``
makes of them: a quarter of bf16's bytes in 4-bit formats, bit for bit the same result, because an expert's input is
exactly those codes. Scale and routing probability travel as the two parts of a complex number where the dispatcher
expects the probability alone. Experts multiply with it behind their sub-norm (in front it would cancel, and the router
would not learn); what comes home is added as it is.

A dispatcher keeps the splits of its last call in itself; ``Dispatch`` copies it per forward, so that several
micro-batches can be in flight (pipelines) and the backward pass uses the splits of its own forward. It waits for the
GPU to learn them; where there is nothing to exchange, ``make_dispatch`` takes ``LocalDispatch``, which does not.
"""

import copy

import torch
from megatron.core.transformer.moe.moe_utils import unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.layers.wire import CodeWire

# Shapes: T = tokens of this rank, E = experts, R = rows (token copies) on the experts' rank, H = hidden.


class Dispatch:
    """Moves tokens to experts (``send``), their outputs home (``combine``) and gradients home (``send_back``).

    Args:
        dispatcher: the layer's dispatcher, used as a template.
        routing_map_TE: which experts each token goes to, bool [T, E].
        wire: how rows travel to their experts.
    """

    def __init__(self, dispatcher: MoEAlltoAllTokenDispatcher, routing_map_TE: torch.Tensor, wire: CodeWire):
        self._dispatcher = copy.copy(dispatcher)
        self._routing_map_TE, self._wire = routing_map_TE, wire
        self.ends_E: torch.Tensor | None = None
        self.expert_R: torch.Tensor | None = None

    @torch.no_grad()
    def send(
        self, x_TH: torch.Tensor, scale_T1: torch.Tensor, probs_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bring rows, their scales and their probabilities to the ranks of their experts, sorted by local expert.

        Args:
            x_TH: codes of this rank's tokens in the format of the wire, or values, [T, H].
            scale_T1: one number that travels with each token, [T, 1], fp32 or fp64.
            probs_TE: routing probabilities, [T, E].

        Returns:
            rows [R, H], their scales [R, 1] and their probabilities [R, 1]. On their device are then ``ends_E``
            (int32 [E], rows of this local expert and of those in front of it) and ``expert_R`` (int32 [R], the local
            expert of each row).
        """
        dispatcher, dtype = self._dispatcher, torch.promote_types(scale_T1.dtype, probs_TE.dtype)
        pairs_TE = torch.complex(scale_T1.to(dtype).expand_as(probs_TE), probs_TE.to(dtype))
        rows, pairs = dispatcher.dispatch_preprocess(self._wire.sent(x_TH), self._routing_map_TE, pairs_TE)
        # What comes home later is as wide as the tokens were, not as what is sent.
        dispatcher.hidden_shape = dispatcher.hidden_shape_before_permute = x_TH.shape
        rows, pairs = dispatcher.token_dispatch(rows, pairs)
        rows, counts_E, pairs_R = dispatcher.dispatch_postprocess(rows, pairs)
        rows_RH = self._wire.received(rows, x_TH)
        self._set_experts(torch.as_tensor(counts_E), rows_RH)
        scale_R, probs_R = pairs_R.real.to(scale_T1.dtype), pairs_R.imag.to(probs_TE.dtype)
        return rows_RH, scale_R.unsqueeze(-1), probs_R.unsqueeze(-1)

    def _set_experts(self, counts_E: torch.Tensor, rows_RH: torch.Tensor) -> None:
        """Keep which rows are which local expert's."""
        counts_E = counts_E.to(rows_RH.device)
        self.ends_E = counts_E.cumsum(0, dtype=torch.int32)
        experts_E = torch.arange(len(counts_E), dtype=torch.int32, device=rows_RH.device)
        self.expert_R = experts_E.repeat_interleave(counts_E, output_size=len(rows_RH))

    @torch.no_grad()
    def send_back(self, grad_RH: torch.Tensor, grad_probs_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adjoint of ``send``: bring gradients of rows home and add those of one token, [T, H].

        Those of the probabilities, [T, E], are added over ranks that share an expert (ETP), as rows are.
        """
        grad_TH = self._dispatcher.combine_postprocess(self._brought_home(grad_RH, grad_RH.dtype))
        grad_probs_N = self._brought_home(grad_probs_R1, grad_probs_R1.dtype).squeeze(-1)
        grad_probs_ET = grad_probs_N.new_zeros(self._routing_map_TE.T.shape)
        return grad_TH, grad_probs_ET.masked_scatter_(self._routing_map_TE.T, grad_probs_N).T

    def combine(self, y_RH: torch.Tensor) -> torch.Tensor:
        """Bring experts' outputs, which are weighted already, home and add them, [T, H]; differentiable.

        Partial outputs of experts split over ranks (ETP) are added on the way.
        """
        sum_dtype = torch.promote_types(y_RH.dtype, torch.float32)
        return unpermute(
            self._brought_home(y_RH, sum_dtype),
            self._dispatcher.reversed_local_input_permutation_mapping,
            restore_shape=self._dispatcher.hidden_shape_before_permute,
            # Ones: without them bf16 would be added in bf16.
            probs=self._routing_map_TE.to(sum_dtype),
            routing_map=self._routing_map_TE,
        )

    def _brought_home(self, y_RH: torch.Tensor, sum_dtype: torch.dtype) -> torch.Tensor:
        """Rows back on the ranks of their tokens, in the order in which they left; added over ETP in ``sum_dtype``."""
        dispatcher = copy.copy(self._dispatcher)
        # The dispatcher adds in the dtype of the probabilities that it sent.
        dispatcher.probs = y_RH.new_empty(0, dtype=sum_dtype)
        return dispatcher.token_combine(dispatcher.combine_preprocess(y_RH))


def make_dispatch(
    dispatcher: MoEAlltoAllTokenDispatcher, routing_map_TE: torch.Tensor, wire: CodeWire
) -> Dispatch | LocalDispatch:
    """The trip that serves a layer: local where every expert is whole on this rank and no token is dropped.

    Args:
        dispatcher: the layer's dispatcher, which knows its groups and its configuration.
        routing_map_TE: which experts each token goes to, bool [T, E].
        wire: how rows travel where they leave this rank.
    """
    is_whole = dispatcher.ep_size == dispatcher.tp_size == 1
    if is_whole and dispatcher.config.moe_expert_capacity_factor is None:
        return LocalDispatch(routing_map_TE, dispatcher.config.moe_router_topk)
    return Dispatch(dispatcher, routing_map_TE, wire)

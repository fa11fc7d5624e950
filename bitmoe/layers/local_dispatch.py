"""One trip of tokens to their experts and back where all experts live on this rank: nothing waits for the GPU.

The same interface and the same numbers as ``Dispatch``. Every token goes to exactly ``topk`` experts, so the number of
rows is known in advance, and the copies and sums are kernels that go by indices on the device.
"""

import torch

from bitmoe_kernels.token_permute import permute, permute_probs, permute_probs_backward, plan_rows, sum_rows

# Shapes: T = tokens of this rank, E = experts, K = experts of each token, R = T * K rows (token copies), H = hidden.


class LocalDispatch:
    """Copies tokens for their experts (``send``), adds outputs (``combine``) and gradients (``send_back``).

    ``ends_E`` (int32 [E], rows of this expert and of those in front of it), ``expert_R`` and ``source_R`` (int32 [R],
    the expert and the token of each row) and ``row_TK`` (int32 [T, K], the rows of each token) lie on the device of the
    map.

    Args:
        routing_map_TE: which experts each token goes to, bool [T, E]; exactly ``topk`` each.
        topk: K.
    """

    def __init__(self, routing_map_TE: torch.Tensor, topk: int):
        self._plan = plan_rows(routing_map_TE, topk)
        self.source_R, self.row_TK, self.expert_R, self.ends_E = self._plan

    def send(
        self, x_TH: torch.Tensor, scale_T1: torch.Tensor, probs_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copy rows, their scales and their probabilities, sorted by expert; not differentiable.

        Args:
            x_TH: codes or values, [T, H].
            scale_T1: one number that travels with each token, [T, 1].
            probs_TE: routing probabilities, [T, E].

        Returns:
            rows [R, H], their scales [R, 1] and their probabilities [R, 1].
        """
        return self.spread(x_TH), self.spread(scale_T1), permute_probs(probs_TE, self._plan)

    def send_back(self, grad_RH: torch.Tensor, grad_probs_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adjoint of ``send``: add the gradients of each token's rows, [T, H]; of probabilities, [T, E]."""
        return sum_rows(grad_RH, self._plan), permute_probs_backward(grad_probs_R1, self._plan)

    def combine(self, y_RH: torch.Tensor) -> torch.Tensor:
        """Add experts' outputs, which are weighted already, [T, H]; differentiable."""
        return _Combine.apply(y_RH, self)

    def sum(self, y_RH: torch.Tensor) -> torch.Tensor:
        """Add the rows of each token, [T, H]; not differentiable."""
        return sum_rows(y_RH, self._plan)

    def spread(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The adjoint of ``sum``: copy each token to its rows, [R, H]; not differentiable."""
        return permute(x_TH, self._plan)


class _Combine(torch.autograd.Function):
    """The sum of each token's rows."""

    @staticmethod
    def forward(ctx, y_RH, dispatch: LocalDispatch):
        ctx.dispatch = dispatch
        return dispatch.sum(y_RH)

    @staticmethod
    def backward(ctx, grad_TH):
        return ctx.dispatch.spread(grad_TH), None

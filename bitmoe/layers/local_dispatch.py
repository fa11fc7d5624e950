"""One trip of tokens to their experts and back where all experts live on this rank: nothing waits for the GPU.

The same interface and the same numbers as ``Dispatch``. Every token goes to exactly ``topk`` experts, so the number of
rows is known in advance, and the copies and sums are kernels that go by indices on the device.
"""

import torch

from bitmoe_kernels.token_permute import RowPlan, combine, combine_backward, permute, plan_rows, sum_rows

# Shapes: T = tokens of this rank, E = experts, K = experts of each token, R = T * K rows (token copies), H = hidden.


class LocalDispatch:
    """Copies tokens for their experts (``send``), adds outputs (``combine``) and gradients (``send_back``).

    ``ends_E`` (int32 [E], rows of this expert and of those in front of it) and ``expert_R`` (int32 [R], the expert of
    each row) lie on the device of the map.

    Args:
        routing_map_TE: which experts each token goes to, bool [T, E]; exactly ``topk`` each.
        topk: K.
    """

    def __init__(self, routing_map_TE: torch.Tensor, topk: int):
        self._plan = plan_rows(routing_map_TE, topk)
        self.ends_E, self.expert_R = self._plan.ends_E, self._plan.expert_R

    def send(self, x_TH: torch.Tensor, scale_T1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy rows and their scales, sorted by expert; not differentiable.

        Args:
            x_TH: codes or values, [T, H].
            scale_T1: one number that travels with each token, [T, 1].

        Returns:
            rows [R, H] and their scales [R, 1].
        """
        return permute(x_TH, self._plan), permute(scale_T1, self._plan)

    def send_back(self, grad_RH: torch.Tensor) -> torch.Tensor:
        """The adjoint of ``send``: add the gradients of each token's rows, [T, H]."""
        return sum_rows(grad_RH, self._plan)

    def combine(self, y_RH: torch.Tensor, probs_TE: torch.Tensor) -> torch.Tensor:
        """Add experts' outputs weighted by the routing probabilities, [T, H]; differentiable."""
        return _Combine.apply(y_RH, probs_TE.gather(1, self._plan.expert_TK), self._plan)


class _Combine(torch.autograd.Function):
    """The weighted sum of each token's rows; outputs and probabilities get gradients."""

    @staticmethod
    def forward(ctx, y_RH, probs_TK, plan: RowPlan):
        ctx.save_for_backward(y_RH, probs_TK)
        ctx.plan = plan
        return combine(y_RH, probs_TK, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        y_RH, probs_TK = ctx.saved_tensors
        dy_RH, dprobs_TK = combine_backward(grad_TH, y_RH, probs_TK, ctx.plan)
        return dy_RH, dprobs_TK.to(probs_TK.dtype), None

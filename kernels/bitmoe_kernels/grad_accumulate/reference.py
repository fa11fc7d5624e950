"""Adding a gradient to the sum of those before it, in plain torch: the truth for the kernel."""

import torch


def accumulate_grad_reference(total: torch.Tensor, grad: torch.Tensor) -> None:
    """README eq. 1, in place."""
    total.add_(grad)

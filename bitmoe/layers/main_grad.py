"""Weight gradients go into the fp32 sum over micro-batches (``main_grad``) where they are made.

megatron-core's DDP gives every parameter such a sum and adds ``param.grad`` to it in a hook, unless the parameter says
that this was done. Here one kernel adds at the bandwidth of memory.
"""

import torch

from bitmoe_kernels.grad_accumulate import accumulate_grad


def into_main_grad(weight: torch.nn.Parameter, grad: torch.Tensor) -> torch.Tensor:
    """Add a gradient to the sum of its parameter, where there is one.

    Args:
        weight: the parameter.
        grad: its gradient, with as many elements.

    Returns:
        What the backward of an autograd function returns for ``weight``: the gradient, which nobody reads if it was
        added.
    """
    grad = grad.view_as(weight)
    if hasattr(weight, "main_grad"):
        accumulate_grad(weight.main_grad, grad)
        weight.grad_added_to_main_grad = True
    return grad

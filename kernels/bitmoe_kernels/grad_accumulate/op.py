"""Public addition of a gradient to a sum: check the arguments, then Triton's kernel on a GPU, else the reference."""

import torch

from bitmoe_kernels.dispatch import runs_triton
from bitmoe_kernels.grad_accumulate.reference import accumulate_grad_reference
from bitmoe_kernels.validation import check_floating


@torch.no_grad()
def accumulate_grad(total: torch.Tensor, grad: torch.Tensor) -> None:
    """Add ``grad`` to ``total`` in place (README eq. 1).

    Args:
        total: sum of former gradients, any shape.
        grad: of the same shape, in the dtype of ``total`` or a shorter one.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that differ.
    """
    check_floating(total, "total")
    check_floating(grad, "grad")
    if total.shape != grad.shape:
        raise ValueError(f"grad has shape {list(grad.shape)}, total {list(total.shape)}: they must be equal")
    is_short = grad.dtype.itemsize == 2 and total.dtype == torch.float32
    if is_short and runs_triton(grad) and total.is_contiguous():
        from bitmoe_kernels.grad_accumulate import triton_kernels

        triton_kernels.accumulate_grad(total, grad.contiguous())
    else:
        accumulate_grad_reference(total, grad)

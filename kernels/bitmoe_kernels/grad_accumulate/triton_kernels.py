"""Triton kernel that adds a 16-bit gradient to an fp32 sum, in loads of 16 bytes.

What      README eq. 1. torch's addition of two types loads number by number: 2.0 TB/s, half of the bandwidth (H200).
Contract  total fp32, grad bf16 or fp16, both contiguous and of one size.
Numerics  the bits of reference.py.
Not here  other types, argument checks and dispatch (op.py).
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _accumulate_kernel(total_ptr, grad_ptr, num_elements, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    total = tl.load(total_ptr + offs, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
    tl.store(total_ptr + offs, total + grad.to(tl.float32), mask=mask)


def accumulate_grad(total: torch.Tensor, grad: torch.Tensor) -> None:
    """total += grad."""
    if num_elements := total.numel():
        with torch.cuda.device_of(total):
            _accumulate_kernel[(triton.cdiv(num_elements, _BLOCK),)](
                total, grad, num_elements, BLOCK=_BLOCK, num_warps=8
            )

"""Gradients of micro-batches added up in fp32."""

from bitmoe_kernels.grad_accumulate.op import accumulate_grad

__all__ = ["accumulate_grad"]

"""Sparse activations: the mask of the largest magnitudes of a token."""

from bitmoe_kernels.sparsify.op import topk_mask

__all__ = ["topk_mask"]

"""Cross-entropy over a vocabulary that may be split over ranks."""

from bitmoe_kernels.cross_entropy.op import vocab_parallel_cross_entropy

__all__ = ["vocab_parallel_cross_entropy"]

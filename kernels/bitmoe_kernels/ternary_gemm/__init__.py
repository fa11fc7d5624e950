"""Products of integer activation codes with ternary weight codes."""

from bitmoe_kernels.ternary_gemm.op import code_matmul

__all__ = ["code_matmul"]

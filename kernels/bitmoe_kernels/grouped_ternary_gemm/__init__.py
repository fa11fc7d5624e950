"""Products of integer activation codes with ternary weight codes, one weight matrix per group of rows."""

from bitmoe_kernels.grouped_ternary_gemm.op import grouped_code_matmul, grouped_matmul, grouped_outer

__all__ = ["grouped_code_matmul", "grouped_matmul", "grouped_outer"]

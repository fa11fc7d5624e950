"""Products of integer activation codes with ternary weight codes, one weight matrix per group of rows."""

from bitmoe_kernels.grouped_ternary_gemm.backward import (
    GroupedQuantizedGrad,
    grouped_input_grad,
    grouped_int8_weight_grad,
    grouped_quantize_grad,
    grouped_quantize_token_grad,
    grouped_weight_grad,
)
from bitmoe_kernels.grouped_ternary_gemm.op import (
    grouped_code_matmul,
    grouped_matmul,
    grouped_outer,
    grouped_scaled_code_matmul,
    multiplies_without_wait,
)

__all__ = [
    "GroupedQuantizedGrad",
    "grouped_code_matmul",
    "grouped_input_grad",
    "grouped_int8_weight_grad",
    "grouped_matmul",
    "grouped_outer",
    "grouped_quantize_grad",
    "grouped_quantize_token_grad",
    "grouped_scaled_code_matmul",
    "grouped_weight_grad",
    "multiplies_without_wait",
]

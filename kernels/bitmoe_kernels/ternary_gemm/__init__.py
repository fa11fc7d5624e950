"""Products of integer activation codes with ternary weight codes, and their 8-bit backward."""

from bitmoe_kernels.ternary_gemm.backward import (
    QuantizedGrad,
    input_grad,
    int8_weight_grad,
    quantize_grad,
    weight_grad,
)
from bitmoe_kernels.ternary_gemm.op import code_matmul, scaled_code_matmul, transpose_codes

__all__ = [
    "QuantizedGrad",
    "code_matmul",
    "input_grad",
    "int8_weight_grad",
    "quantize_grad",
    "scaled_code_matmul",
    "transpose_codes",
    "weight_grad",
]

"""The e4m3 products of routed experts: torch's grouped kernel or ours, the loop over experts on CPU.

``torch._scaled_grouped_mm`` (CUTLASS, sm_90) wants ranges that it contracts to be no shorter than 16 and to start at
multiples of 16, ours of 128, which the padded rows of README eq. 2 grant, and rows of multiples of 16 bytes. Neither
kernel states the bits of its scaled result: the last bit may differ from the reference.

Exact sums (``fast_accum=False``) hold for INT4 and FP4 codes times ternary codes: torch's kernel promotes to fp32 all
along, ours every EXACT_CHUNK of k, as many as 14 bits can count (8 * 2048 = 2**14).
"""

import torch

from bitmoe_kernels.grouped_ternary_gemm.reference import (
    grouped_float8_matmul_reference,
    grouped_weight_grad_reference,
)
from bitmoe_kernels.ternary_gemm.reference import PADDING

# Shapes: R = rows sorted by expert, E = experts, K = contracted, N = output columns, O = outputs, I = inputs,
#         P = padded rows.

EXACT_CHUNK = 2048

BACKENDS: dict[str, str | None] = {"forward": None, "input_grad": "triton", "weight_grad": "triton"}
"""Which kernel multiplies on a GPU, "torch" or "triton", by product; bench/grouped.py times both (H200). Weight
gradients: 1.10 ms by torch's and 0.96 by ours for 64 experts, 3.36 and 3.00 for 8. None is Triton's up to EXACT_CHUNK
inputs (1,202 against 913 TFLOP/s at 2,048 by pointers; through the tensor memory accelerator 1,381) and torch's beyond
(1,046 against 936 at 4,096, by pointers)."""


def grouped_float8_matmul(
    a_RK: torch.Tensor,
    a_scale_R1: torch.Tensor,
    b_ENK: torch.Tensor,
    b_scale_EN: torch.Tensor,
    ends_E: torch.Tensor,
    *,
    fast_accum: bool,
) -> torch.Tensor:
    """Multiply each expert's rows with its own matrix, both e4m3 with the contracted dimension contiguous.

    Args:
        a_RK: e4m3 [R, K], K a multiple of 16.
        a_scale_R1: fp32 [R, 1].
        b_ENK: e4m3 [E, N, K].
        b_scale_EN: fp32 [E, N].
        ends_E: int32 [E].
        fast_accum: False for the forward, whose sums are exact; True for the input gradient.

    Returns:
        bf16 [R, N]: a @ b^T * a_scale * b_scale; rows past the last expert's are undefined.
    """
    if not a_RK.is_cuda:
        return grouped_float8_matmul_reference(a_RK, a_scale_R1, b_ENK, b_scale_EN, ends_E)
    (num_rows, k), num_columns = a_RK.shape, b_ENK.shape[1]
    backend = BACKENDS["input_grad" if fast_accum else "forward"] or ("triton" if k <= EXACT_CHUNK else "torch")
    if backend == "torch" and _fits_torch(num_rows, num_columns):
        return torch._scaled_grouped_mm(
            a_RK.contiguous(),
            b_ENK.transpose(1, 2),
            a_scale_R1.flatten(),
            b_scale_EN.contiguous(),
            offs=ends_E,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast_accum,
        )
    from bitmoe_kernels.grouped_ternary_gemm import triton_kernels

    out_RN = a_RK.new_empty(num_rows, num_columns, dtype=torch.bfloat16)
    chunk_size = k if fast_accum else min(k, EXACT_CHUNK)
    triton_kernels.grouped_matmul(a_RK, a_scale_R1, b_ENK, b_scale_EN.unsqueeze(2), ends_E, chunk_size, out_RN)
    return out_RN


def _fits_torch(num_rows: int, num_columns: int) -> bool:
    """torch's kernel wants results of whole multiples of 16 columns, and any row; ours takes the rest."""
    return num_rows > 0 and num_columns > 0 and num_columns % PADDING == 0


def grouped_float8_outer(
    a_OP: torch.Tensor,
    a_scale_EO: torch.Tensor,
    b_IP: torch.Tensor,
    padded_ends_E: torch.Tensor,
    *,
    fast_accum: bool,
) -> torch.Tensor:
    """Contract each expert's padded rows (README eq. 6): bf16 [E, O, I], zeros for experts without rows.

    Args:
        a_OP: e4m3 [O, P].
        a_scale_EO: fp32 [E, O], one for each expert and output.
        b_IP: e4m3 [I, P].
        padded_ends_E: int32 [E].
        fast_accum: keep sums in the tensor cores; ours always does.
    """
    if not a_OP.is_cuda:
        return grouped_weight_grad_reference(a_OP, a_scale_EO, b_IP, padded_ends_E)
    num_experts, num_outputs, num_inputs = *a_scale_EO.shape, len(b_IP)
    if BACKENDS["weight_grad"] == "torch" and _fits_torch(num_outputs, num_inputs):
        return torch._scaled_grouped_mm(
            a_OP,
            b_IP.T,
            a_scale_EO.flatten(),
            a_scale_EO.new_ones(num_experts * num_inputs),
            offs=padded_ends_E,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast_accum,
        )
    from bitmoe_kernels.ternary_gemm.triton_outer import outer

    out_EOI = a_OP.new_empty(num_experts, num_outputs, num_inputs, dtype=torch.bfloat16)
    outer(a_OP, a_scale_EO, b_IP, padded_ends_E, out_EOI)
    return out_EOI

"""One FP8 product for forward and backward: ``torch._scaled_mm`` with a scale per row of each operand.

Exact sums (``fast_accum=False``) hold for INT4 and FP4 codes times ternary codes. cuBLAS and CUTLASS, which of the
two torch calls depends on its version, do not state in which order they multiply the two scales: the bf16 result may
differ from the reference in its last bit. On CPU the reference runs.
"""

import torch

from bitmoe_kernels.ternary_gemm.reference import PADDING, float8_matmul_reference, pad_last, padded_length

# Shapes: M, N = rows of the two operands, K = contracted.


def float8_matmul(
    a_MK: torch.Tensor, a_scale_M1: torch.Tensor, b_NK: torch.Tensor, b_scale_N: torch.Tensor, *, fast_accum: bool
) -> torch.Tensor:
    """Multiply e4m3 matrices, both with the contracted dimension last.

    Args:
        a_MK: e4m3 [M, K].
        a_scale_M1: fp32 [M, 1].
        b_NK: e4m3 [N, K].
        b_scale_N: fp32 [N] or [1].
        fast_accum: keep sums in the tensor cores' registers (about 14 significant bits on sm_90) instead of
            promoting them to fp32.

    Returns:
        bf16 [M, N]: a @ b^T * a_scale * b_scale. Where K or N are no multiples of 16, operands are copied
        into padded storage first.
    """
    if not a_MK.is_cuda:
        return float8_matmul_reference(a_MK, a_scale_M1, b_NK, b_scale_N)
    num_rows, num_columns = len(b_NK), a_MK.shape[1]
    num_tokens = len(a_MK)
    if 0 in (*a_MK.shape, num_rows):
        return a_scale_M1.new_zeros(num_tokens, num_rows, dtype=torch.bfloat16)
    b_scale_1N = b_scale_N.expand(num_rows).unsqueeze(0)
    if num_columns % PADDING:
        a_MK, b_NK = (pad_last(x, padded_length(num_columns)) for x in (a_MK, b_NK))
    if num_rows % PADDING:
        b_NK = pad_last(b_NK.T, padded_length(num_rows)).T.contiguous()
        b_scale_1N = pad_last(b_scale_1N, padded_length(num_rows))
    if num_tokens % PADDING:
        # cuBLASLt takes some such sizes and refuses others.
        a_MK, a_scale_M1 = (pad_last(x.T, padded_length(num_tokens)).T for x in (a_MK, a_scale_M1))
    y_MN = torch._scaled_mm(
        a_MK.contiguous(),
        b_NK.contiguous().T,
        scale_a=a_scale_M1.contiguous(),
        scale_b=b_scale_1N.contiguous(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_accum,
    )
    return y_MN[:num_tokens, :num_rows]

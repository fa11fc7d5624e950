"""Products of integer codes and their 8-bit backward in plain torch: the truth for other implementations.

Codes first, scales after: integer products do not depend on the order of summation, so every layout and every
kernel gives the same numbers. Scales multiply in fp32 in one stated order and the result is rounded once. In the
backward only dY is rounded; the codes of weights and activations stay exact. Arguments are not validated here.
"""

import torch

# Shapes: B = batch (any leading dims), T = tokens, P = T padded with zeros to PADDING, K = contracted features,
#         N = output features of a product, I = inputs, O = outputs of the linear, G = groups of input features,
#         R x C = any code matrix; in the INT8 weight gradient C = chunks of tokens, c = tokens of one.

PADDING = 16
MIN_ABSMAX = 1e-30
MIN_POWER = 2.0**-100
E4M3_LEVELS = 448.0
INT8_STEP = 1 / 127
CHUNK = 256
"""Tokens that share a scale for each output where dY is rounded to INT8. Rounding is off by the largest / 127 /
sqrt(12): by 0.7 % of the norm where tokens are normally distributed, by 3.6 % (e4m3: 2.7 %) where one is all of it."""
# Up to 5 bits: the largest 4-bit code, 8 (FP4: 12), stays within e4m3. Down to 9 bits below 1 integers lose nothing.
LARGEST_SHIFT = 32.0


def code_matmul_reference(x_BTK: torch.Tensor, w_BNK: torch.Tensor) -> torch.Tensor:
    """Multiply in 64-bit integers.

    Args:
        x_BTK: activation codes, int8 [..., T, K].
        w_BNK: weight codes in {-1, 0, 1}, int8 [..., N, K].

    Returns:
        Integer sums, int64 [..., T, N].
    """
    return torch.matmul(x_BTK.long(), w_BNK.long().transpose(-1, -2))


def scaled_code_matmul_reference(
    x_codes_TK: torch.Tensor,
    x_scale_TG: torch.Tensor,
    w_codes_NK: torch.Tensor,
    w_scale_NG: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """README eq. 1: y [T, N] = sum over groups, in order, of (codes' product * x_scale) * w_scale.

    float32 sums of integers are exact below 2**24.
    """
    num_groups = x_scale_TG.shape[1]
    total = None
    for x, x_scale_T, w, w_scale_N in zip(
        x_codes_TK.float().chunk(num_groups, 1),
        x_scale_TG.unbind(1),
        w_codes_NK.float().chunk(num_groups, 1),
        w_scale_NG.unbind(1),
        strict=True,
    ):
        part = (x @ w.T) * x_scale_T[:, None] * w_scale_N
        total = part if total is None else total + part
    return total.to(out_dtype)


def padded_length(length: int) -> int:
    """The next multiple of PADDING: the row length 8-bit products need where tokens are contracted."""
    return -(-length // PADDING) * PADDING


def transpose_codes_reference(codes_RC: torch.Tensor) -> torch.Tensor:
    """Transposed codes [C, P], padded with zeros."""
    byte_view = codes_RC.view(torch.int8)
    return pad_last(byte_view.T, padded_length(len(codes_RC))).contiguous().view(codes_RC.dtype)


def quantize_grad_reference(
    dy_TO: torch.Tensor, w_scale_O: torch.Tensor | None, x_scale_T1: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """README eq. 2: e4m3 codes [T, O] and scale [T, 1]; with ``x_scale_T1`` eq. 3, and powers [T, 1] and [1], too."""
    dy_TO = dy_TO.float()
    dy_TO = dy_TO if w_scale_O is None else dy_TO * w_scale_O
    absmax_T1 = dy_TO.abs().amax(-1, keepdim=True)
    is_finite_T1 = absmax_T1.isfinite()
    if x_scale_T1 is None:
        absmax_T1 = absmax_T1.clamp(min=MIN_ABSMAX)
        levels_T1 = torch.full_like(absmax_T1, E4M3_LEVELS)
        return _codes(dy_TO, levels_T1 / absmax_T1, is_finite_T1), _or_nan(absmax_T1 / levels_T1, is_finite_T1)
    power_T1 = _next_power_of_2(absmax_T1 * x_scale_T1 / E4M3_LEVELS).where(is_finite_T1, float("inf"))
    # Not of an empty tensor.
    largest_1 = torch.cat([power_T1.flatten(), power_T1.new_zeros(1)]).amax(0, keepdim=True)
    codes_TO = _codes(dy_TO, x_scale_T1 / power_T1, is_finite_T1)
    return codes_TO, _or_nan(power_T1 / x_scale_T1, is_finite_T1), power_T1, largest_1


def _codes(x: torch.Tensor, reciprocal: torch.Tensor, is_finite: torch.Tensor) -> torch.Tensor:
    return torch.where(is_finite, x * reciprocal, 0.0).to(torch.float8_e4m3fn)


def _or_nan(scale: torch.Tensor, is_finite: torch.Tensor) -> torch.Tensor:
    return scale.masked_fill(~is_finite, float("nan"))


def _next_power_of_2(x: torch.Tensor) -> torch.Tensor:
    """The smallest power of 2 that is below neither fp32 ``x`` nor MIN_POWER."""
    bits = x.clamp(min=MIN_POWER).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def shifted_columns_reference(x_codes_TI: torch.Tensor, power_T1: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """README eq. 5: e4m3 [I, P], activation codes times a power of 2 for each token; ``largest`` is [1] or [T, 1]."""
    shift_T1 = power_T1 * LARGEST_SHIFT / largest
    return transpose_codes_reference((x_codes_TI.float() * shift_T1).to(torch.float8_e4m3fn))


def pad_last(x: torch.Tensor, length: int) -> torch.Tensor:
    """``x`` with zeros appended along its last dimension."""
    # float8 has no padding of its own; its zero is the zero byte.
    byte_view = x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x
    return torch.nn.functional.pad(byte_view, (0, length - x.shape[-1])).view(x.dtype)


def float8_matmul_reference(
    a_MK: torch.Tensor, a_scale_M1: torch.Tensor, b_NK: torch.Tensor, b_scale_N: torch.Tensor
) -> torch.Tensor:
    """(a @ b^T * a_scale) * b_scale as bf16 [M, N], with float32 sums."""
    return (a_MK.float() @ b_NK.float().T * a_scale_M1 * b_scale_N).bfloat16()


def quantize_columns_reference(dy_TO: torch.Tensor, x_scale_T1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """README eq. 7: int8 codes [O, P] of dY times ``x_scale_T1``, and their scale [C, O]; at least one token."""
    codes, scales = [], []
    for product_cO in (dy_TO.float() * x_scale_T1.float()).split(CHUNK):
        absmax_O = product_cO.abs().amax(0)
        is_finite_O = absmax_O.isfinite()
        scale_O = absmax_O.clamp(min=MIN_ABSMAX) * INT8_STEP
        codes.append(torch.where(is_finite_O, (product_cO * (1 / scale_O)).round(), 0.0).to(torch.int8))
        scales.append(_or_nan(scale_O, is_finite_O))
    return transpose_codes_reference(torch.cat(codes)), torch.stack(scales)


def int8_outer_reference(
    dy_columns_OP: torch.Tensor, scale_CO: torch.Tensor, x_columns_IP: torch.Tensor
) -> torch.Tensor:
    """README eq. 8: dW fp32 [O, I], chunks added in order; float32 sums of a chunk's codes are exact."""
    total_OI = torch.zeros(len(dy_columns_OP), len(x_columns_IP), device=scale_CO.device)
    for dy_Oc, scale_O, x_Ic in zip(dy_columns_OP.split(CHUNK, 1), scale_CO, x_columns_IP.split(CHUNK, 1), strict=True):
        total_OI += dy_Oc.float() @ x_Ic.float().T * scale_O[:, None]
    return total_OI

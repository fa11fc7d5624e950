"""Products of integer codes and their 8-bit backward in plain torch: the truth for other implementations.

Codes first, scales after: integer products do not depend on the order of summation, so every layout and every
kernel gives the same numbers. Scales multiply in fp32 in one stated order and the result is rounded once. In the
backward only dY is rounded; the codes of weights and activations stay exact. Arguments are not validated here.
"""

import torch

# Shapes: B = batch (any leading dims), T = tokens, P = T padded with zeros to PADDING, K = contracted features,
#         N = output features of a product, I = inputs, O = outputs of the linear, G = groups of input features,
#         C = blocks of tokens, R x C = any code matrix.

PADDING = 16
MIN_ABSMAX = 1e-30
LEVELS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


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


def k_major_codes_reference(
    codes_RC: torch.Tensor, row_dtype: torch.dtype, column_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [R, C] in ``row_dtype`` and, transposed and padded with zeros, [C, P] in ``column_dtype``."""
    return codes_RC.to(row_dtype), pad_last(codes_RC.T, padded_length(len(codes_RC))).contiguous().to(column_dtype)


def transpose_codes_reference(codes_RC: torch.Tensor) -> torch.Tensor:
    """Transposed codes [C, P], padded with zeros."""
    byte_view = codes_RC.view(torch.int8)
    return pad_last(byte_view.T, padded_length(len(codes_RC))).contiguous().view(codes_RC.dtype)


def quantize_grad_reference(
    dy_TO: torch.Tensor,
    x_scale_TG: torch.Tensor,
    w_scale_O: torch.Tensor | None,
    column_dtype: torch.dtype,
    block_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """README eq. 2 and 3: e4m3 rows [T, O], scale [T, 1]; columns [G, O, P], scale [G, O, C]."""
    dy_TO = dy_TO.float()
    rows_TO, row_scale_T1 = _round(dy_TO if w_scale_O is None else dy_TO * w_scale_O, torch.float8_e4m3fn)
    num_tokens = len(dy_TO)
    num_blocks = -(-num_tokens // block_tokens)
    columns_GOT = (dy_TO * x_scale_TG.T.unsqueeze(-1)).transpose(1, 2)
    blocks_GOCt = pad_last(columns_GOT, num_blocks * block_tokens).unflatten(-1, (num_blocks, block_tokens))
    codes_GOCt, scale_GOC1 = _round(blocks_GOCt, column_dtype)
    columns_GOP = pad_last(codes_GOCt.flatten(-2)[..., :num_tokens], padded_length(num_tokens))
    return rows_TO, row_scale_T1, columns_GOP.contiguous(), scale_GOC1.squeeze(-1)


def _round(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale [..., 1] of the last dimension by largest magnitude; NaN and codes 0 where that is not finite."""
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=MIN_ABSMAX)
    levels = torch.full_like(absmax, LEVELS[dtype])
    codes = torch.where(absmax.isfinite(), x * (levels / absmax), 0.0)
    scale = (absmax / levels).masked_fill(~absmax.isfinite(), float("nan"))
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


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


def weight_grad_reference(
    columns_GOP: torch.Tensor, column_scale_GOC: torch.Tensor, block_tokens: int, x_codes_IP: torch.Tensor
) -> torch.Tensor:
    """README eq. 5: dW bf16 [O, I], blocks of tokens added in order."""
    parts = []
    num_tokens = columns_GOP.shape[2]
    blocks = [block_tokens] * (num_tokens // block_tokens)
    blocks += [num_tokens % block_tokens] * bool(num_tokens % block_tokens)
    for columns_OP, scale_OC, x_iP in zip(
        columns_GOP.float(), column_scale_GOC, x_codes_IP.float().chunk(len(columns_GOP)), strict=True
    ):
        total = columns_OP.new_zeros(len(columns_OP), len(x_iP))
        for columns, scale_O, x in zip(
            columns_OP.split(blocks, 1), scale_OC.unbind(1), x_iP.split(blocks, 1), strict=True
        ):
            total += (columns @ x.T) * scale_O[:, None]
        parts.append(total.bfloat16())
    return torch.cat(parts, dim=1)

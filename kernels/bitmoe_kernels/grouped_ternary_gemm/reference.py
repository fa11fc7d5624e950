"""Grouped products as a loop over experts: the truth, and the path of the CPU.

Rows are sorted by expert; ``ends_E`` says where each expert's rows end (zero rows are legal). Each expert's part is the
dense reference of ``ternary_gemm``. Arguments are not validated here.
"""

import torch

from bitmoe_kernels.ternary_gemm.reference import (
    CHUNK,
    INT8_STEP,
    MIN_ABSMAX,
    float8_matmul_reference,
    int8_outer_reference,
    quantize_columns_reference,
    quantize_grad_reference,
    scaled_code_matmul_reference,
    shifted_columns_reference,
)

# Shapes: R = rows (token copies, sorted by expert), E = experts, K = contracted features, N = output features,
#         I = inputs, O = outputs of the linear, G = groups of inputs, P = padded_rows(R, E): room for each expert's
#         rows from a multiple of PADDING on.

PADDING = 128
"""Rows of an expert are contracted in whole tiles of as many."""


def grouped_matmul_reference(x_RK: torch.Tensor, w_EKN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's rows with its own matrix.

    Args:
        x_RK: rows sorted by expert, [R, K].
        w_EKN: one matrix per expert, [E, K, N].
        ends_E: where each expert's rows end, [E]; the last is R.

    Returns:
        [R, N], in the dtype of x_RK.
    """
    y_RN = x_RK.new_empty(x_RK.shape[0], w_EKN.shape[2])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        rows = slice(start, end)
        torch.matmul(x_RK[rows], w_EKN[expert], out=y_RN[rows])
        start = end
    return y_RN


def grouped_outer_reference(x_RK: torch.Tensor, y_RN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Contract each expert's rows: x^T y, the weight gradient of a grouped product.

    Args:
        x_RK: rows sorted by expert, [R, K].
        y_RN: rows in the same order, [R, N].
        ends_E: where each expert's rows end, [E].

    Returns:
        [E, K, N]; zeros for experts without rows.
    """
    out_EKN = x_RK.new_empty(len(ends_E), x_RK.shape[1], y_RN.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        rows = slice(start, end)
        torch.matmul(x_RK[rows].T, y_RN[rows], out=out_EKN[expert])
        start = end
    return out_EKN


def padded_rows(num_rows: int, num_experts: int, padding: int = PADDING) -> int:
    """P, the length of a row of transposed codes: a bound for any number of rows per expert, known without them."""
    return -(-num_rows // padding) * padding + padding * num_experts


def padded_ends_reference(ends_E: torch.Tensor, padding: int = PADDING) -> torch.Tensor:
    """README eq. 2: where each expert's padded rows end among P, int32 [E].

    Each takes its rows rounded up to ``padding``, and as many at least, as ``torch._scaled_grouped_mm`` contracts no
    empty range.
    """
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    return ((counts_E.clamp(min=1) + padding - 1) // padding * padding).cumsum(0).int()


def expert_slices(ends_E: torch.Tensor) -> list[slice]:
    """The rows of each expert."""
    ends = ends_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def grouped_scaled_code_matmul_reference(
    x_codes_RI: torch.Tensor,
    x_scale_RG: torch.Tensor,
    w_codes_EOI: torch.Tensor,
    w_scale_EOG: torch.Tensor,
    ends_E: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """README eq. 1 for each expert's rows: [R, O], zeros where no expert has a row."""
    y_RO = x_scale_RG.new_zeros(len(x_codes_RI), w_codes_EOI.shape[1], dtype=out_dtype)
    for rows, w_codes, w_scale in zip(expert_slices(ends_E), w_codes_EOI, w_scale_EOG, strict=True):
        y_RO[rows] = scaled_code_matmul_reference(x_codes_RI[rows], x_scale_RG[rows], w_codes, w_scale, out_dtype)
    return y_RO


def grouped_float8_matmul_reference(
    a_RK: torch.Tensor,
    a_scale_R1: torch.Tensor,
    b_ENK: torch.Tensor,
    b_scale_EN: torch.Tensor,
    ends_E: torch.Tensor,
) -> torch.Tensor:
    """README eq. 4: (a @ b^T * a_scale) * b_scale for each expert's rows, bf16 [R, N], zeros past the last of them."""
    y_RN = a_scale_R1.new_zeros(len(a_RK), b_ENK.shape[1], dtype=torch.bfloat16)
    for rows, b, b_scale in zip(expert_slices(ends_E), b_ENK, b_scale_EN, strict=True):
        y_RN[rows] = float8_matmul_reference(a_RK[rows], a_scale_R1[rows], b, b_scale)
    return y_RN


def rows_of_tokens(codes_TI: torch.Tensor, source_R: torch.Tensor) -> torch.Tensor:
    """The codes of each row's token, [R, I]."""
    return codes_TI.view(torch.int8).index_select(0, source_R).view(codes_TI.dtype)


def grouped_transpose_codes_reference(
    codes_RI: torch.Tensor, ends_E: torch.Tensor, padding: int = PADDING
) -> torch.Tensor:
    """Transposed codes [I, P], each expert's rows from its padded start on, zeros elsewhere."""
    columns_IP = codes_RI.new_zeros(codes_RI.shape[1], padded_rows(len(codes_RI), len(ends_E), padding))
    for rows, columns in _placed(ends_E, padding):
        columns_IP[:, columns] = codes_RI[rows].T
    return columns_IP


def _placed(ends_E: torch.Tensor, padding: int = PADDING) -> list[tuple[slice, slice]]:
    """Each expert's rows and where they lie, without padding, among P."""
    placed = []
    for rows, columns in zip(expert_slices(ends_E), expert_slices(padded_ends_reference(ends_E, padding)), strict=True):
        placed.append((rows, slice(columns.start, columns.start + rows.stop - rows.start)))
    return placed


def grouped_quantize_grad_reference(
    dy_RO: torch.Tensor, w_scale_EO: torch.Tensor | None, x_scale_R1: torch.Tensor | None, ends_E: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """README eq. 3: e4m3 [R, O] and scale [R, 1]; with ``x_scale_R1`` powers [R, 1] and [E], too.

    Zeros where no expert has a row.
    """
    codes_RO = dy_RO.new_zeros(dy_RO.shape, dtype=torch.float8_e4m3fn)
    scale_R1, power_R1 = dy_RO.new_zeros(2, len(dy_RO), 1, dtype=torch.float32)
    largest_E = dy_RO.new_zeros(len(ends_E), dtype=torch.float32)
    for expert, rows in enumerate(expert_slices(ends_E)):
        w_scale_O = None if w_scale_EO is None else w_scale_EO[expert]
        x_scale_r1 = None if x_scale_R1 is None else x_scale_R1[rows]
        codes_RO[rows], scale_R1[rows], *powers = quantize_grad_reference(dy_RO[rows], w_scale_O, x_scale_r1)
        if powers:
            power_R1[rows], largest_E[expert] = powers
    return (codes_RO, scale_R1) if x_scale_R1 is None else (codes_RO, scale_R1, power_R1, largest_E)


def grouped_shifted_columns_reference(
    x_codes_RI: torch.Tensor, power_R1: torch.Tensor, largest_E: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    """README eq. 5 for each expert: e4m3 [I, P]."""
    columns_IP = x_codes_RI.new_zeros(x_codes_RI.shape[1], padded_rows(len(x_codes_RI), len(ends_E)))
    for expert, (rows, columns) in enumerate(_placed(ends_E)):
        columns_Ip = shifted_columns_reference(x_codes_RI[rows], power_R1[rows], largest_E[expert])
        columns_IP[:, columns] = columns_Ip[:, : rows.stop - rows.start]
    return columns_IP


def grouped_weight_grad_reference(
    columns_OP: torch.Tensor, column_scale_EO: torch.Tensor, x_codes_IP: torch.Tensor, padded_ends_E: torch.Tensor
) -> torch.Tensor:
    """README eq. 6 for each expert: dW bf16 [E, O, I]."""
    one = column_scale_EO.new_ones(1)
    return torch.stack(
        [
            float8_matmul_reference(columns_OP[:, rows], scale_O[:, None], x_codes_IP[:, rows], one)
            for scale_O, rows in zip(column_scale_EO, expert_slices(padded_ends_E), strict=True)
        ]
    )


def grouped_quantize_columns_reference(
    dy_RO: torch.Tensor, x_scale_R1: torch.Tensor, ends_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """README eq. 7 for each expert: int8 [O, P] and scale [P / CHUNK, O], rows padded to CHUNK."""
    num_columns = padded_rows(len(dy_RO), len(ends_E), CHUNK)
    columns_OP = dy_RO.new_zeros(dy_RO.shape[1], num_columns, dtype=torch.int8)
    scale_CO = torch.full((num_columns // CHUNK, dy_RO.shape[1]), MIN_ABSMAX, device=dy_RO.device) * INT8_STEP
    for rows, columns in _placed(ends_E, CHUNK):
        if rows.start < rows.stop:
            codes_Op, scale_cO = quantize_columns_reference(dy_RO[rows], x_scale_R1[rows])
            columns_OP[:, columns] = codes_Op[:, : rows.stop - rows.start]
            scale_CO[columns.start // CHUNK :][: len(scale_cO)] = scale_cO
    return columns_OP, scale_CO


def grouped_int8_outer_reference(
    dy_columns_OP: torch.Tensor, scale_CO: torch.Tensor, x_columns_IP: torch.Tensor, padded_ends_E: torch.Tensor
) -> torch.Tensor:
    """README eq. 8 for each expert: dW fp32 [E, O, I]."""
    return torch.stack(
        [
            int8_outer_reference(
                dy_columns_OP[:, rows], scale_CO[rows.start // CHUNK : rows.stop // CHUNK], x_columns_IP[:, rows]
            )
            for rows in expert_slices(padded_ends_E)
        ]
    )

"""Public functions of ternary weight quantization: check the arguments, then run Triton's kernels on a GPU,
else the reference.

``ternarize`` is the whole. Its steps ``absmean_sums`` (or ``absmean_sums_by_id``), ``absmean_scale`` and
``ternary_codes`` are public too: where a group spans tensor-parallel ranks, the ranks add up the sums between the first
two. ``ternary_operands`` is the last step for training: codes as 8-bit products take them, and counts for statistics.
Not here: the straight-through gradient, which belongs to the linear that multiplies the codes.
"""

# Shapes: O = output rows, P = O padded with zeros to a multiple of 16, I = input columns, G = quantization groups,
#         S = scales that rows share by id; "..." = any batch, such as experts.

from typing import NamedTuple

import torch

from bitmoe_kernels.dispatch import on_triton_device, runs_triton
from bitmoe_kernels.ternary_gemm.op import CODE_DTYPES
from bitmoe_kernels.validation import check_floating, check_groups, raise_on_nonfinite
from bitmoe_kernels.weight_quant.reference import (
    absmean_scale_reference,
    absmean_sums_by_id_reference,
    absmean_sums_reference,
    ternary_operands_reference,
)

# What a caller may say for the matrix axis that is cut into groups: 0 and 1 as in a single matrix [O, I].
_AXES = {0: -2, -2: -2, 1: -1, -1: -1}
_AXIS_NAMES = {-2: "output rows", -1: "input columns"}


class TernaryOperands(NamedTuple):
    """Codes of a weight as the products of a linear take them, and counts for statistics."""

    rows: torch.Tensor
    """int8 or e4m3 [..., O, I]: of the forward."""
    columns: torch.Tensor | None
    """e4m3 [..., I, P]: of the 8-bit input gradient."""
    counts: torch.Tensor | None
    """int64 [3]: zeros, codes that differ from the former ones, all codes; None where nothing was counted."""


@torch.no_grad()
def ternarize(w_OI: torch.Tensor, groups: int = 1, dim: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weights to {-1, 0, 1} times the mean of |w| of their group (BitNet a4.8, eq. 2).

    Args:
        w_OI: weights [..., O, I], any floating dtype; each matrix of a batch has its own scales.
        groups: number G of equal contiguous blocks, each with one scale.
        dim: the matrix axis that is cut into groups: 0 or -2 for output rows, 1 or -1 for input columns,
            whatever the number of batch dimensions.

    Returns:
        codes: int8 [..., O, I].
        scale: fp32 [..., G], at least 1e-5. On devices other than CPU a group with NaN or Inf gets a NaN
            scale and codes 0.

    Raises:
        TypeError: ``w_OI`` is not a floating-point tensor.
        ValueError: fewer than two dimensions, no element, unknown ``dim``, ``groups`` not a divisor, or (on
            CPU) NaN or Inf.
    """
    sums_G = absmean_sums(w_OI, groups, dim)
    scale_G = absmean_scale(sums_G, count=w_OI.shape[-2] * w_OI.shape[-1] // groups)
    return _operands(w_OI, scale_G, _AXES[dim], torch.int8, False, None, False).rows, scale_G


@torch.no_grad()
def absmean_sums(w_OI: torch.Tensor, groups: int = 1, dim: int = 0) -> torch.Tensor:
    """Sum |w| over each group; ranks that hold parts of a group add these up.

    Args:
        w_OI: weights [..., O, I].
        groups: number of groups G in this tensor.
        dim: matrix axis of the groups, as in :func:`ternarize`.

    Returns:
        fp64 [..., G].

    Raises:
        TypeError, ValueError: as :func:`ternarize`.
    """
    axis = _matrix_axis(w_OI, dim)
    check_groups(groups, w_OI.shape[axis], _AXIS_NAMES[axis])
    if runs_triton(w_OI):
        return _triton_absmean().absmean_sums_triton(w_OI, groups, axis)
    sums_G = absmean_sums_reference(w_OI, groups, axis)
    raise_on_nonfinite(sums_G, w_OI, "w")
    return sums_G


@torch.no_grad()
def absmean_sums_by_id(
    w_OI: torch.Tensor, scale_ids_O: torch.Tensor, num_scales: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum |w| over output rows that share a scale, wherever they lie (q, k and v are interleaved by head).

    Args:
        w_OI: weights [..., O, I].
        scale_ids_O: int64 [O], the scale of each row, in 0..S-1; the same map for every matrix of a batch.
        num_scales: number S of scales.

    Returns:
        sums: fp64 [..., S].
        counts: int64 [S], the weights of each scale in one matrix.

    Raises:
        TypeError, ValueError: as :func:`ternarize`; ids that are not int64 or do not fit the rows.
    """
    _matrix_axis(w_OI, 0)
    _check_ids(scale_ids_O, w_OI.shape[-2])
    if runs_triton(w_OI):
        return _triton_absmean().absmean_sums_by_id_triton(w_OI, scale_ids_O, num_scales)
    sums_S, counts_S = absmean_sums_by_id_reference(w_OI, scale_ids_O, num_scales)
    raise_on_nonfinite(sums_S, w_OI, "w")
    return sums_S, counts_S


@torch.no_grad()
def absmean_scale(
    sums_G: torch.Tensor, count: int | torch.Tensor, scale_ids_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Turn sums of |w| into scales.

    Args:
        sums_G: fp64 [..., G] from :func:`absmean_sums` or :func:`absmean_sums_by_id`, added up over all ranks that
            share the groups.
        count: number of weights in one whole group, over all those ranks; int64 [G] where groups differ.
        scale_ids_O: int64 [O]: return the scale of each row instead.

    Returns:
        fp32 [..., G], or [..., O] given ids: the mean, rounded once, at least 1e-5.

    Raises:
        TypeError: sums that are not fp64, which would round twice; ids that are not int64.
        ValueError: ``count`` below 1 (a tensor is looked at on CPU only), or (on CPU) sums that are NaN or Inf.
    """
    if not isinstance(sums_G, torch.Tensor) or sums_G.dtype != torch.float64:
        got = getattr(sums_G, "dtype", type(sums_G).__name__)
        raise TypeError(f"sums must be a torch.float64 tensor, got {got}: pass on what absmean_sums returned")
    least = count if isinstance(count, int) else 1 if count.is_cuda else int(count.min())
    if least < 1:
        raise ValueError(f"count={least}: pass the number of weights in one whole group, at least 1")
    if scale_ids_O is not None:
        _check_ids(scale_ids_O)
    if on_triton_device(sums_G):
        return _triton_absmean().absmean_scale_triton(sums_G, count, scale_ids_O)
    scale_G = absmean_scale_reference(sums_G, count)
    raise_on_nonfinite(scale_G, sums_G, "sums")
    return scale_G if scale_ids_O is None else scale_G[..., scale_ids_O]


@torch.no_grad()
def ternary_codes(w_OI: torch.Tensor, scale_G: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Round weights to ternary codes under given scales, in fp32.

    Args:
        w_OI: weights [..., O, I].
        scale_G: fp32 [..., G] from :func:`absmean_scale` of these weights; G equal blocks along ``dim``.
        dim: matrix axis of the groups, as in :func:`ternarize`.

    Returns:
        int8 [..., O, I] in {-1, 0, 1}.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes that do not fit, or (on CPU) NaN or Inf in either tensor.
    """
    return ternary_operands(w_OI, scale_G, dim).rows


@torch.no_grad()
def ternary_operands(
    w_OI: torch.Tensor,
    scale_G: torch.Tensor,
    dim: int = 0,
    row_dtype: torch.dtype = torch.int8,
    with_columns: bool = False,
    former: TernaryOperands | None = None,
    is_counted: bool = True,
) -> TernaryOperands:
    """Round weights to ternary codes in every layout that products need, and count them, in one read.

    Args:
        w_OI: weights [..., O, I].
        scale_G: fp32 [..., G] from :func:`absmean_scale` of these weights; G equal blocks along ``dim``.
        dim: matrix axis of the groups, as in :func:`ternarize`.
        row_dtype: int8 or e4m3.
        with_columns: write transposed codes, too.
        former: what this function returned for the former value of these weights, to count the codes that changed. Its
            memory is overwritten (on GPUs) where type and layout are the same: it must not be used any more.
        is_counted: False leaves counts out and takes the memory of ``former`` without reading it.

    Returns:
        Codes in {-1, 0, 1} and counts; without ``former`` no code counts as changed.

    Raises:
        TypeError: a tensor that is not floating point, or an unknown ``row_dtype``.
        ValueError: shapes that do not fit, or (on CPU) NaN or Inf in either tensor.
    """
    axis = _matrix_axis(w_OI, dim)
    check_floating(scale_G, "scale")
    if scale_G.dim() != w_OI.dim() - 1 or scale_G.shape[:-1] != w_OI.shape[:-2]:
        raise ValueError(
            f"scale of shape {list(scale_G.shape)} does not fit w of shape {list(w_OI.shape)}: "
            f"it must be {[*w_OI.shape[:-2], 'groups']}"
        )
    check_groups(scale_G.shape[-1], w_OI.shape[axis], _AXIS_NAMES[axis])
    _check_layout(w_OI, row_dtype, former)
    raise_on_nonfinite(w_OI, w_OI, "w")
    raise_on_nonfinite(scale_G, scale_G, "scale")
    return _operands(w_OI, scale_G, axis, row_dtype, with_columns, former, is_counted)


@torch.no_grad()
def absmean_operands(
    w_OI: torch.Tensor,
    groups: int = 1,
    dim: int = 0,
    row_dtype: torch.dtype = torch.int8,
    with_columns: bool = False,
    former: TernaryOperands | None = None,
    is_counted: bool = True,
) -> tuple[torch.Tensor, TernaryOperands]:
    """Scales of weights that no other rank has a share in, and their codes.

    :func:`absmean_sums`, :func:`absmean_scale` and :func:`ternary_operands` together; for many small matrices, such as
    experts, a GPU does it in one launch that reads them once.

    Args:
        w_OI: weights [..., O, I].
        groups: number G of equal contiguous blocks, each with one scale.
        dim: the matrix axis of the groups, as in :func:`ternarize`.
        row_dtype: as in :func:`ternary_operands`, and likewise ``with_columns``, ``former`` and ``is_counted``.

    Returns:
        scale fp32 [..., G], and the operands.

    Raises:
        TypeError, ValueError: as those functions.
    """
    axis = _matrix_axis(w_OI, dim)
    check_groups(groups, w_OI.shape[axis], _AXIS_NAMES[axis])
    _check_layout(w_OI, row_dtype, former)
    if runs_triton(w_OI):
        from bitmoe_kernels.weight_quant import triton_one_launch

        if triton_one_launch.takes_one_launch(w_OI, groups, axis):
            memory = None if former is None else former[:2]
            run = triton_one_launch.absmean_operands_triton
            scale_G, *operands = run(w_OI, groups, row_dtype, with_columns, memory, is_counted)
            return scale_G, TernaryOperands(*operands)
    scale_G = absmean_scale(absmean_sums(w_OI, groups, dim), w_OI.shape[-2] * w_OI.shape[-1] // groups)
    return scale_G, _operands(w_OI, scale_G, axis, row_dtype, with_columns, former, is_counted)


def _check_layout(w_OI: torch.Tensor, row_dtype: torch.dtype, former: TernaryOperands | None) -> None:
    if row_dtype not in CODE_DTYPES:
        raise TypeError(f"row_dtype must be int8 or float8_e4m3fn, got {row_dtype}")
    if former is not None and (former.rows.shape != w_OI.shape or former.rows.device != w_OI.device):
        raise ValueError(
            f"former codes {list(former.rows.shape)} on {former.rows.device} are not those of w {list(w_OI.shape)} "
            f"on {w_OI.device}: pass what was returned for the same weights"
        )


def _operands(
    w_OI: torch.Tensor,
    scale_G: torch.Tensor,
    axis: int,
    row_dtype: torch.dtype,
    with_columns: bool,
    former: TernaryOperands | None,
    is_counted: bool,
) -> TernaryOperands:
    if runs_triton(w_OI) and scale_G.dtype == torch.float32:
        from bitmoe_kernels.weight_quant import triton_operands

        memory = None if former is None else former[:2]
        run = triton_operands.ternary_operands_triton
        return TernaryOperands(*run(w_OI, scale_G, axis, row_dtype, with_columns, memory, is_counted))
    former_rows = None if former is None else former.rows
    operands = ternary_operands_reference(w_OI, scale_G, axis, row_dtype, with_columns, former_rows)
    return TernaryOperands(*operands[:2], operands[2] if is_counted else None)


def _triton_absmean():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.weight_quant import triton_absmean

    return triton_absmean


def _matrix_axis(w_OI: torch.Tensor, dim: int) -> int:
    """Check the weights and ``dim``; return -2 for groups of rows or -1 for groups of columns."""
    check_floating(w_OI, "w")
    if w_OI.dim() < 2 or w_OI.shape[-2] * w_OI.shape[-1] == 0:
        raise ValueError(f"w has shape {list(w_OI.shape)}: it must be [..., O, I] with at least one weight")
    if dim not in _AXES:
        raise ValueError(f"dim={dim}: use 0 or -2 for groups of rows, 1 or -1 for groups of columns")
    return _AXES[dim]


def _check_ids(scale_ids_O: torch.Tensor, num_rows: int | None = None) -> None:
    if scale_ids_O.dtype != torch.int64 or scale_ids_O.dim() != 1:
        raise TypeError(f"scale_ids must be int64 [O], got {scale_ids_O.dtype} {list(scale_ids_O.shape)}")
    if num_rows is not None and len(scale_ids_O) != num_rows:
        raise ValueError(f"{len(scale_ids_O)} scale_ids do not fit {num_rows} output rows: pass one a row")

"""Public functions of ternary weight quantization: check the arguments, then run Triton's kernels on a GPU,
else the reference.

``ternarize`` is the whole. Its steps ``absmean_sums``, ``absmean_scale`` and ``ternary_codes`` are public
too: where a group spans tensor-parallel ranks, the ranks add up the sums between the first two.
Not here: the straight-through gradient, which belongs to the linear that multiplies the codes.
"""

# Shapes: O = output rows, I = input columns, G = quantization groups; "..." = any batch, such as experts.

import torch

from bitmoe_kernels.dispatch import runs_triton
from bitmoe_kernels.validation import check_floating, check_groups, raise_on_nonfinite
from bitmoe_kernels.weight_quant.reference import (
    absmean_scale_reference,
    absmean_sums_reference,
    ternary_codes_reference,
)

# What a caller may say for the matrix axis that is cut into groups: 0 and 1 as in a single matrix [O, I].
_AXES = {0: -2, -2: -2, 1: -1, -1: -1}
_AXIS_NAMES = {-2: "output rows", -1: "input columns"}


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
    return _codes(w_OI, scale_G, _AXES[dim]), scale_G


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
        return _triton_kernels().absmean_sums_triton(w_OI, groups, axis)
    sums_G = absmean_sums_reference(w_OI, groups, axis)
    raise_on_nonfinite(sums_G, w_OI, "w")
    return sums_G


@torch.no_grad()
def absmean_scale(sums_G: torch.Tensor, count: int) -> torch.Tensor:
    """Turn sums of |w| into scales.

    Args:
        sums_G: fp64 [..., G] from :func:`absmean_sums`, added up over all ranks that share the groups.
        count: number of weights in one whole group, over all those ranks.

    Returns:
        fp32 [..., G]: the mean, rounded once, at least 1e-5.

    Raises:
        TypeError: sums that are not fp64, which would round twice.
        ValueError: ``count`` below 1, or (on CPU) sums that are NaN or Inf.
    """
    if not isinstance(sums_G, torch.Tensor) or sums_G.dtype != torch.float64:
        got = getattr(sums_G, "dtype", type(sums_G).__name__)
        raise TypeError(f"sums must be a torch.float64 tensor, got {got}: pass on what absmean_sums returned")
    if count < 1:
        raise ValueError(f"count={count}: pass the number of weights in one whole group, at least 1")
    scale_G = absmean_scale_reference(sums_G, count)
    raise_on_nonfinite(scale_G, sums_G, "sums")
    return scale_G


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
    axis = _matrix_axis(w_OI, dim)
    check_floating(scale_G, "scale")
    if scale_G.dim() != w_OI.dim() - 1 or scale_G.shape[:-1] != w_OI.shape[:-2]:
        raise ValueError(
            f"scale of shape {list(scale_G.shape)} does not fit w of shape {list(w_OI.shape)}: "
            f"it must be {[*w_OI.shape[:-2], 'groups']}"
        )
    check_groups(scale_G.shape[-1], w_OI.shape[axis], _AXIS_NAMES[axis])
    raise_on_nonfinite(w_OI, w_OI, "w")
    raise_on_nonfinite(scale_G, scale_G, "scale")
    return _codes(w_OI, scale_G, axis)


def _codes(w_OI: torch.Tensor, scale_G: torch.Tensor, axis: int) -> torch.Tensor:
    if runs_triton(w_OI) and scale_G.dtype == torch.float32:
        return _triton_kernels().ternary_codes_triton(w_OI, scale_G, axis)
    return ternary_codes_reference(w_OI, scale_G, axis)


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.weight_quant import triton_kernels

    return triton_kernels


def _matrix_axis(w_OI: torch.Tensor, dim: int) -> int:
    """Check the weights and ``dim``; return -2 for groups of rows or -1 for groups of columns."""
    check_floating(w_OI, "w")
    if w_OI.dim() < 2 or w_OI.shape[-2] * w_OI.shape[-1] == 0:
        raise ValueError(f"w has shape {list(w_OI.shape)}: it must be [..., O, I] with at least one weight")
    if dim not in _AXES:
        raise ValueError(f"dim={dim}: use 0 or -2 for groups of rows, 1 or -1 for groups of columns")
    return _AXES[dim]

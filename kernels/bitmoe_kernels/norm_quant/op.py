"""Public norms, alone or with quantization, and their backward: check the arguments, then run Triton's kernels on a
GPU, else the reference.

On CPU, NaN or Inf in a quantizer's input raises ValueError; on other devices such a token (or group) gets a NaN scale
and codes 0. The gradient passes the quantizer and the mask unchanged (straight-through): the backward functions are
those of the norms alone. Not here: the autograd functions, which belong to the layers, and sub-norms whose one group is
split over ranks.
"""

# Shapes: T = tokens (any leading dimensions), D = features, G = groups of features.

import torch

from bitmoe_kernels.act_quant.op import check_code_dtype
from bitmoe_kernels.dispatch import runs_triton_by_row
from bitmoe_kernels.norm_quant.reference import (
    norm_backward_reference,
    rms_norm_quantize_reference,
    rms_norm_reference,
    sub_norm_quantize_reference,
)
from bitmoe_kernels.validation import check_features, check_floating, check_groups, raise_on_nonfinite

_FORMATS = ("int4", "int8", "fp4")


@torch.no_grad()
def rms_norm(x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize whole rows and multiply by the gain (README eq. 1, 2).

    Args:
        x_TD: activations [..., D].
        gain_D: gain of each feature [D], any floating dtype.
        eps: added to the mean square.

    Returns:
        y: [..., D] in the dtype of x; NaN where a row is not finite.
        rstd: [..., 1], fp32 (fp64 for fp64 input).

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: no feature, or a gain that does not fit.
    """
    _check_norm(x_TD, gain_D)
    if runs_triton_by_row(x_TD):
        return _triton_kernels().rms_norm_triton(x_TD, gain_D, eps)
    return rms_norm_reference(x_TD, gain_D, eps)


@torch.no_grad()
def rms_norm_quantize(
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    eps: float,
    num_format: str = "int8",
    code_dtype: torch.dtype = torch.int8,
    with_normalized: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Normalize whole rows, multiply by the gain, round to the dtype of x and quantize (README eq. 1, 2, 4).

    Args:
        x_TD: activations [..., D].
        gain_D: gain of each feature [D], any floating dtype.
        eps: added to the mean square.
        num_format: int4, int8 or fp4.
        code_dtype: int8, or float8_e4m3fn for int4 and fp4, whose codes it holds exactly.
        with_normalized: also return the normalized activations, as a router needs them.

    Returns:
        codes: [..., D] of ``code_dtype``.
        scale: [..., 1], fp32 (fp64 for fp64 input).
        rstd: [..., 1], likewise.
        y: [..., D] in the dtype of x, only if ``with_normalized``.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: no feature, a gain that does not fit, an unknown format, a ``code_dtype`` that does not hold its
            codes, or (on CPU) NaN or Inf.
    """
    _check_quantize(x_TD, gain_D, num_format)
    check_code_dtype(code_dtype, num_format)
    if runs_triton_by_row(x_TD):
        return _triton_kernels().norm_quantize_triton(
            x_TD, gain_D, eps, num_format, code_dtype=code_dtype, with_normalized=with_normalized
        )
    result = rms_norm_quantize_reference(x_TD, gain_D, eps, num_format, code_dtype, with_normalized)
    raise_on_nonfinite(result[1], x_TD, "x")
    return result


@torch.no_grad()
def sub_norm_quantize(
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    eps: float,
    num_format: str = "int8",
    groups: int = 1,
    keep: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalize, quantize and sparsify each group of features (README eq. 1, 3, 4, 5).

    Args:
        x_TD: activations [..., D].
        gain_D: gain of each feature [D], any floating dtype.
        eps: added to the mean square.
        num_format: int4, int8 or fp4.
        groups: number G of equal contiguous blocks of features.
        keep: share of each group whose codes are kept, the largest |y|; the others become 0.

    Returns:
        codes: int8 [..., D].
        scale: [..., G], fp32 (fp64 for fp64 input).
        rstd: [..., G], likewise.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: as :func:`rms_norm_quantize`, ``groups`` not a divisor of D, or a ``keep`` that is out of (0, 1] or
            keeps nothing.
    """
    _check_quantize(x_TD, gain_D, num_format)
    check_groups(groups, x_TD.shape[-1], "features")
    if not 0 < keep <= 1 or round(keep * (x_TD.shape[-1] // groups)) == 0:
        raise ValueError(f"keep={keep} of {x_TD.shape[-1] // groups} features: it must keep one or more, and at most 1")
    if runs_triton_by_row(x_TD, groups):
        return _triton_kernels().norm_quantize_triton(x_TD, gain_D, eps, num_format, True, groups, keep)
    result = sub_norm_quantize_reference(x_TD, gain_D, eps, num_format, groups, keep)
    raise_on_nonfinite(result[1], x_TD, "x")
    return result


@torch.no_grad()
def rms_norm_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    rstd_T1: torch.Tensor,
    residual_grad_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of :func:`rms_norm`, and straight through of :func:`rms_norm_quantize` (README eq. 6, 7).

    Args:
        dy_TD: gradient of y [..., D].
        x_TD: input of the norm [..., D].
        gain_D: gain [D].
        rstd_T1: [..., 1] from the forward pass.
        residual_grad_TD: [..., D]; what x receives elsewhere, added to dx before dx is rounded.

    Returns:
        dx: [..., D] in the dtype of x.
        dgain: [D], fp32 (fp64 for fp64 input); the same bits on every run.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that do not fit.
    """
    _check_backward(dy_TD, x_TD, gain_D, rstd_T1)
    if rstd_T1.shape[-1] != 1:
        raise ValueError(f"rstd of shape {list(rstd_T1.shape)} has groups: use sub_norm_backward")
    if residual_grad_TD is not None and residual_grad_TD.shape != x_TD.shape:
        raise ValueError(f"residual_grad {list(residual_grad_TD.shape)} must have the shape of x {list(x_TD.shape)}")
    return _backward(dy_TD, x_TD, gain_D, rstd_T1, residual_grad_TD)


@torch.no_grad()
def sub_norm_backward(
    dy_TD: torch.Tensor, x_TD: torch.Tensor, gain_D: torch.Tensor, rstd_TG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the sub-norm, straight through of :func:`sub_norm_quantize` (README eq. 6, 7).

    Args:
        dy_TD: gradient of y [..., D].
        x_TD: input of the norm [..., D].
        gain_D: gain [D].
        rstd_TG: [..., G] from the forward pass.

    Returns:
        dx: [..., D] in the dtype of x.
        dgain: [D], fp32 (fp64 for fp64 input); the same bits on every run.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes that do not fit.
    """
    _check_backward(dy_TD, x_TD, gain_D, rstd_TG)
    return _backward(dy_TD, x_TD, gain_D, rstd_TG)


def _backward(dy_TD, x_TD, gain_D, rstd_TG, residual_grad_TD=None) -> tuple[torch.Tensor, torch.Tensor]:
    if not runs_triton_by_row(x_TD, rstd_TG.shape[-1]):
        return norm_backward_reference(dy_TD, x_TD, gain_D, rstd_TG, residual_grad_TD)
    return _triton_kernels().norm_backward_triton(dy_TD, x_TD, gain_D, rstd_TG, residual_grad_TD)


def _check_norm(x_TD: torch.Tensor, gain_D: torch.Tensor) -> None:
    check_features(x_TD, "x")
    check_floating(gain_D, "gain")
    if gain_D.shape != x_TD.shape[-1:]:
        raise ValueError(f"gain of shape {list(gain_D.shape)} does not fit x of shape {list(x_TD.shape)}: pass [D]")


def _check_quantize(x_TD: torch.Tensor, gain_D: torch.Tensor, num_format: str) -> None:
    _check_norm(x_TD, gain_D)
    if num_format not in _FORMATS:
        raise ValueError(f"num_format={num_format!r}: use one of {', '.join(_FORMATS)}")


def _check_backward(dy_TD: torch.Tensor, x_TD: torch.Tensor, gain_D: torch.Tensor, rstd_TG: torch.Tensor) -> None:
    _check_norm(x_TD, gain_D)
    check_floating(dy_TD, "dy")
    if dy_TD.shape != x_TD.shape:
        raise ValueError(f"dy of shape {list(dy_TD.shape)} does not fit x of shape {list(x_TD.shape)}")
    if rstd_TG.shape[:-1] != x_TD.shape[:-1] or rstd_TG.dim() != x_TD.dim():
        raise ValueError(f"rstd of shape {list(rstd_TG.shape)} does not fit x of shape {list(x_TD.shape)}")
    check_groups(rstd_TG.shape[-1], x_TD.shape[-1], "features")


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.norm_quant import triton_kernels

    return triton_kernels

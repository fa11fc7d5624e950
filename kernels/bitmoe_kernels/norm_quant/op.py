"""Public norm and quantization in one: check the arguments, then run Triton's kernel on a GPU, else the reference.

On CPU, NaN or Inf raises ValueError; on other devices such a token (or group) gets a NaN scale and codes 0.
Not here: the gradients, which belong to the norm and to the linear, and sub-norms whose one group is split over ranks.
"""

# Shapes: T = tokens (any leading dimensions), D = features, G = groups of features.

import torch

from bitmoe_kernels.dispatch import on_triton_device, runs_triton_by_row
from bitmoe_kernels.norm_quant.reference import rms_norm_quantize_reference, sub_norm_quantize_reference
from bitmoe_kernels.validation import check_features, check_floating, check_groups, raise_on_nonfinite

_FORMATS = ("int4", "int8", "fp4")


@torch.no_grad()
def rms_norm_quantize(
    x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, num_format: str = "int8", transposed: bool = False
) -> tuple[torch.Tensor, ...]:
    """Normalize whole rows, multiply by the gain, round to the dtype of x and quantize (README eq. 1, 2, 4).

    Args:
        x_TD: activations [..., D].
        gain_D: gain of each feature [D], any floating dtype.
        eps: added to the mean square.
        num_format: int4, int8 or fp4.
        transposed: also return the codes as [D, T].

    Returns:
        codes: int8 [..., D].
        scale: [..., 1], fp32 (fp64 for fp64 input).
        rstd: [..., 1], likewise.
        codes_DT: int8 [D, T] with the leading dimensions flattened, only if ``transposed``.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: no feature, a gain that does not fit, an unknown format, or (on CPU) NaN or Inf.
    """
    _check(x_TD, gain_D, num_format)
    if runs_triton_by_row(x_TD, 1):
        result = _triton_kernels().norm_quantize_triton(x_TD, gain_D, eps, num_format)
    else:
        result = rms_norm_quantize_reference(x_TD, gain_D, eps, num_format)
        raise_on_nonfinite(result[1], x_TD, "x")
    return (*result, _transpose(result[0])) if transposed else result


@torch.no_grad()
def sub_norm_quantize(
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    eps: float,
    num_format: str = "int8",
    groups: int = 1,
    keep: float = 1.0,
    transposed: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Normalize, quantize and sparsify each group of features (README eq. 1, 3, 4, 5).

    Args:
        x_TD: activations [..., D].
        gain_D: gain of each feature [D], any floating dtype.
        eps: added to the mean square.
        num_format: int4, int8 or fp4.
        groups: number G of equal contiguous blocks of features.
        keep: share of each group whose codes are kept, the largest |y|; the others become 0.
        transposed: also return the codes as [D, T].

    Returns:
        codes: int8 [..., D].
        scale: [..., G], fp32 (fp64 for fp64 input).
        rstd: [..., G], likewise.
        codes_DT: int8 [D, T] with the leading dimensions flattened, only if ``transposed``.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: as :func:`rms_norm_quantize`, ``groups`` not a divisor of D, or a ``keep`` that is out of (0, 1] or
            keeps nothing.
    """
    _check(x_TD, gain_D, num_format)
    check_groups(groups, x_TD.shape[-1], "features")
    if not 0 < keep <= 1 or round(keep * (x_TD.shape[-1] // groups)) == 0:
        raise ValueError(f"keep={keep} of {x_TD.shape[-1] // groups} features: it must keep one or more, and at most 1")
    if runs_triton_by_row(x_TD, groups):
        result = _triton_kernels().norm_quantize_triton(x_TD, gain_D, eps, num_format, True, groups, keep)
    else:
        result = sub_norm_quantize_reference(x_TD, gain_D, eps, num_format, groups, keep)
        raise_on_nonfinite(result[1], x_TD, "x")
    return (*result, _transpose(result[0])) if transposed else result


def _check(x_TD: torch.Tensor, gain_D: torch.Tensor, num_format: str) -> None:
    check_features(x_TD, "x")
    check_floating(gain_D, "gain")
    if gain_D.shape != x_TD.shape[-1:]:
        raise ValueError(f"gain of shape {list(gain_D.shape)} does not fit x of shape {list(x_TD.shape)}: pass [D]")
    if num_format not in _FORMATS:
        raise ValueError(f"num_format={num_format!r}: use one of {', '.join(_FORMATS)}")


def _transpose(codes_TD: torch.Tensor) -> torch.Tensor:
    """Codes [..., D] as contiguous [D, T]."""
    codes_TD = codes_TD.flatten(0, -2) if codes_TD.dim() > 1 else codes_TD.unsqueeze(0)
    if on_triton_device(codes_TD):
        return _triton_kernels().transpose_codes_triton(codes_TD)
    return codes_TD.T.contiguous()


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.norm_quant import triton_kernels

    return triton_kernels

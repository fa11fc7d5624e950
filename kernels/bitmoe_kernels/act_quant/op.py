"""Public activation quantizers: check the arguments, then run Triton's kernels on a GPU, else the reference.

Every function takes [..., D] in bf16, fp16, fp32 or fp64 and computes in fp32; for fp64 input it computes
in fp64 and returns an fp64 scale. On CPU, NaN or Inf raises ValueError; on other devices, where looking would
make the device wait, such a token (or group) gets a NaN scale and codes 0, so that the loss becomes NaN.
Not here: the straight-through gradient, which belongs to the linear that multiplies the codes.
"""

# Shapes: T = tokens (any leading dimensions), D = features, G = groups of features.

import torch

from bitmoe_kernels.act_quant.reference import (
    dequantize_reference,
    int8_codes_reference,
    int8_scale_reference,
    quantize_fp4_reference,
    quantize_int4_reference,
    quantize_int8_reference,
)
from bitmoe_kernels.dispatch import runs_triton_by_row
from bitmoe_kernels.validation import check_features, check_floating, check_groups, raise_on_nonfinite


@torch.no_grad()
def quantize_int4(x_TD: torch.Tensor, code_dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token to INT4 by its mean magnitude (BitNet a4.8, eq. 7).

    Args:
        x_TD: activations [..., D].
        code_dtype: int8, or float8_e4m3fn, which holds these codes exactly and which FP8 tensor cores multiply.

    Returns:
        codes: [..., D] of ``code_dtype``, in [-8, 7].
        scale: [..., 1] = mean|x| / sqrt(7), the mean at least 1e-5.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: no feature, another ``code_dtype``, or (on CPU) NaN or Inf.
    """
    check_features(x_TD, "x")
    check_code_dtype(code_dtype, "int4")
    if runs_triton_by_row(x_TD):
        return _triton_kernels().quantize_triton(x_TD, "int4", code_dtype=code_dtype)
    codes_TD, scale_T1 = quantize_int4_reference(x_TD)
    raise_on_nonfinite(scale_T1, x_TD, "x")
    return codes_TD.to(code_dtype), scale_T1


@torch.no_grad()
def quantize_int8(x_TD: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token and group of features to INT8 by its largest magnitude (BitNet a4.8, eq. 3).

    Args:
        x_TD: activations [..., D].
        groups: number G of equal contiguous blocks of features, each with its own scale.

    Returns:
        codes: int8 [..., D].
        scale: [..., G] = max|x| / 127, the maximum at least 1e-5.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: no feature, ``groups`` not a divisor of D, or (on CPU) NaN or Inf.
    """
    check_features(x_TD, "x")
    check_groups(groups, x_TD.shape[-1], "features")
    if runs_triton_by_row(x_TD, groups):
        return _triton_kernels().quantize_triton(x_TD, "int8", groups)
    codes_TD, scale_TG = quantize_int8_reference(x_TD, groups)
    raise_on_nonfinite(scale_TG, x_TD, "x")
    return codes_TD, scale_TG


@torch.no_grad()
def quantize_fp4(x_TD: torch.Tensor, code_dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token to FP4 E2M1 by its largest magnitude (BitNet a4.8, eq. 8).

    The E2M1 grid is 0, 0.5, 1, 1.5, 2, 3, 4, 6 and its negatives. The codes hold twice the grid value, so
    that they are integers and ``x ~ codes * scale`` holds as for every other format.

    Args:
        x_TD: activations [..., D].
        code_dtype: int8, or float8_e4m3fn, which holds these codes exactly and which FP8 tensor cores multiply.

    Returns:
        codes: [..., D] of ``code_dtype``, each 0, 1, 2, 3, 4, 6, 8, 12 or its negative.
        scale: [..., 1] = max|x| / 12, the maximum at least 1e-5.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: no feature, another ``code_dtype``, or (on CPU) NaN or Inf.
    """
    check_features(x_TD, "x")
    check_code_dtype(code_dtype, "fp4")
    if runs_triton_by_row(x_TD):
        return _triton_kernels().quantize_triton(x_TD, "fp4", code_dtype=code_dtype)
    codes_TD, scale_T1 = quantize_fp4_reference(x_TD)
    raise_on_nonfinite(scale_T1, x_TD, "x")
    return codes_TD.to(code_dtype), scale_T1


@torch.no_grad()
def int8_scale(absmax_TG: torch.Tensor) -> torch.Tensor:
    """Turn largest magnitudes into INT8 scales: first half of :func:`quantize_int8`.

    Ranks that hold parts of a group take the maximum of their ``absmax_TG`` before they call this.

    Args:
        absmax_TG: largest |x| [..., G] per token and group, over all ranks that share the group.

    Returns:
        scale [..., G] = absmax / 127, with absmax at least 1e-5; fp32, or fp64 for fp64 input.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: (on CPU) NaN or Inf.
    """
    check_floating(absmax_TG, "absmax")
    scale_TG = int8_scale_reference(absmax_TG)
    raise_on_nonfinite(scale_TG, absmax_TG, "absmax")
    return scale_TG


@torch.no_grad()
def int8_codes(x_TD: torch.Tensor, scale_TG: torch.Tensor) -> torch.Tensor:
    """Round to INT8 codes under given scales: second half of :func:`quantize_int8`.

    Args:
        x_TD: activations [..., D].
        scale_TG: [..., G] from :func:`int8_scale` of these activations; G equal blocks of the D features.

    Returns:
        int8 [..., D].

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes that do not fit, or (on CPU) NaN or Inf in either tensor.
    """
    check_features(x_TD, "x")
    check_floating(scale_TG, "scale")
    _check_scale(x_TD, scale_TG)
    raise_on_nonfinite(x_TD, x_TD, "x")
    raise_on_nonfinite(scale_TG, scale_TG, "scale")
    if runs_triton_by_row(x_TD, scale_TG.shape[-1]) and scale_TG.dtype == torch.float32:
        return _triton_kernels().int8_codes_triton(x_TD, scale_TG)
    return int8_codes_reference(x_TD, scale_TG)


@torch.no_grad()
def dequantize(codes_TD: torch.Tensor, scale_TG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes times their scales, rounded once (README eq. 4).

    Args:
        codes_TD: int8 or e4m3 [..., D].
        scale_TG: fp32 or fp64 [..., G]; G equal blocks of the D features.
        dtype: of the result.

    Returns:
        [..., D].

    Raises:
        TypeError: codes of another type, a scale that is not floating point.
        ValueError: shapes that do not fit.
    """
    if codes_TD.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise TypeError(f"codes must be int8 or float8_e4m3fn, got {codes_TD.dtype}")
    check_floating(scale_TG, "scale")
    _check_scale(codes_TD, scale_TG)
    is_fast = runs_triton_by_row(scale_TG.new_empty(0, codes_TD.shape[-1], dtype=dtype), scale_TG.shape[-1])
    if is_fast and scale_TG.dtype == torch.float32:
        return _triton_kernels().dequantize_triton(codes_TD, scale_TG, dtype)
    return dequantize_reference(codes_TD, scale_TG, dtype)


def _check_scale(x_TD: torch.Tensor, scale_TG: torch.Tensor) -> None:
    """Raise unless each token has a scale for each of G equal groups of features."""
    if scale_TG.dim() != x_TD.dim() or scale_TG.shape[:-1] != x_TD.shape[:-1]:
        raise ValueError(
            f"scale of shape {list(scale_TG.shape)} does not fit x of shape {list(x_TD.shape)}: "
            f"it must be {[*x_TD.shape[:-1], 'groups']}"
        )
    check_groups(scale_TG.shape[-1], x_TD.shape[-1], "features")


def check_code_dtype(code_dtype: torch.dtype, num_format: str) -> None:
    """Raise ValueError unless ``code_dtype`` holds the codes of ``num_format`` exactly."""
    if code_dtype != torch.int8 and (code_dtype != torch.float8_e4m3fn or num_format == "int8"):
        raise ValueError(f"code_dtype={code_dtype} of {num_format}: use int8, or float8_e4m3fn for int4 and fp4")


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.act_quant import triton_kernels

    return triton_kernels

"""Public quantizer of cached keys and values: check the arguments, then run the reference.

Keys are quantized after RoPE and both at inference only; nothing is trained with it (BitNet a4.8, section 3.1). On CPU,
NaN or Inf raises ValueError; on other devices, where looking would make the device wait, such a head gets a NaN
scale and comes back as NaN.
Not here: the cache, and attention over it.
"""

# Shapes: T = tokens (any leading dimensions), H = heads, D = width of a head, B = bytes of a head.

import torch

from bitmoe_kernels.kv_quant.reference import (
    PLANES,
    dequantize_kv_reference,
    pack_reference,
    quantize_kv_reference,
    unpack_reference,
)
from bitmoe_kernels.validation import check_features, raise_on_nonfinite


def packed_width(head_dim: int, bits: int) -> int:
    """Bytes that the codes of one head take: ``head_dim * bits / 8``.

    Raises:
        ValueError: ``bits`` neither 3 nor 4, or ``head_dim`` not a positive multiple of 8.
    """
    if bits not in PLANES:
        raise ValueError(f"bits={bits}: keys and values can be packed in 3 or 4 bits")
    if head_dim < 1 or head_dim % 8:
        raise ValueError(f"head_dim={head_dim}: low-bit keys and values need a multiple of 8")
    return head_dim * bits // 8


@torch.no_grad()
def quantize_kv(x_THD: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize and pack each token and head by its largest magnitude (README eq. 1 to 3).

    Args:
        x_THD: keys or values [..., H, D], any floating dtype; computed in fp32. D is a multiple of 8.
        bits: 3 or 4.

    Returns:
        packed: uint8 [..., H, packed_width(D, bits)].
        scale: bf16 [..., H] = max|x| / (2**bits - 1), 0 where the head is zero.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another ``bits`` or D, or (on CPU) NaN or Inf.
    """
    check_features(x_THD, "x")
    packed_width(x_THD.shape[-1], bits)
    unsigned_THD, scale_TH = quantize_kv_reference(x_THD, bits)
    raise_on_nonfinite(scale_TH, x_THD, "x")
    return pack_reference(unsigned_THD, bits), scale_TH


@torch.no_grad()
def dequantize_kv(
    packed_THB: torch.Tensor, scale_TH: torch.Tensor, bits: int, head_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """Unpack what :func:`quantize_kv` made: ``codes * scale``.

    Args:
        packed_THB: uint8 [..., H, packed_width(head_dim, bits)].
        scale_TH: bf16 [..., H].
        bits: 3 or 4.
        head_dim: D.
        dtype: floating dtype of the result; the product is exact in fp32 and rounded to it once.

    Returns:
        ``dtype`` [..., H, D].

    Raises:
        TypeError: not a uint8 and a bf16 tensor, or ``dtype`` not floating.
        ValueError: another ``bits`` or ``head_dim``, or shapes that do not fit.
    """
    width = packed_width(head_dim, bits)
    for name, x, expected in (("packed", packed_THB, torch.uint8), ("scale", scale_TH, torch.bfloat16)):
        if not isinstance(x, torch.Tensor) or x.dtype != expected:
            raise TypeError(f"{name} must be a {expected} tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype}: keys and values come back in a floating-point type")
    if packed_THB.shape != (*scale_TH.shape, width):
        raise ValueError(
            f"packed of shape {list(packed_THB.shape)} does not fit scale of shape {list(scale_TH.shape)}: "
            f"heads of {head_dim} in {bits} bits must be {[*scale_TH.shape, width]}"
        )
    return dequantize_kv_reference(unpack_reference(packed_THB, bits), scale_TH, bits, dtype)

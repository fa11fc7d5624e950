"""Low-bit keys and values in plain torch: the truth for every other implementation.

The grid is symmetric and has no zero: the 2**bits odd integers from 1 - 2**bits to 2**bits - 1 (README says why).
The scale is rounded to bf16 before the codes are made, so the codes fit the scale that is stored. A head with NaN or
Inf gets a NaN scale. Arguments are not validated here: op.py does that.
"""

# Shapes: T = tokens (any leading dimensions), H = heads, D = width and B = bytes of a head, m = bytes of a plane.

import torch

# Bits of the fields of each plane, one plane after the other: the most significant bits of the codes come first.
PLANES = {3: (2, 1), 4: (4,)}


def quantize_kv_reference(x_THD: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unsigned codes uint8 [T, H, D] in [0, 2**bits), scale bf16 [T, H] (README eq. 1 and 2)."""
    x_THD = x_THD.float()
    absmax_TH = x_THD.abs().amax(dim=-1)
    # A tensor as divisor: CUDA turns division by a Python number into a product with its rounded reciprocal.
    scale_TH = (absmax_TH / torch.full_like(absmax_TH, 2**bits - 1)).bfloat16()
    # Subnormal numbers have no precision, and some devices none at all.
    scale_TH = scale_TH.masked_fill(scale_TH < torch.finfo(torch.bfloat16).tiny, 0.0)
    scale_TH = scale_TH.masked_fill(~absmax_TH.isfinite(), float("nan"))
    steps_THD = (x_THD / (2 * scale_TH.float().unsqueeze(-1))).floor().nan_to_num(nan=0.0)
    return (steps_THD + 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8), scale_TH


def dequantize_kv_reference(
    unsigned_THD: torch.Tensor, scale_TH: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """``codes * scale`` [T, H, D] with codes = 2 * unsigned - (2**bits - 1), rounded to ``dtype`` once."""
    codes_THD = 2 * unsigned_THD.float() - (2**bits - 1)
    return (codes_THD * scale_TH.float().unsqueeze(-1)).to(dtype)


def pack_reference(unsigned_THD: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes [T, H, D] to bytes [T, H, B], plane after plane (README eq. 3)."""
    planes, low_bit = [], bits
    for width in PLANES[bits]:
        low_bit -= width
        planes.append(_join_fields((unsigned_THD >> low_bit) & (2**width - 1), width))
    return torch.cat(planes, dim=-1)


def unpack_reference(packed_THB: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [T, H, B] to unsigned codes [T, H, D]."""
    head_dim = packed_THB.shape[-1] * 8 // bits
    planes = packed_THB.split([head_dim * width // 8 for width in PLANES[bits]], dim=-1)
    unsigned_THD = _split_fields(planes[0], PLANES[bits][0])
    for plane, width in zip(planes[1:], PLANES[bits][1:], strict=True):
        unsigned_THD = (unsigned_THD << width) | _split_fields(plane, width)
    return unsigned_THD


def _join_fields(fields_THD: torch.Tensor, width: int) -> torch.Tensor:
    """Fields of ``width`` bits to bytes [T, H, m]: byte j holds fields j, j + m, ..., the first in the top bits."""
    parts = fields_THD.chunk(8 // width, dim=-1)
    plane_THm = parts[0]
    for part in parts[1:]:
        plane_THm = (plane_THm << width) | part
    return plane_THm


def _split_fields(plane_THm: torch.Tensor, width: int) -> torch.Tensor:
    """Bytes [T, H, m] to fields [T, H, D]: the inverse of ``_join_fields``."""
    return torch.cat([plane_THm >> shift for shift in range(8 - width, -1, -width)], dim=-1) & (2**width - 1)

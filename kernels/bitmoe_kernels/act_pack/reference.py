"""4-bit activation codes in half a byte each, in plain torch: the truth for every other implementation.

Each function follows the formulas of the README. Arguments are not validated here: op.py does that.
"""

# Shapes: T = tokens (any leading dimensions), D = features, B = ceil(D / 2) bytes of a row.

import torch


def pack_codes_reference(codes_TD: torch.Tensor, num_format: str) -> torch.Tensor:
    """Two planes of fields joined (README eq. 1): uint8 [T, B]."""
    codes_TD = torch.nn.functional.pad(codes_TD.to(torch.int8), (0, codes_TD.shape[-1] % 2))
    fields_TD = codes_TD & 15 if num_format == "int4" else _e2m1_fields(codes_TD)
    low_TB, high_TB = fields_TD.view(torch.uint8).chunk(2, dim=-1)
    return low_TB | (high_TB << 4)


def unpack_codes_reference(
    packed_TB: torch.Tensor, num_features: int, num_format: str, code_dtype: torch.dtype
) -> torch.Tensor:
    """The inverse: codes [T, D] of ``code_dtype``."""
    fields_TD = torch.cat([packed_TB & 15, packed_TB >> 4], dim=-1)[..., :num_features].view(torch.int8)
    codes_TD = (fields_TD << 4) >> 4 if num_format == "int4" else _e2m1_codes(fields_TD)
    return codes_TD.to(code_dtype)


def _e2m1_fields(codes: torch.Tensor) -> torch.Tensor:
    """Sign in bit 3, below it the place of |code| among 0, 1, 2, 3, 4, 6, 8, 12 (README eq. 3); int8."""
    size = codes.abs()
    place = torch.where(size < 4, size, torch.where(size < 8, (size >> 1) + 2, (size >> 2) + 4))
    return place | ((codes < 0).to(torch.int8) << 3)


def _e2m1_codes(fields: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_e2m1_fields``; int8."""
    place = fields & 7
    size = torch.where(place < 4, place, (2 + (place & 1)) << ((place >> 1) - 1).clamp(min=0))
    return torch.where(fields & 8 != 0, -size, size)

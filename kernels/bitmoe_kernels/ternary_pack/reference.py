"""Packed ternary codes in plain torch, feature by feature: the truth for every other implementation.

Each function follows the formulas of the README. Arguments are not validated here: op.py does that.
"""

# Shapes: O = output rows (any leading dimensions), I = input features, B = bytes of a row.

import torch

BLOCK = 256
CODES_PER_BYTE = {"2bit": 4, "1.6bit": 5}


def pack_2bit_reference(codes_OI: torch.Tensor) -> torch.Tensor:
    """Two's complement in two bits, planes inside blocks of 256 features (README eq. 1): uint8 [O, B]."""
    byte_I, plane_I = _places(codes_OI.shape[-1], codes_OI.device)
    fields_OI = (codes_OI.view(torch.uint8) & 3) << (6 - 2 * plane_I)
    packed_OB = fields_OI.new_zeros((*codes_OI.shape[:-1], -(-codes_OI.shape[-1] // 4)))
    return packed_OB.index_add_(-1, byte_I, fields_OI)


def unpack_2bit_reference(packed_OB: torch.Tensor, num_features: int) -> torch.Tensor:
    """Codes int8 [O, I]: shift the field to the top, then arithmetically down."""
    byte_I, plane_I = _places(num_features, packed_OB.device)
    return (packed_OB[..., byte_I] << (2 * plane_I)).view(torch.int8) >> 6


def pack_base3_reference(codes_OI: torch.Tensor) -> torch.Tensor:
    """Five base-3 digits a byte, the first least (README eq. 2): uint8 [O, B]."""
    missing = -codes_OI.shape[-1] % 5
    digits_OB5 = torch.nn.functional.pad(codes_OI, (0, missing)).unflatten(-1, (-1, 5)) + 1
    return (digits_OB5.view(torch.uint8) * _powers_of_3(codes_OI.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_base3_reference(packed_OB: torch.Tensor, num_features: int) -> torch.Tensor:
    """Codes int8 [O, I] from base-3 digits."""
    digits_OB5 = packed_OB.unsqueeze(-1) // _powers_of_3(packed_OB.device) % 3
    return digits_OB5.flatten(-2)[..., :num_features].view(torch.int8) - 1


def _places(num_features: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Byte int64 [I] and plane uint8 [I] in which each feature of a row lies in the 2bit layout."""
    feature_I = torch.arange(num_features, device=device)
    block_I, place_I = feature_I // BLOCK, feature_I % BLOCK
    block_bytes_I = ((num_features - BLOCK * block_I).clamp(max=BLOCK) + 3) // 4
    byte_I = BLOCK // 4 * block_I + place_I % block_bytes_I
    return byte_I, (place_I // block_bytes_I).to(torch.uint8)


def _powers_of_3(device: torch.device) -> torch.Tensor:
    """1, 3, 9, 27, 81 as uint8 [5]."""
    return (3 ** torch.arange(5, device=device)).to(torch.uint8)

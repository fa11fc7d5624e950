"""Four ternary codes a byte, as transformers' ``bitnet`` packs them.

The rows of a matrix are cut into four quarters, and a byte holds one code of each: with R = O / 4,
``packed[r, c] = sum((codes[i R + r, c] + 1) << 2 i for i in range(4))``. So neighbours in a byte are R rows apart, and
no part of a packed matrix is a packed part of the matrix. The two bits ``11`` never occur.
"""

# Shapes: O = output rows, I = input features, R = O / 4.

import torch

CODES_PER_BYTE = 4
TERNARY_SUFFIX = "_proj.weight"
"""Ends the name of every ternary matrix, as exported and in transformers."""


def pack_rows(codes_OI: torch.Tensor) -> torch.Tensor:
    """Pack ternary codes.

    Args:
        codes_OI: int8 [O, I] in {-1, 0, 1}.

    Returns:
        uint8 [O / 4, I].

    Raises:
        ValueError: O is no multiple of 4, or a code is not ternary.
    """
    if codes_OI.shape[0] % CODES_PER_BYTE:
        raise ValueError(f"{codes_OI.shape[0]} rows: four of them share a byte, so they must be a multiple of 4")
    low, high = (int(bound) for bound in codes_OI.aminmax())
    if low < -1 or high > 1:
        raise ValueError(f"codes reach from {low} to {high}: packed codes must be -1, 0 or 1")
    packed_RI = torch.zeros_like(codes_OI[: codes_OI.shape[0] // CODES_PER_BYTE], dtype=torch.uint8)
    for quarter, part_RI in enumerate(codes_OI.chunk(CODES_PER_BYTE)):
        packed_RI |= (part_RI + 1).to(torch.uint8) << 2 * quarter
    return packed_RI


def unpack_rows(packed_RI: torch.Tensor) -> torch.Tensor:
    """Unpack what ``pack_rows`` made.

    Args:
        packed_RI: uint8 [O / 4, I].

    Returns:
        int8 [O, I] in {-1, 0, 1}.

    Raises:
        ValueError: bytes that no ternary codes make.
    """
    # Both bits of a field: the upper one is moved onto the lower one.
    bad_RI = packed_RI & (packed_RI >> 1) & 0b01010101
    if bad_RI.any():
        count = int(bad_RI.count_nonzero())
        raise ValueError(f"{count} of {packed_RI.numel()} bytes are no ternary codes")
    quarters = [((packed_RI >> 2 * quarter) & 3).to(torch.int8) - 1 for quarter in range(CODES_PER_BYTE)]
    return torch.cat(quarters)

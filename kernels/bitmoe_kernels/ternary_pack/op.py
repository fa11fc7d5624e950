"""Public packing of ternary codes into bytes: check the arguments, then pack or unpack.

``2bit`` is the layout products read, ``1.6bit`` the one that takes least disk. A byte that no ternary code makes
raises ValueError: a damaged file must not pass as another model. Looking at the bytes makes a GPU wait, so
``unpack(..., check=False)`` leaves it out, for codes that were checked when they were loaded.
Not here: products with packed codes, and scales, which are stored beside the codes.
"""

# Shapes: O = output rows (any leading dimensions), I = input features, B = bytes of a row.

import torch

from bitmoe_kernels.ternary_pack.reference import (
    BLOCK,
    CODES_PER_BYTE,
    pack_base3_reference,
    unpack_base3_reference,
)


def packed_width(num_features: int, layout: str = "2bit") -> int:
    """Bytes that one row of ``num_features`` codes takes.

    Args:
        num_features: I, at least 1.
        layout: ``2bit`` (four codes a byte) or ``1.6bit`` (five).

    Raises:
        ValueError: no feature, or an unknown layout.
    """
    if layout not in CODES_PER_BYTE:
        raise ValueError(f"layout={layout!r}: use one of {', '.join(CODES_PER_BYTE)}")
    if num_features < 1:
        raise ValueError(f"num_features={num_features}: a row needs at least one feature")
    return -(-num_features // CODES_PER_BYTE[layout])


@torch.no_grad()
def pack(codes_OI: torch.Tensor, layout: str = "2bit") -> torch.Tensor:
    """Pack ternary codes along the input features (README eq. 1 and 2).

    Args:
        codes_OI: int8 [..., I] in {-1, 0, 1}.
        layout: ``2bit`` or ``1.6bit``.

    Returns:
        uint8 [..., packed_width(I, layout)].

    Raises:
        TypeError: not an int8 tensor.
        ValueError: no feature, an unknown layout, or a code that is not ternary.
    """
    _check_dtype(codes_OI, torch.int8, "codes")
    packed_width(codes_OI.shape[-1] if codes_OI.dim() else 0, layout)
    if codes_OI.numel():
        low, high = (int(bound) for bound in codes_OI.aminmax())
        if low < -1 or high > 1:
            raise ValueError(
                f"codes of shape {list(codes_OI.shape)} reach from {low} to {high}: packed codes must be -1, 0 or 1"
            )
    return _pack_2bit(codes_OI) if layout == "2bit" else pack_base3_reference(codes_OI)


@torch.no_grad()
def unpack(packed_OB: torch.Tensor, num_features: int, layout: str = "2bit", *, check: bool = True) -> torch.Tensor:
    """Unpack what :func:`pack` made.

    Args:
        packed_OB: uint8 [..., packed_width(num_features, layout)].
        num_features: I.
        layout: ``2bit`` or ``1.6bit``.
        check: whether to look for bytes that are no codes. Without it nothing waits for a GPU and no shape depends
            on the data, so the call can be captured in a CUDA graph; bad bytes then give codes that mean nothing.

    Returns:
        int8 [..., I] in {-1, 0, 1}.

    Raises:
        TypeError: not a uint8 tensor.
        ValueError: no feature, an unknown layout, a wrong width, or (with ``check``) bytes that are no codes.
    """
    _check_dtype(packed_OB, torch.uint8, "packed")
    width = packed_width(num_features, layout)
    if packed_OB.dim() == 0 or packed_OB.shape[-1] != width:
        raise ValueError(
            f"packed has shape {list(packed_OB.shape)}: a row of {num_features} codes takes {width} bytes in {layout}"
        )
    if check:
        _check_bytes(packed_OB, num_features, layout)
    unpack_layout = _unpack_2bit if layout == "2bit" else unpack_base3_reference
    return unpack_layout(packed_OB, num_features)


def _pack_2bit(codes_OI: torch.Tensor) -> torch.Tensor:
    """Uint8 [O, B]: four planes, shifted and joined, of the whole blocks and of the shorter last one."""
    num_blocks, rest = divmod(codes_OI.shape[-1], BLOCK)
    whole_OI, last_OI = codes_OI.split([num_blocks * BLOCK, rest], dim=-1)
    packed_OB = _join_planes(whole_OI.unflatten(-1, (num_blocks, BLOCK))).flatten(-2)
    if rest == 0:
        return packed_OB
    last_OB = _join_planes(torch.nn.functional.pad(last_OI, (0, -rest % 4)))
    return torch.cat([packed_OB, last_OB], dim=-1)


def _unpack_2bit(packed_OB: torch.Tensor, num_features: int) -> torch.Tensor:
    """Int8 [O, I]: the inverse of ``_pack_2bit``."""
    num_blocks, rest = divmod(num_features, BLOCK)
    whole_OB, last_OB = packed_OB.split([num_blocks * BLOCK // 4, -(-rest // 4)], dim=-1)
    codes_OI = _split_planes(whole_OB.unflatten(-1, (num_blocks, BLOCK // 4))).flatten(-2)
    if rest == 0:
        return codes_OI
    return torch.cat([codes_OI, _split_planes(last_OB)[..., :rest]], dim=-1)


def _join_planes(codes: torch.Tensor) -> torch.Tensor:
    """Codes int8 [..., 4 m] to bytes uint8 [..., m]."""
    first, second, third, fourth = (codes.view(torch.uint8) & 3).chunk(4, dim=-1)
    return (first << 6) | (second << 4) | (third << 2) | fourth


def _split_planes(packed: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [..., m] to codes int8 [..., 4 m]: each field to the top, then arithmetically down."""
    fields = packed.view(torch.int8)
    return torch.cat([fields, fields << 2, fields << 4, fields << 6], dim=-1).bitwise_right_shift_(6)


def _check_dtype(x: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise TypeError unless ``x`` is a tensor of ``dtype``."""
    if not isinstance(x, torch.Tensor) or x.dtype != dtype:
        raise TypeError(f"{name} must be a {dtype} tensor, got {getattr(x, 'dtype', type(x).__name__)}")


def _check_bytes(packed_OB: torch.Tensor, num_features: int, layout: str) -> None:
    """Raise ValueError where a byte is not what ``pack`` writes for some ternary codes."""
    if layout == "2bit":
        # `10`: the upper bit of a field without the lower one.
        bad_OB = packed_OB & ~(packed_OB << 1) & 0b10101010
        rest = num_features % BLOCK
        beyond = _split_planes(packed_OB[..., packed_OB.shape[-1] - -(-rest // 4) :])[..., rest:]
    else:
        bad_OB = packed_OB > 242
        rest = (num_features - 1) % 5 + 1
        beyond = unpack_base3_reference(packed_OB[..., -1:], 5)[..., rest:]
    where = f"packed of shape {list(packed_OB.shape)} in layout {layout}"
    if bad_OB.any():
        count = int(bad_OB.count_nonzero())
        raise ValueError(f"{where} holds {count} bytes that are no ternary codes: the file is damaged")
    if beyond.any():
        raise ValueError(f"{where} holds codes beyond feature {num_features}: the file is damaged or the size is wrong")

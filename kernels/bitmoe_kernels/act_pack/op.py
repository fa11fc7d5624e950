"""Public packing of 4-bit activation codes: check the arguments, then Triton's kernels on a GPU, else the reference.

For what travels between ranks and is unpacked on arrival. The quantizers' codes come back bit for bit, as int8 or as
e4m3, whichever they were. Not here: INT8 codes, which fill their byte, and scales, which travel beside the codes.
"""

# Shapes: T = tokens (any leading dimensions), D = features, B = ceil(D / 2) bytes of a row.

import torch

from bitmoe_kernels.act_pack.reference import pack_codes_reference, unpack_codes_reference
from bitmoe_kernels.dispatch import on_triton_device

_FORMATS = ("int4", "fp4")
_CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)


@torch.no_grad()
def pack_codes(codes_TD: torch.Tensor, num_format: str) -> torch.Tensor:
    """Pack two codes a byte (README eq. 1).

    Args:
        codes_TD: [..., D] as a quantizer of this format writes them: int8 or float8_e4m3fn.
        num_format: int4 or fp4.

    Returns:
        uint8 [..., ceil(D / 2)].

    Raises:
        TypeError: codes of another type.
        ValueError: no feature, another format, or (on CPU) a number that is no code of it. On other devices, where
            looking would make the device wait, such a number comes back as another.
    """
    if not isinstance(codes_TD, torch.Tensor) or codes_TD.dtype not in _CODE_DTYPES:
        kind = getattr(codes_TD, "dtype", type(codes_TD).__name__)
        raise TypeError(f"codes must be an int8 or float8_e4m3fn tensor, got {kind}")
    _check_format(num_format)
    if codes_TD.dim() == 0 or codes_TD.shape[-1] == 0:
        raise ValueError(f"codes have shape {list(codes_TD.shape)}: they need at least one feature (last dimension)")
    if on_triton_device(codes_TD):
        return _triton_kernels().pack_codes_triton(codes_TD, num_format)
    packed_TB = pack_codes_reference(codes_TD, num_format)
    if codes_TD.device.type == "cpu":
        _check_lossless(codes_TD, packed_TB, num_format)
    return packed_TB


@torch.no_grad()
def unpack_codes(
    packed_TB: torch.Tensor, num_features: int, num_format: str, code_dtype: torch.dtype = torch.int8
) -> torch.Tensor:
    """Unpack what :func:`pack_codes` made (README eq. 2 and 3).

    Args:
        packed_TB: uint8 [..., ceil(num_features / 2)].
        num_features: D.
        num_format: int4 or fp4, as it was packed.
        code_dtype: int8 or float8_e4m3fn.

    Returns:
        codes [..., D] of ``code_dtype``.

    Raises:
        TypeError: not a uint8 tensor.
        ValueError: another format or ``code_dtype``, or a width that does not fit.
    """
    if not isinstance(packed_TB, torch.Tensor) or packed_TB.dtype != torch.uint8:
        raise TypeError(f"packed must be a uint8 tensor, got {getattr(packed_TB, 'dtype', type(packed_TB).__name__)}")
    _check_format(num_format)
    if code_dtype not in _CODE_DTYPES:
        raise ValueError(f"code_dtype={code_dtype}: use int8 or float8_e4m3fn")
    if num_features < 1 or packed_TB.dim() == 0 or packed_TB.shape[-1] != (num_features + 1) // 2:
        raise ValueError(
            f"packed has shape {list(packed_TB.shape)}: "
            f"a row of num_features={num_features} takes {(num_features + 1) // 2} bytes, and at least one"
        )
    if on_triton_device(packed_TB):
        return _triton_kernels().unpack_codes_triton(packed_TB, num_features, num_format, code_dtype)
    return unpack_codes_reference(packed_TB, num_features, num_format, code_dtype)


def _check_format(num_format: str) -> None:
    if num_format not in _FORMATS:
        raise ValueError(f"num_format={num_format!r}: use one of {', '.join(_FORMATS)}, whose codes fit in 4 bits")


def _check_lossless(codes_TD: torch.Tensor, packed_TB: torch.Tensor, num_format: str) -> None:
    """Raise ValueError where a code does not come back."""
    back_TD = unpack_codes_reference(packed_TB, codes_TD.shape[-1], num_format, torch.int8)
    count = int((back_TD != codes_TD.to(torch.int8)).count_nonzero())
    if count:
        raise ValueError(
            f"codes of shape {list(codes_TD.shape)} hold {count} numbers that are no codes of {num_format}: "
            "pack what its quantizer wrote"
        )


def _triton_kernels():
    # Imported at the first use: not every machine has Triton.
    from bitmoe_kernels.act_pack import triton_kernels

    return triton_kernels

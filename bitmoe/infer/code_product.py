"""Products of activation codes with packed ternary weights: exact integer sums, whatever the way.

Weights stay packed in memory. What a product unpacks lives in a chunk that stays in cache:

* few rows on a CPU (decoding): one AND per plane turns four packed weights into int8 numbers 64, 16, 4 and 1 times the
  code, and a vector product of int8 numbers sums each plane. Nothing is shifted and no code is put in order: the
  activations are, which are one row.
* many rows on a CPU: chunks of the weight are unpacked to int8 codes for an int8 matrix product.
* elsewhere: the weight is unpacked whole for ``code_matmul``; shapes are static and nothing waits for the device.
"""

# Shapes: T = tokens, G = groups of the input, i = features of a group, I = G i, O = output rows, B = bytes of a row,
#         R = rows of few, * = optional batch (experts).

import torch

from bitmoe_kernels.ternary_gemm import code_matmul
from bitmoe_kernels.ternary_pack import unpack

# Up to here a product row by row is faster than one matrix product (0.1 ms a row against 0.7 ms, 4096 x 1536, AVX-512).
_FEW_ROWS = 4
# Bytes of weights unpacked at once, about a core's second-level cache.
_CHUNK_BYTES = 2**20
_BLOCK = 256

# Tensors, because torch makes one of a Python number at every call.
_UPPER_BITS = torch.tensor(0b00101010, dtype=torch.uint8)
_MASKS = tuple(torch.tensor(0b11 << shift, dtype=torch.uint8) for shift in (0, 2, 4, 6))


def code_product(x_TGi: torch.Tensor, packed_OB: torch.Tensor) -> torch.Tensor:
    """Multiply activation codes with packed weight codes, each group of features by itself.

    Args:
        x_TGi: int8 [*, T, G, i].
        packed_OB: uint8 [*, O, B], the ``2bit`` packing of [O, G i].

    Returns:
        The integer sums, fp32 [*, G, T, O].
    """
    if not x_TGi.is_cpu:
        return _unpacked_product(x_TGi, packed_OB)
    if packed_OB.dim() == 3:
        return torch.stack([code_product(x, packed) for x, packed in zip(x_TGi, packed_OB, strict=True)])
    num_tokens, num_groups, _ = x_TGi.shape
    if num_tokens * num_groups <= _FEW_ROWS:
        sums_RO = _few_rows_product(_rows(x_TGi), packed_OB)
        return sums_RO.view(num_tokens, num_groups, -1).transpose(0, 1)
    return _chunked_product(x_TGi, packed_OB)


def _unpacked_product(x_TGi: torch.Tensor, packed_OB: torch.Tensor) -> torch.Tensor:
    """Fp32 [*, G, T, O] by way of all codes; the batch and the groups become one batch of products."""
    batch, (num_groups, width) = packed_OB.shape[:-2], x_TGi.shape[-2:]
    w_OGi = unpack(packed_OB, num_groups * width, check=False).unflatten(-1, (num_groups, width))
    x_GTi, w_GOi = (t.transpose(-3, -2).reshape(-1, t.shape[-3], width) for t in (x_TGi, w_OGi))
    return code_matmul(x_GTi, w_GOi).view(*batch, num_groups, x_TGi.shape[-3], packed_OB.shape[-2])


def _chunked_product(x_TGi: torch.Tensor, packed_OB: torch.Tensor) -> torch.Tensor:
    """Fp32 [G, T, O] through chunks of int8 codes."""
    num_groups, width = x_TGi.shape[1:]
    x_GTi = x_TGi.transpose(0, 1).contiguous()
    chunks = []
    for part_OB in _chunks(packed_OB, bytes_per_row=num_groups * width):
        w_OGi = unpack(part_OB, num_groups * width, check=False).unflatten(-1, (num_groups, width))
        chunks.append(torch.stack([torch._int_mm(x_GTi[g], w_OGi[:, g].T) for g in range(num_groups)]))
    return torch.cat(chunks, dim=-1).float()


def _chunks(packed_OB: torch.Tensor, bytes_per_row: int) -> tuple[torch.Tensor, ...]:
    """Blocks of output rows, each of which unpacks to ``_CHUNK_BYTES``."""
    return packed_OB.split(max(1, _CHUNK_BYTES // bytes_per_row))


def _rows(x_TGi: torch.Tensor) -> torch.Tensor:
    """Int8 [T G, I]: a row for each group of a token, zero outside of the group."""
    num_tokens, num_groups, width = x_TGi.shape
    if num_groups == 1:
        return x_TGi.view(num_tokens, width)
    rows_TGGi = x_TGi.new_zeros(num_tokens, num_groups, num_groups, width)
    rows_TGGi.diagonal(dim1=1, dim2=2).copy_(x_TGi.transpose(1, 2))
    return rows_TGGi.view(num_tokens * num_groups, -1)


def _few_rows_product(x_RI: torch.Tensor, packed_OB: torch.Tensor) -> torch.Tensor:
    """Fp32 [R, O] plane by plane, without putting weights in order.

    Inverting the upper bit of a two's complement field makes it code + 2, so ``(byte ^ 0x2A) & mask`` is (code + 2)
    times 16, 4 or 1 in the three lower planes; in the top plane, read as int8, the field is 64 times the code.
    """
    x_4RB = _planes(x_RI)
    offset_R1 = 128 * x_4RB[1:].sum(dim=(0, 2), dtype=torch.int32).unsqueeze(1)
    # From the lowest plane up (Horner): a plane's numbers are a fourth of those above it.
    planes = list(zip(x_4RB.flip(0).unbind(), _MASKS, strict=True))
    parts = _chunks(packed_OB, bytes_per_row=packed_OB.shape[1])
    chunks = [_plane_sums(planes, part_OB ^ _UPPER_BITS) for part_OB in parts]
    sums_RO = chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
    return (sums_RO - offset_R1) / 64


def _plane_sums(planes: list[tuple[torch.Tensor, torch.Tensor]], fields_OB: torch.Tensor) -> torch.Tensor:
    """Int32 [R, O]: activations [R, B] and mask of each plane, the lowest first, over one chunk of fields."""
    plane_OB = torch.empty_like(fields_OB)
    w_BO = plane_OB.view(torch.int8).T
    sums_RO = None
    for x_RB, mask in planes:
        torch.bitwise_and(fields_OB, mask, out=plane_OB)
        plane_RO = _row_products(x_RB, w_BO)
        sums_RO = plane_RO if sums_RO is None else plane_RO.add_(sums_RO, alpha=4)
    return sums_RO


def _row_products(x_RB: torch.Tensor, w_BO: torch.Tensor) -> torch.Tensor:
    """Int32 [R, O] by vector products."""
    if len(x_RB) == 1:
        return torch._int_mm(x_RB, w_BO)
    return torch.cat([torch._int_mm(row_1B, w_BO) for row_1B in x_RB.split(1)])


def _planes(x_RI: torch.Tensor) -> torch.Tensor:
    """Int8 [4, R, B]: the activations that meet each plane of the packed bytes; zeros beyond the end."""
    num_rows, width = x_RI.shape
    whole = width - width % _BLOCK
    planes_R4B = x_RI[:, :whole].view(num_rows, -1, 4, _BLOCK // 4).transpose(1, 2).reshape(num_rows, 4, -1)
    if whole < width:
        last_R4B = torch.nn.functional.pad(x_RI[:, whole:], (0, -width % 4)).view(num_rows, 4, -1)
        planes_R4B = torch.cat([planes_R4B, last_R4B], dim=-1)
    return planes_R4B.transpose(0, 1).contiguous()

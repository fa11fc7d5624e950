"""Which tiles an 8-bit product is computed in, how many programs run at once, and how tiles of operands are read.

Speeds are of an H200. A program of 8 warps alone on its processor leaves the tensor cores idle while it scales and
writes its tile; two programs of 4 do that in turns, for a third more reads of operands.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# Shapes: M, N = rows of the two operands, K = contracted, C = chunks of K.

# A row of 128 codes is one swizzled row of shared memory. 128 x 256 has 3/4 of the L2 traffic of 128 x 128: the fastest
# for FP8 (1,360 against 1,276 TFLOP/s in pairs, 64 experts), whose sums need no conversion.
WIDE_TILE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
# INT8 sums are converted at a quarter of the rate of other instructions: 1,467 instead of 1,263 TFLOP/s at K = 11008.
PAIR_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
# With several chunks the fp32 total takes as many registers as the sums, and one program of twice the k a step is as
# fast as a pair, or faster where a chunk's rows straddle lines of memory: chunks of 688 reach 678 instead of 495
# TFLOP/s, chunks of 1376 847 instead of 858.
CHUNK_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 256, "num_warps": 8, "num_stages": 3}
SHORT_TILE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
SQUARE_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
# Tiles of m that are computed next to each other, so that a wave of programs shares its operands in L2.
TILES_PER_STRIP = 8

_WARPS_A_PROCESSOR = 8


def product_tile(a_MK: torch.Tensor, b_NK: torch.Tensor, out: torch.Tensor, chunk_size: int, num_matrices: int) -> dict:
    """The tile for [M, K] x [N, K] of each of ``num_matrices``, which share the M rows.

    Args:
        a_MK: codes, int8 or e4m3.
        b_NK: codes of one matrix, or of all of them.
        out: [M, columns of one matrix].
        chunk_size: number of k that are added before they are scaled or promoted.
        num_matrices: 1, or experts.
    """
    is_int8, has_one_chunk = a_MK.dtype == torch.int8, chunk_size >= a_MK.shape[1]
    if len(a_MK) <= SHORT_TILE["BLOCK_M"] * num_matrices:
        return SHORT_TILE
    if is_int8 and not has_one_chunk:
        is_long = chunk_size > SHORT_TILE["BLOCK_K"] and _padding(chunk_size, "BLOCK_K", CHUNK_TILE, SHORT_TILE) <= 1.2
        return CHUNK_TILE if is_long and _reads_tiles(a_MK, b_NK, chunk_size) else SHORT_TILE
    # A wide tile of fp32 results does not fit shared memory beside the loads in flight.
    if not has_one_chunk or out.element_size() != 2:
        return SQUARE_TILE
    # Wide tiles are 6 % faster where they pad no more. Pointers to two operands would not fit a pair's registers.
    is_pair = is_int8 or _padding(out.shape[1], "BLOCK_N", WIDE_TILE, PAIR_TILE) > 1.06
    return PAIR_TILE if is_pair and _reads_tiles(a_MK, b_NK, chunk_size) else WIDE_TILE


def _padding(size: int, block: str, tile: dict, other: dict) -> float:
    """How many times as much ``tile`` computes as ``other`` for a ``size`` that neither may divide."""
    padded, other_padded = (triton.cdiv(size, each[block]) * each[block] for each in (tile, other))
    return padded / other_padded


def operand_tiles(
    a_MK: torch.Tensor, b_NK: torch.Tensor, tile: dict, chunk_size: int
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """Descriptors of both operands' tiles for the tensor memory accelerator (1,381 instead of 1,202 FP8 TFLOP/s in the
    grouped product of 64 experts), or None where it cannot read them: see ``load_tile``.

    It wants chunks of one size, rows and chunks that start at multiples of 16 bytes, and rows at multiples of chunks.
    It reads whole tiles: zeros past a matrix or a chunk.
    """
    if not _reads_tiles(a_MK, b_NK, chunk_size):
        return None, None
    return (
        _descriptor(a_MK, tile["BLOCK_M"], tile["BLOCK_K"], chunk_size),
        _descriptor(b_NK, tile["BLOCK_N"], tile["BLOCK_K"], chunk_size),
    )


def _descriptor(x_RK: torch.Tensor, block_rows: int, block_k: int, chunk_size: int) -> TensorDescriptor:
    """Of [R, K], or of [R, C, chunk] where there are several chunks."""
    if chunk_size >= x_RK.shape[1]:
        return TensorDescriptor.from_tensor(x_RK, [block_rows, block_k])
    return TensorDescriptor.from_tensor(x_RK.unflatten(1, (-1, chunk_size)), [block_rows, 1, block_k])


def result_tiles(out_EMN: torch.Tensor, tile: dict) -> TensorDescriptor | None:
    """The same to write the results of several products, whose tiles may not reach past their own.

    They leave while the next tile is multiplied (1,187 -> 1,226 FP8 TFLOP/s in the weight gradient of 64 experts), and
    take the memory of a load in flight: no pairs, no fp32 results.
    """
    is_whole = len(out_EMN) == 1 or out_EMN.shape[1] % tile["BLOCK_M"] == 0
    out_RN = out_EMN.flatten(0, 1)
    if not is_whole or out_RN.itemsize != 2 or not _is_aligned(out_RN):
        return None
    return TensorDescriptor.from_tensor(out_RN, [tile["BLOCK_M"], tile["BLOCK_N"]])


def _reads_tiles(a_MK: torch.Tensor, b_NK: torch.Tensor, chunk_size: int) -> bool:
    # A stride of a descriptor has to be a multiple of the one before.
    sizes = a_MK.shape[1], a_MK.stride(0), b_NK.stride(0)
    if chunk_size < sizes[0] and (chunk_size % 16 or any(size % chunk_size for size in sizes)):
        return False
    return _is_aligned(a_MK) and _is_aligned(b_NK)


def _is_aligned(x: torch.Tensor) -> bool:
    return x.numel() > 0 and x.stride(1) == 1 and not (x.stride(0) * x.itemsize | x.data_ptr()) % 16


def num_programs(num_tiles: int, tile: dict, device: torch.device) -> int:
    """Persistent programs of a launch: what runs at once, or one for each tile if these are fewer."""
    return min(num_tiles, _num_processors(device) * _WARPS_A_PROCESSOR // tile["num_warps"])


def _num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 stand for them in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def load_tile(tiles, row, chunk, k, ONE_CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of ``operand_tiles``: rows from ``row`` on and the chunk's k from ``k`` on, 0 past their ends."""
    if ONE_CHUNK:
        return tiles.load([row, k])
    else:
        return tiles.load([row, chunk, k]).reshape(BLOCK_ROWS, BLOCK_K)


@triton.jit
def place_in_strip(tile, tiles_m, tiles_n, TILES_PER_STRIP: tl.constexpr):
    """Tile's m and n: strips of a few tiles of m, so that a wave of programs shares its operands in L2."""
    strip = tile // (TILES_PER_STRIP * tiles_n)
    strip_size = min(tiles_m - strip * TILES_PER_STRIP, TILES_PER_STRIP)
    in_strip = tile % (TILES_PER_STRIP * tiles_n)
    return strip * TILES_PER_STRIP + in_strip % strip_size, in_strip // strip_size

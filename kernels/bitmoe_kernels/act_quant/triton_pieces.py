"""Rows cut into pieces of one size, for kernels that hold whole rows in registers.

A power of two that holds a row may be twice as long as it is, and lanes past its end work in vain: 5,504 features in a
tile of 8,192 take 47 us, in 11 pieces of 512 they take 40 (RMSNorm + INT4 of 8,192 rows, H200). The number of features
is a constant of the compiled kernel, so only the last piece is masked.
"""

# Shapes: BR, P = rows and features of a piece.

import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import (
    IS_INTERPRETED,
    neighbour_sums,
    round_to,
    row_means,
    row_scales,
    scales_of,
    to_float32,
)


def piece_tile(num_features: int, narrowest: int, most_pieces: int, elements_per_thread: int) -> dict[str, int]:
    """Launch constants of rows of ``num_features``.

    Args:
        num_features: of a row, at most ``dispatch.LONGEST_ROW``.
        narrowest: features of a piece, a power of two up to 512, unless the row is shorter or its pieces were too many.
        most_pieces: of a row; where more would be needed, they are wider.
        elements_per_thread: of a piece.

    Returns:
        NUM_PIECES, BLOCK_ROWS, BLOCK_FEATURES (of a piece) and num_warps. Programs of narrow pieces take several rows.
    """
    # Not one feature: bf16 numbers are converted, and squares added, in pairs.
    widest = max(2, triton.next_power_of_2(num_features))
    block_features = min(widest, max(narrowest, triton.next_power_of_2(triton.cdiv(num_features, most_pieces))))
    block_rows = max(1, 512 // block_features)
    return {
        "NUM_PIECES": triton.cdiv(num_features, block_features),
        "BLOCK_ROWS": block_rows,
        "BLOCK_FEATURES": block_features,
        "num_warps": block_rows * block_features // (32 * elements_per_thread),
    }


@triton.jit
def rows_of_program(num_rows, BLOCK_ROWS: tl.constexpr):
    """int64 [BR]; rows past the end repeat the last one, and write what it writes."""
    return tl.minimum(tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), num_rows - 1)


@triton.jit
def load_piece(row_ptrs, piece: tl.constexpr, NUM_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """Features of a piece [BR, P] of the rows that begin at ``row_ptrs`` [BR, 1]; 0 past their end."""
    features = piece * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    if (piece + 1) * BLOCK_FEATURES <= NUM_FEATURES:
        return tl.load(row_ptrs + features)
    else:
        return tl.load(row_ptrs + features, mask=features < NUM_FEATURES, other=0.0)


@triton.jit
def load_piece_again(row_ptrs, piece: tl.constexpr, NUM_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """The same from the caches: of two reads alike the compiler makes one, and keeps the piece in registers."""
    features = piece * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    mask = features < NUM_FEATURES
    return tl.load(row_ptrs + features, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def store_piece(row_ptrs, x, piece: tl.constexpr, NUM_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """Write ``x`` [BR, P] where :func:`load_piece` would read it."""
    features = piece * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    if (piece + 1) * BLOCK_FEATURES <= NUM_FEATURES:
        tl.store(row_ptrs + features, x)
    else:
        tl.store(row_ptrs + features, x, mask=features < NUM_FEATURES)


@triton.jit
def store_codes(
    row_ptrs, codes, is_finite, piece: tl.constexpr, NUM_FEATURES: tl.constexpr, BLOCK_FEATURES: tl.constexpr
):
    """The same of codes [BR, P], and of 0 in rows that are not finite, bool [BR]."""
    features = piece * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)[None, :]
    mask, is_finite = features < NUM_FEATURES, is_finite[:, None]
    # A choice for each code would take four packed ones apart.
    tl.store(row_ptrs + features, codes, mask=mask & is_finite)
    tl.store(row_ptrs + features, tl.zeros_like(codes), mask=mask & ~is_finite)


@triton.jit
def sums_of_pieces(pieces):
    """Sums [BR] of all pieces [BR, ...] of a row."""
    # Not added to zeros: these would have another layout, and every piece would pass through shared memory.
    total = pieces[0]
    for piece in tl.static_range(1, len(pieces)):
        total += pieces[piece]
    return tl.sum(total, axis=1)


@triton.jit
def scales_of_pieces(pieces, NUM_FEATURES: tl.constexpr, FORMAT: tl.constexpr, LEVELS: tl.constexpr):
    """Scale [BR] of rows that are 0 past their end; NaN where a row is not finite."""
    if FORMAT == "int4":
        sizes = ()
        for piece in tl.static_range(len(pieces)):
            sizes = sizes + (neighbour_sums(tl.abs(to_float32(pieces[piece]))),)
        return scales_of(row_means(sums_of_pieces(sizes), NUM_FEATURES).to(tl.float32), LEVELS)
    else:
        magnitude = tl.zeros_like(pieces[0])
        for piece in tl.static_range(len(pieces)):
            magnitude = larger_magnitude(magnitude, pieces[piece])
        return row_scales(magnitude, NUM_FEATURES, FORMAT, LEVELS)


@triton.jit
def larger_magnitude(largest, x):
    """The larger of ``largest``, which is not negative, and |x|; NaN where either is."""
    if x.dtype == tl.bfloat16 and not IS_INTERPRETED:
        asm: tl.constexpr = "{ .reg .b32 size; abs.bf16x2 size, $2; max.NaN.bf16x2 $0, $1, size; }"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [largest, x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        size = tl.maximum(to_float32(largest), tl.abs(to_float32(x)), propagate_nan=tl.PropagateNan.ALL)
        return round_to(size, x.dtype)

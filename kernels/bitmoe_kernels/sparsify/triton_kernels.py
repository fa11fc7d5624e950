"""Top-K mask in Triton: the same mask as reference.py, without sorting.

What      README equation: the K-th largest magnitude of a row is a threshold, ties go to the lower index.
How       |x| as integer bits has the order of |x|. Counts of the keys that reach a candidate close in on the threshold
          from both sides: about 6 of them for rows of activations, 27 at most for bf16 and fp16. A prefix sum over the
          keys that tie with the threshold hands out the places left.
Contract  bf16, fp16 or fp32; any sizes; x is made contiguous.
Tiling    whole rows in registers, as in act_quant, but 32 elements a thread: x is read once, the mask written once.
Not here  fp64 input, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, D = features, G = groups of d = D / G features, R = T * G rows of a tile's view [R, d].

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import row_tile, tile_offsets

ELEMENTS_PER_THREAD = 32


def topk_mask_triton(x_TD: torch.Tensor, keep: float, groups: int) -> torch.Tensor:
    """Bool [..., D]: the ``round(keep * d)`` largest |x| of each token and group; bf16, fp16 or fp32."""
    x_TD = x_TD.contiguous()
    mask_TD = torch.empty_like(x_TD, dtype=torch.bool)
    num_features = x_TD.shape[-1] // groups
    if num_rows := x_TD.numel() // num_features:
        # Keys come in pairs.
        tile = row_tile(max(2, num_features), ELEMENTS_PER_THREAD)
        key_type = torch.int32 if x_TD.dtype == torch.float32 else torch.int16
        with torch.cuda.device_of(x_TD):
            _topk_mask_kernel[(triton.cdiv(num_rows, tile["BLOCK_ROWS"]),)](
                x_TD.view(key_type),
                mask_TD.view(torch.int8),
                num_rows,
                round(keep * num_features),
                num_features,
                31 if key_type == torch.int32 else 15,
                **tile,
            )
    return mask_TD


@triton.jit
def topk_rows(keys, num_kept, NUM_FEATURES: tl.constexpr, NUM_BITS: tl.constexpr):
    """Which of the keys [BR, BF], int32 below 2^NUM_BITS, are the ``num_kept`` largest of their row.

    A row may be padded past its NUM_FEATURES by keys 0.
    """
    pairs = keys
    if NUM_BITS == 15:
        # Two keys an integer, a set bit above each.
        low, high = tl.split(tl.reshape(keys, [keys.shape[0], keys.shape[1] // 2, 2]))
        pairs = low | (high << 16) | -0x7FFF8000
    # At least num_kept keys reach the lower end, fewer the upper end: the threshold is below the upper.
    lower = tl.zeros([keys.shape[0]], tl.int32)
    upper = tl.minimum(tl.max(keys, axis=1), 0x7FFFFFFE) + 1
    num_lower = tl.full([keys.shape[0]], NUM_FEATURES, tl.int32)
    num_upper = tl.zeros([keys.shape[0]], tl.int32)
    is_open = (upper - lower > 1) & (num_lower != num_kept)
    num_passes = 0
    while tl.max(is_open.to(tl.int32), axis=0) > 0:
        # First a few octaves below the largest, further each time; then where a straight line between the counts meets
        # num_kept. Each fourth pass, and all after the twelfth, halve, which bounds their number for any data.
        width = (upper - lower).to(tl.float32)
        share = (num_lower - num_kept + 0.5) / (num_lower - num_upper)
        share = tl.where((num_passes % 4 == 3) | (num_passes >= 12), 0.5, share)
        below_upper = 2.0 ** (NUM_BITS - 15) * (384 << (2 * tl.minimum(num_passes, 3)))
        step = tl.where((lower == 0) & (num_passes < 4), width - below_upper, width * share)
        candidate = tl.minimum(tl.maximum(lower + step.to(tl.int32), lower + 1), upper - 1)
        count = _num_reaching(pairs, candidate, NUM_BITS)
        is_lower = is_open & (count >= num_kept)
        is_upper = is_open & (count < num_kept)
        lower, num_lower = tl.where(is_lower, candidate, lower), tl.where(is_lower, count, num_lower)
        upper, num_upper = tl.where(is_upper, candidate, upper), tl.where(is_upper, count, num_upper)
        is_open = (upper - lower > 1) & (num_lower != num_kept)
        num_passes += 1
    end_of_ties = tl.full([keys.shape[0]], keys.shape[1], tl.int32)
    if tl.max((num_lower != num_kept).to(tl.int32), axis=0) > 0:
        num_places = num_kept - num_upper
        end_of_ties = tl.where(num_lower == num_kept, end_of_ties, _end_of_ties(keys, lower, num_places))
    features = tl.arange(0, keys.shape[1])[None, :]
    return keys >= tl.where(features < end_of_ties[:, None], lower[:, None], lower[:, None] + 1)


@triton.jit
def _end_of_ties(keys, threshold, num_places):
    """The place [BR] after the ``num_places``-th key of each row that equals its threshold."""
    CHUNK: tl.constexpr = min(8, keys.shape[1])
    NUM_CHUNKS: tl.constexpr = keys.shape[1] // CHUNK
    # Chunks of neighbours belong to a thread each, so that only their counts are scanned over threads. A chunk is
    # described by its number of ties and a bit for each, from bit 8 on.
    place = tl.arange(0, keys.shape[1])[None, :] % CHUNK
    ties = tl.where(keys == threshold[:, None], (256 << place) + 1, 0)
    ties = tl.sum(tl.reshape(ties, [keys.shape[0], NUM_CHUNKS, CHUNK]), axis=2)
    counts = ties & 0xFF
    if NUM_CHUNKS <= 8:
        # Triton 3.6 does not compile a scan of so few (seen with 4 and 8 chunks of fp32 keys).
        chunk = tl.arange(0, NUM_CHUNKS)
        is_earlier = chunk[None, :] < chunk[:, None]
        before = tl.sum(tl.where(is_earlier[None, :, :], counts[:, None, :], 0), axis=2)
    else:
        before = tl.cumsum(counts, axis=1) - counts
    missing = num_places[:, None] - before
    # One chunk of a row has the last place: its bits, what is missing before it (1 to 8) and its number.
    chunks = tl.arange(0, NUM_CHUNKS)[None, :]
    is_last = (missing > 0) & (missing <= counts)
    last = tl.sum(tl.where(is_last, (ties >> 8) | (missing << 8) | (chunks << 12), 0), axis=1)
    missing, end = (last >> 8) & 0xF, (last >> 12) * CHUNK
    for bit in tl.static_range(CHUNK):
        end += (missing > 0).to(tl.int32)
        missing -= (last >> bit) & 1
    return end


@triton.jit
def _num_reaching(pairs, candidate, NUM_BITS: tl.constexpr):
    """How many keys of each row are at least its ``candidate`` [BR]."""
    if NUM_BITS == 15:
        # The bit above a key survives the subtraction where the key is not smaller. Half the work of comparisons.
        counts = tl.sum(((pairs - (candidate * 0x10001)[:, None]) >> 15) & 0x10001, axis=1)
        return (counts & 0xFFFF) + (counts >> 16)
    else:
        return tl.sum((pairs >= candidate[:, None]).to(tl.int32), axis=1)


@triton.jit
def _topk_mask_kernel(
    bits_ptr,
    mask_ptr,
    num_rows,
    num_kept,
    NUM_FEATURES: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    _, _, offs, mask = tile_offsets(num_rows, NUM_FEATURES, BLOCK_ROWS, BLOCK_FEATURES)
    keys = tl.load(bits_ptr + offs, mask=mask, other=0).to(tl.int32) & ((1 << NUM_BITS) - 1)
    tl.store(mask_ptr + offs, topk_rows(keys, num_kept, NUM_FEATURES, NUM_BITS).to(tl.int8), mask=mask)

"""Top-K mask in Triton: the same mask as reference.py, without sorting.

What      README equation: the K-th largest magnitude of a row is a threshold, ties go to the lower index.
How       |x| as integer bits has the order of |x|. The threshold is found bit by bit from the top: a bit is set if at
          least K keys reach the prefix with it (15 counts for bf16 and fp16, 31 for fp32). A prefix sum over the keys
          that tie with the threshold hands out the places left.
Contract  bf16, fp16 or fp32; any sizes; x is made contiguous.
Tiling    whole rows in registers, as in act_quant: x is read once, the mask written once.
Not here  fp64 input, argument checks and dispatch (op.py).
"""

# Shapes: T = tokens, D = features, G = groups of d = D / G features, R = T * G rows of a tile's view [R, d].

import torch
import triton
import triton.language as tl

from bitmoe_kernels.act_quant.triton_kernels import row_tile, tile_offsets


def topk_mask_triton(x_TD: torch.Tensor, keep: float, groups: int) -> torch.Tensor:
    """Bool [..., D]: the ``round(keep * d)`` largest |x| of each token and group; bf16, fp16 or fp32."""
    x_TD = x_TD.contiguous()
    mask_TD = torch.empty_like(x_TD, dtype=torch.bool)
    num_features = x_TD.shape[-1] // groups
    if num_rows := x_TD.numel() // num_features:
        # Keys come in pairs.
        tile = row_tile(max(2, num_features))
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
def topk_rows(keys, num_kept, NUM_BITS: tl.constexpr):
    """Which of the keys [BR, BF], int32 below 2^NUM_BITS, are the ``num_kept`` largest of their row.

    A row may be padded at its end by keys 0: they lose every tie.
    """
    pairs = keys
    if NUM_BITS == 15:
        # Two keys an integer, a set bit above each.
        low, high = tl.split(tl.reshape(keys, [keys.shape[0], keys.shape[1] // 2, 2]))
        pairs = low | (high << 16) | -0x7FFF8000
    threshold = tl.zeros([keys.shape[0]], tl.int32)
    for bit in range(NUM_BITS):
        candidate = threshold | (1 << (NUM_BITS - 1 - bit))
        threshold = tl.where(_num_reaching(pairs, candidate, NUM_BITS) >= num_kept, candidate, threshold)
    num_places = num_kept - _num_reaching(pairs, threshold + 1, NUM_BITS)
    rank_of_tie = tl.cumsum((keys == threshold[:, None]).to(tl.int32), axis=1)
    # A key with a place must reach the threshold, one without must exceed it.
    return keys > tl.where(rank_of_tie <= num_places[:, None], threshold[:, None] - 1, threshold[:, None])


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
    tl.store(mask_ptr + offs, topk_rows(keys, num_kept, NUM_BITS).to(tl.int8), mask=mask)

"""Top-K mask: exact counts, ties toward the lower index, groups and bad input."""

# Shapes: T = tokens, D = features.

import math

import pytest
import torch

from bitmoe_kernels.sparsify import topk_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_mask_hand_values(dtype):
    """The magnitude counts, not the sign."""
    x_TD = torch.tensor([[0.1, -5.0, 2.0, 1.0], [-0.4, 0.3, -0.2, 0.1]], dtype=dtype)
    mask = topk_mask(x_TD)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_topk_mask_ties_keep_the_lower_index():
    x_TD = torch.tensor([[1.0, -1.0, 1.0, -1.0], [3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 3.0], [0.0] * 4])
    assert topk_mask(x_TD).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]
    wide_TD = torch.ones(3, 1000)
    assert torch.equal(topk_mask(wide_TD), (torch.arange(1000) < 500).expand(3, 1000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_mask_keeps_exactly_half(dtype):
    """Exact although bf16 and fp16 Gaussians of this width have many equal magnitudes."""
    x_TD = gaussian(50, 512, dtype=dtype)
    mask = topk_mask(x_TD)
    assert (mask.sum(-1) == 256).all()
    smallest_kept = x_TD.abs().masked_fill(~mask, math.inf).amin(-1)
    largest_dropped = x_TD.abs().masked_fill(mask, 0.0).amax(-1)
    assert (smallest_kept >= largest_dropped).all()


@pytest.mark.parametrize(
    ("keep", "features", "kept"),
    [(0.5, 5, 2), (0.5, 7, 4), (0.55, 100, 55), (0.25, 63, 16), (1.0, 9, 9)],
)
def test_topk_mask_number_kept(keep, features, kept):
    """round(keep * D), half to even: 2.5 -> 2, 3.5 -> 4, 15.75 -> 16."""
    assert topk_mask(gaussian(4, features), keep=keep).sum(-1).tolist() == [kept] * 4


def test_topk_mask_groups_equal_each_block_apart():
    x_TD = gaussian(2, 7, 24) * torch.arange(1, 25)
    mask = topk_mask(x_TD, keep=0.5, groups=4)
    assert torch.equal(mask, torch.cat([topk_mask(block) for block in x_TD.chunk(4, dim=-1)], dim=-1))
    assert not torch.equal(mask, topk_mask(x_TD))


def test_topk_mask_leading_dimensions_empty_and_strided():
    x_TD = gaussian(12, 10)
    mask = topk_mask(x_TD)
    assert torch.equal(topk_mask(x_TD.reshape(3, 4, 10)).reshape(12, 10), mask)
    assert torch.equal(topk_mask(x_TD[5]), mask[5])
    assert torch.equal(topk_mask(x_TD.t().contiguous().t()), mask)
    assert topk_mask(torch.empty(0, 10), groups=5).shape == (0, 10)


def test_topk_mask_one_huge_outlier_changes_one_place():
    x_TD = gaussian(1, 64)
    mask = topk_mask(x_TD)
    dropped = (~mask).flatten().nonzero()[0].item()
    weakest = x_TD.abs().masked_fill(~mask, math.inf).argmin().item()
    x_TD[0, dropped] = -1e30
    changed = (topk_mask(x_TD) != mask).flatten().nonzero().flatten().tolist()
    assert changed == sorted([dropped, weakest])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_topk_mask_nonfinite_raises(bad):
    x_TD = torch.ones(2, 4)
    x_TD[1, 2] = bad
    with pytest.raises(ValueError, match=r"x of shape \[2, 4\] .* 1 non-finite"):
        topk_mask(x_TD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_mask(torch.ones(2, 6), groups=4), "groups=4 does not cut 6 features"),
        (lambda: topk_mask(torch.ones(2, 6), keep=0.0), r"keep=0\.0"),
        (lambda: topk_mask(torch.ones(2, 6), keep=1.5), r"keep=1\.5"),
        (lambda: topk_mask(torch.ones(2, 6), keep=math.nan), "keep=nan"),
        (lambda: topk_mask(torch.ones(2, 6), groups=6), r"keep=0\.5 of 1 features keeps none"),
        (lambda: topk_mask(torch.ones(2, 0)), r"x has shape \[2, 0\]"),
    ],
)
def test_topk_mask_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_topk_mask_bad_type_raises():
    with pytest.raises(TypeError, match=r"x must be .* torch\.int64"):
        topk_mask(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_mask_on_cuda_equals_cpu(dtype):
    x_TD = gaussian(64, 1536, dtype=dtype)
    assert torch.equal(topk_mask(x_TD.cuda(), groups=4).cpu(), topk_mask(x_TD, groups=4))

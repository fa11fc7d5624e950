"""Ternary weight quantization: hand-computed values, properties of absmean, groups, batches and bad input."""

# Shapes: O = output rows, I = input columns, E = experts, G = groups.

import math

import pytest
import torch

from bitmoe_kernels.weight_quant import absmean_scale, absmean_sums, ternarize, ternary_codes
from bitmoe_kernels.weight_quant.reference import (
    absmean_scale_reference,
    absmean_sums_reference,
    ternary_codes_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ternarize_hand_values(dtype):
    """mean|w| = 1, so the codes are the rounded weights: 0.5 and -0.5 are ties and go to the even 0."""
    w_OI = torch.tensor([[0.5, -0.5, 0.75, 2.0], [-1.5, 1.0, -1.0, -0.75]], dtype=dtype)
    codes, scale = ternarize(w_OI)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.tolist() == [[0, 0, 1, 1], [-1, 1, -1, -1]]
    assert scale.tolist() == [1.0]


def test_ternarize_groups_of_rows_and_columns_hand_values():
    """Each half has its own mean: rows 1 and 10, columns 4 and 7."""
    w_OI = torch.tensor([[1.0, -1.0], [7.0, 13.0]])
    codes, scale = ternarize(w_OI, groups=2, dim=0)
    assert scale.tolist() == [1.0, 10.0]
    assert codes.tolist() == [[1, -1], [1, 1]]
    codes, scale = ternarize(w_OI, groups=2, dim=1)
    assert scale.tolist() == [4.0, 7.0]
    assert codes.tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_ternarize_groups_equal_each_block_apart(dim, dtype):
    w_OI = gaussian(12, 20, dtype=dtype) * (1 + torch.arange(20)).to(dtype)
    codes, scale = ternarize(w_OI, groups=4, dim=dim)
    parts = [ternarize(block) for block in w_OI.chunk(4, dim=dim)]
    assert torch.equal(codes, torch.cat([part[0] for part in parts], dim=dim))
    assert torch.equal(scale, torch.cat([part[1] for part in parts]))
    assert scale.unique().numel() == 4


@pytest.mark.parametrize(("dim", "alias"), [(0, -2), (1, -1)])
def test_ternarize_batch_of_experts(dim, alias):
    """A batch gives what each matrix gives apart; dim means rows or columns at any number of dimensions."""
    w_EOI = gaussian(2, 3, 8, 4) * torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    codes, scale = ternarize(w_EOI, groups=2, dim=dim)
    assert scale.shape == (2, 3, 2)
    for i in range(2):
        for j in range(3):
            codes_OI, scale_G = ternarize(w_EOI[i, j], groups=2, dim=dim)
            assert torch.equal(codes[i, j], codes_OI)
            assert torch.equal(scale[i, j], scale_G)
    assert torch.equal(ternarize(w_EOI, groups=2, dim=alias)[0], codes)
    assert ternarize(w_EOI[:0, 0], groups=2, dim=dim)[1].shape == (0, 2)


@pytest.mark.parametrize("dim", [0, 1])
def test_steps_over_shards_equal_the_whole(dim):
    """Ranks that each hold a block of one group add up their sums: scale and codes are those of the whole."""
    w_OI = gaussian(16, 24)
    codes, scale = ternarize(w_OI)
    shards = w_OI.chunk(4, dim=dim)
    shard_scale = absmean_scale(sum(absmean_sums(shard, dim=dim) for shard in shards), count=w_OI.numel())
    assert torch.equal(shard_scale, scale)
    assert torch.equal(torch.cat([ternary_codes(shard, scale, dim=dim) for shard in shards], dim=dim), codes)


def test_absmean_sums_are_fp64_of_the_exact_values():
    """An fp32 sum would lose every 1 beside 2^25."""
    w_OI = torch.ones(1, 9)
    w_OI[0, 0] = 2.0**25
    sums = absmean_sums(w_OI)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [2.0**25 + 8]
    # The neighbours in fp32 are 4 apart: 2^25 + 6 is a tie and goes to the even mantissa.
    assert absmean_scale(torch.tensor([2.0**25 + 6], dtype=torch.float64), count=1).item() == 2.0**25 + 8
    assert absmean_scale(torch.tensor([2.0**25 + 5.9], dtype=torch.float64), count=1).item() == 2.0**25 + 4


def test_ternary_zero_share_on_a_gaussian():
    """P(|z| < mean|z| / 2) = erf(1 / sqrt(4 pi)) = 31.0 %; tolerance: 4 standard errors of 2^20 draws."""
    codes, _ = ternarize(gaussian(1024, 1024))
    expected = math.erf(1 / math.sqrt(4 * math.pi))
    assert expected == pytest.approx(0.310, abs=5e-4)
    standard_error = math.sqrt(expected * (1 - expected) / codes.numel())
    assert abs((codes == 0).double().mean().item() - expected) < 4 * standard_error
    assert abs(codes.double().mean().item()) < 4 * math.sqrt((1 - expected) / codes.numel())


def test_ternarize_all_zero_group_has_code_zero_and_the_smallest_scale():
    w_OI = torch.zeros(4, 3)
    w_OI[2:] = 2.0
    codes, scale = ternarize(w_OI, groups=2)
    assert codes.tolist() == [[0] * 3, [0] * 3, [1] * 3, [1] * 3]
    assert scale.tolist() == torch.tensor([1e-5, 2.0]).tolist()


def test_ternarize_one_huge_outlier():
    """The mean is 1e30 / 4: all others become 0, nothing overflows."""
    codes, scale = ternarize(torch.tensor([[1.0, -1e30], [2.0, -3.0]]))
    assert codes.tolist() == [[0, -1], [0, 0]]
    assert scale.item() == pytest.approx(2.5e29, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (63, 101)], ids=str)
def test_ternarize_odd_sizes_and_strides(shape):
    w_OI = gaussian(*shape)
    mean = w_OI.double().abs().mean().float()
    codes, scale = ternarize(w_OI)
    assert scale.item() == pytest.approx(mean.item(), rel=1e-7)
    assert torch.equal(codes, ((w_OI.abs() > scale / 2) * w_OI.sign()).to(torch.int8))
    assert torch.equal(ternarize(w_OI.t().contiguous().t())[0], codes)


def test_ternarize_has_no_gradient():
    w_OI = gaussian(4, 4).requires_grad_()
    assert not absmean_sums(w_OI).requires_grad
    assert not ternarize(w_OI)[1].requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ternarize_nonfinite_raises(bad, dtype):
    w_OI = torch.ones(4, 6, dtype=dtype)
    w_OI[1, 2] = w_OI[3, 3] = bad
    message = r"w of shape \[4, 6\] .* 2 non-finite"
    with pytest.raises(ValueError, match=message):
        ternarize(w_OI)
    with pytest.raises(ValueError, match=message):
        absmean_sums(w_OI, groups=2)
    with pytest.raises(ValueError, match=message):
        ternary_codes(w_OI, torch.ones(1))
    with pytest.raises(ValueError, match="sums .* 1 non-finite"):
        absmean_scale(torch.tensor([1.0, bad], dtype=torch.float64), count=3)
    with pytest.raises(ValueError, match="scale .* 1 non-finite"):
        ternary_codes(torch.ones(2, 2), torch.tensor([bad]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reference_marks_a_nonfinite_group_by_a_nan_scale(bad):
    """What devices other than CPU return: the other groups are untouched."""
    w_OI = gaussian(4, 6)
    codes_clean, scale_clean = ternarize(w_OI, groups=2)
    w_OI[3, 5] = bad
    scale = absmean_scale_reference(absmean_sums_reference(w_OI, 2, -2), count=12)
    codes = ternary_codes_reference(w_OI, scale, -2)
    assert scale[1].isnan()
    assert not codes[2:].any()
    assert torch.equal(scale[:1], scale_clean[:1])
    assert torch.equal(codes[:2], codes_clean[:2])


def test_absmean_scale_overflow_raises():
    with pytest.raises(ValueError, match="scale overflows"):
        ternarize(torch.full((2, 2), 1e300, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ternarize(torch.ones(4, 6), groups=3), "groups=3 does not cut 4 output rows"),
        (lambda: ternarize(torch.ones(4, 6), groups=4, dim=1), "groups=4 does not cut 6 input columns"),
        (lambda: ternarize(torch.ones(4, 6), groups=0), "groups=0"),
        (lambda: ternarize(torch.ones(4, 6), dim=2), "dim=2"),
        (lambda: ternarize(torch.ones(4)), r"shape \[4\]"),
        (lambda: ternarize(torch.ones(0, 4)), r"shape \[0, 4\]"),
        (lambda: absmean_scale(torch.ones(1, dtype=torch.float64), count=0), "count=0"),
        (lambda: ternary_codes(torch.ones(4, 6), torch.ones(3)), "groups=3 does not cut 4 output rows"),
        (lambda: ternary_codes(torch.ones(2, 4, 6), torch.ones(3, 1)), r"must be \[2, 'groups'\]"),
        (lambda: ternary_codes(torch.ones(4, 6), torch.tensor(1.0)), r"must be \['groups'\]"),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_raise():
    with pytest.raises(TypeError, match=r"w must be .* torch\.int64"):
        ternarize(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="w must be .* list"):
        ternarize([[1.0]])
    with pytest.raises(TypeError, match=r"groups .* 2\.0"):
        ternarize(torch.ones(2, 2), groups=2.0)
    with pytest.raises(TypeError, match=r"float64 .* torch\.float32"):
        absmean_scale(torch.ones(1), count=1)
    with pytest.raises(TypeError, match="scale must be"):
        ternary_codes(torch.ones(2, 2), torch.ones(1, dtype=torch.int32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ternarize_on_cuda_agrees_with_cpu_and_marks_nonfinite():
    w_EOI = gaussian(3, 64, 96)
    codes, scale = ternarize(w_EOI, groups=4, dim=1)
    codes_cuda, scale_cuda = ternarize(w_EOI.cuda(), groups=4, dim=1)
    assert torch.equal(scale_cuda.cpu(), scale)
    assert torch.equal(codes_cuda.cpu(), codes)
    w_EOI[1, 0, 0] = math.inf
    codes_cuda, scale_cuda = ternarize(w_EOI.cuda())
    assert scale_cuda.isnan().flatten().tolist() == [False, True, False]
    assert not codes_cuda[1].any()

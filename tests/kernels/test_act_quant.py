"""Activation quantizers: hand-computed values, properties, groups, dtypes and bad input."""

# Shapes: T = tokens, D = features, G = groups.

import math

import pytest
import torch

from bitmoe_kernels.act_quant import int8_codes, int8_scale, quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.act_quant.reference import (
    quantize_fp4_reference,
    quantize_int4_reference,
    quantize_int8_reference,
)

QUANTIZERS = [quantize_int4, quantize_int8, quantize_fp4]
REFERENCES = [quantize_int4_reference, quantize_int8_reference, quantize_fp4_reference]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E2M1_GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

each_quantizer = pytest.mark.parametrize("quantize", QUANTIZERS, ids=lambda function: function.__name__)
each_reference = pytest.mark.parametrize("reference", REFERENCES, ids=lambda function: function.__name__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@each_dtype
def test_quantize_int4_hand_values(dtype):
    """mean|x| = 2 and 0.25, so x / scale = 1.32, -1.32, 2.65, -5.29 and 7.94 (clipped), 2.65, 0, 0."""
    x_TD = torch.tensor([[1.0, -1.0, 2.0, -4.0], [0.75, 0.25, 0.0, 0.0]], dtype=dtype)
    codes, scale = quantize_int4(x_TD)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.tolist() == [[1, -1, 3, -5], [7, 3, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([0.7559289, 0.09449112], rel=1e-6)


def test_quantize_int4_clips_to_minus_8_and_7():
    """One value of 80 among ten has mean 8 and the ratio sqrt(7) * 10 = 26.5."""
    x_TD = torch.zeros(2, 10)
    x_TD[0, 3], x_TD[1, 3] = 80.0, -80.0
    codes, scale = quantize_int4(x_TD)
    assert codes[:, 3].tolist() == [7, -8]
    assert codes.count_nonzero() == 2
    assert scale.flatten().tolist() == pytest.approx([8 / math.sqrt(7)] * 2, rel=1e-6)


@each_dtype
def test_quantize_int8_hand_values_and_ties(dtype):
    """max|x| = 127 makes the scale 1: halves go to the even integer."""
    x_TD = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.25, -126.5]], dtype=dtype)
    codes, scale = quantize_int8(x_TD)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, 3, -126]]


def test_quantize_int8_groups_hand_values():
    x_TD = torch.tensor([[127.0, 1.0, 254.0, 1.0], [-12.7, 0.1, 0.0, 0.0]])
    codes, scale = quantize_int8(x_TD, groups=2)
    assert codes.tolist() == [[127, 1, 127, 0], [-127, 1, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([1.0, 2.0, 0.1, 1e-5 / 127], rel=1e-6)


@each_dtype
def test_quantize_fp4_keeps_the_grid(dtype):
    """The E2M1 values times any power of two come back exactly; the codes are twice the values."""
    grid = torch.tensor(E2M1_GRID)
    x_TD = torch.cat([grid, -grid]).repeat(3, 1) * torch.tensor([1.0, 0.25, 1024.0])[:, None]
    codes, scale = quantize_fp4(x_TD.to(dtype))
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.tolist() == [[0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]] * 3
    assert scale.tolist() == [[0.5], [0.125], [512.0]]
    assert torch.equal(codes * scale, x_TD)


def test_quantize_fp4_ties_go_to_the_even_mantissa():
    """Midpoints of neighbours 0|.5|1|1.5|2|3|4|6: the even mantissas are 0, 1, 2 and 4."""
    x_TD = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    assert (quantize_fp4(x_TD)[0] / 2).tolist() == [[6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]]
    assert (quantize_fp4(-x_TD)[0] / 2).tolist() == [[-6.0, 0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]]


def test_quantize_fp4_takes_the_nearest_grid_value():
    x_TD = gaussian(64, 100)
    codes, scale = quantize_fp4(x_TD)
    assert torch.equal(scale, x_TD.abs().amax(-1, keepdim=True) / 12)
    grid = torch.tensor(E2M1_GRID)
    nearest = grid[(x_TD.abs()[..., None] / (2 * scale)[..., None] - grid).abs().argmin(-1)] * x_TD.sign()
    assert torch.equal(codes / 2, nearest)


def test_int4_zero_share_on_a_gaussian():
    """P(|z| < mean|z| / (2 sqrt 7)) = erf(1 / sqrt(28 pi)) = 12.0 %, to 4 standard errors of 2^22 draws."""
    codes, _ = quantize_int4(gaussian(1024, 4096))
    expected = math.erf(1 / math.sqrt(28 * math.pi))
    assert expected == pytest.approx(0.120, abs=5e-4)
    standard_error = math.sqrt(expected * (1 - expected) / codes.numel())
    assert abs((codes == 0).double().mean().item() - expected) < 4 * standard_error


@pytest.mark.parametrize(("quantize", "half_step"), [(quantize_int8, 0.5), (quantize_fp4, 2.0)], ids=["int8", "fp4"])
def test_absmax_error_is_at_most_half_a_step(quantize, half_step):
    """absmax formats clip nothing; 1e-4 steps of slack for the fp32 division."""
    x_TD = gaussian(50, 63)
    codes, scale = quantize(x_TD)
    assert ((codes * scale - x_TD).abs() <= (half_step + 1e-4) * scale).all()


@each_dtype
@each_quantizer
def test_low_precision_input_equals_its_fp32_copy(quantize, dtype):
    x_TD = gaussian(33, 65, dtype=dtype)
    codes, scale = quantize(x_TD)
    codes_fp32, scale_fp32 = quantize(x_TD.float())
    assert torch.equal(codes, codes_fp32)
    assert torch.equal(scale, scale_fp32)


@each_quantizer
def test_fp64_input_computes_in_fp64(quantize):
    """The scale is fp64 and right to fp64's precision, at values that fp32 cannot hold."""
    x_TD = gaussian(8, 63).double() * (1 + 1e-12)
    codes, scale = quantize(x_TD)
    assert scale.dtype == torch.float64
    assert torch.equal(codes, quantize(x_TD.float())[0])
    magnitude = x_TD.abs().mean(-1) / math.sqrt(7) if quantize is quantize_int4 else x_TD.abs().amax(-1)
    levels = {quantize_int4: 1.0, quantize_int8: 127.0, quantize_fp4: 12.0}[quantize]
    torch.testing.assert_close(scale[:, 0], magnitude / levels, rtol=1e-15, atol=0)


@each_quantizer
def test_each_token_depends_on_itself_alone(quantize):
    """A token gives the same bits apart, in any batch and under any leading dimensions."""
    x_TD = gaussian(24, 257)
    codes, scale = quantize(x_TD)
    for token in range(24):
        codes_1D, scale_1D = quantize(x_TD[token])
        assert torch.equal(codes_1D, codes[token])
        assert torch.equal(scale_1D, scale[token])
    codes_4D, scale_4D = quantize(x_TD.reshape(2, 3, 4, 257))
    assert torch.equal(codes_4D.reshape(24, 257), codes)
    assert scale_4D.shape == (2, 3, 4, 1)


@each_quantizer
def test_all_zero_token_has_codes_zero_and_a_finite_scale(quantize):
    x_TD = torch.zeros(2, 7)
    x_TD[1, 0] = 1.0
    codes, scale = quantize(x_TD)
    levels = {quantize_int4: math.sqrt(7), quantize_int8: 127.0, quantize_fp4: 12.0}[quantize]
    assert not codes[0].any()
    assert codes[1].any()
    assert scale[0].item() == pytest.approx(1e-5 / levels, rel=1e-6)


@pytest.mark.parametrize(
    ("quantize", "top"),
    [(quantize_int4, 7), (quantize_int8, 127), (quantize_fp4, 12)],
    ids=["int4", "int8", "fp4"],
)
def test_one_huge_outlier_takes_the_range_of_its_token_only(quantize, top):
    x_TD = gaussian(3, 64)
    codes_before, scale_before = quantize(x_TD)
    x_TD[1, 5] = 1e30
    codes, scale = quantize(x_TD)
    assert codes[1, 5] == top
    assert codes[1].count_nonzero() == 1
    assert torch.equal(codes[[0, 2]], codes_before[[0, 2]])
    assert torch.equal(scale[[0, 2]], scale_before[[0, 2]])


@each_quantizer
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (63, 101)], ids=str)
def test_odd_sizes_and_strides(quantize, shape):
    x_TD = gaussian(*shape)
    codes, scale = quantize(x_TD)
    assert codes.shape == shape
    assert scale.shape == (shape[0], 1)
    assert torch.equal(codes.sign() * x_TD.sign(), codes.sign().abs().float())
    codes_strided, scale_strided = quantize(x_TD.repeat_interleave(2, dim=1)[:, ::2])
    assert torch.equal(codes_strided, codes)
    assert torch.equal(scale_strided, scale)


@each_quantizer
def test_no_tokens(quantize):
    codes, scale = quantize(torch.empty(0, 8))
    assert codes.shape == (0, 8)
    assert codes.dtype == torch.int8
    assert scale.shape == (0, 1)
    assert quantize_int8(torch.empty(0, 8), groups=4)[1].shape == (0, 4)


@each_quantizer
def test_quantizers_have_no_gradient(quantize):
    _, scale = quantize(gaussian(2, 8).requires_grad_())
    assert not scale.requires_grad


@each_dtype
def test_quantize_int8_groups_equal_each_block_apart(dtype):
    x_TD = gaussian(2, 5, 24, dtype=dtype)
    codes, scale = quantize_int8(x_TD, groups=4)
    parts = [quantize_int8(block) for block in x_TD.chunk(4, dim=-1)]
    assert torch.equal(codes, torch.cat([part[0] for part in parts], dim=-1))
    assert torch.equal(scale, torch.cat([part[1] for part in parts], dim=-1))


@each_dtype
def test_int8_halves_over_shards_equal_the_whole(dtype):
    """Ranks that hold parts of a token: the maximum of their maxima gives what the whole gives."""
    x_TD = gaussian(6, 40, dtype=dtype)
    codes, scale = quantize_int8(x_TD)
    shards = x_TD.chunk(4, dim=-1)
    absmax_T1 = torch.stack([shard.abs().amax(-1, keepdim=True) for shard in shards]).amax(0)
    assert torch.equal(int8_scale(absmax_T1), scale)
    assert torch.equal(torch.cat([int8_codes(shard, scale) for shard in shards], dim=-1), codes)
    codes_grouped, scale_grouped = quantize_int8(x_TD, groups=5)
    assert torch.equal(int8_codes(x_TD, scale_grouped), codes_grouped)


@each_quantizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_raises(quantize, bad):
    for dtype in DTYPES:
        x_TD = gaussian(4, 6, dtype=dtype)
        x_TD[0, 1] = x_TD[2, 0] = x_TD[2, 5] = bad
        with pytest.raises(ValueError, match=r"x of shape \[4, 6\] .* 3 non-finite"):
            quantize(x_TD)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_raises_in_the_int8_halves(bad):
    finite, nonfinite = torch.ones(2, 1), torch.tensor([[1.0], [bad]])
    with pytest.raises(ValueError, match="absmax .* 1 non-finite"):
        int8_scale(nonfinite)
    with pytest.raises(ValueError, match="x of shape .* 1 non-finite"):
        int8_codes(nonfinite, finite)
    with pytest.raises(ValueError, match="scale .* 1 non-finite"):
        int8_codes(finite, nonfinite)


@each_reference
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_reference_marks_a_nonfinite_token_by_a_nan_scale(reference, bad):
    """What devices other than CPU return: the other tokens are untouched."""
    x_TD = gaussian(3, 8)
    codes_clean, scale_clean = reference(x_TD)
    x_TD[1, 4] = bad
    codes, scale = reference(x_TD)
    assert scale[1].isnan()
    assert not codes[1].any()
    assert torch.equal(codes[[0, 2]], codes_clean[[0, 2]])
    assert torch.equal(scale[[0, 2]], scale_clean[[0, 2]])


def test_int4_mean_is_summed_in_fp64_but_for_neighbours():
    """The sum may pass the largest fp32, that of four neighbours may not; these lose 3 ones beside 2^25, not all."""
    codes, scale = quantize_int4(torch.full((1, 80), 8e37))
    assert codes.tolist() == [[3] * 80]
    assert scale.item() == pytest.approx(8e37 / math.sqrt(7), rel=1e-6)
    with pytest.raises(ValueError, match="scale overflows"):
        quantize_int4(torch.full((1, 80), 9e37))
    x_TD = torch.ones(1, 4096)
    x_TD[0, 0] = 2.0**25
    expected = torch.tensor((2.0**25 + 4092) / 4096) / torch.tensor(math.sqrt(7))
    assert quantize_int4(x_TD)[1].item() == expected.item()
    with pytest.raises(ValueError, match="scale overflows"):
        quantize_int4(torch.full((1, 8), 1e308, dtype=torch.float64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_int8(torch.ones(2, 6), groups=4), "groups=4 does not cut 6 features"),
        (lambda: quantize_int8(torch.ones(2, 6), groups=0), "groups=0"),
        (lambda: quantize_int4(torch.ones(2, 0)), r"x has shape \[2, 0\]"),
        (lambda: quantize_fp4(torch.tensor(1.0)), r"x has shape \[\]"),
        (lambda: int8_codes(torch.ones(2, 6), torch.ones(2, 4)), "groups=4 does not cut 6 features"),
        (lambda: int8_codes(torch.ones(2, 6), torch.ones(2)), r"must be \[2, 'groups'\]"),
        (lambda: int8_codes(torch.ones(6), torch.tensor(1.0)), r"must be \['groups'\]"),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_raise():
    for quantize in QUANTIZERS:
        with pytest.raises(TypeError, match=r"x must be .* torch\.int8"):
            quantize(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(TypeError, match="absmax must be"):
        int8_scale(torch.ones(2, 1, dtype=torch.int32))
    with pytest.raises(TypeError, match="scale must be"):
        int8_codes(torch.ones(2, 2), torch.ones(2, 1, dtype=torch.int32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_quantizer
def test_cuda_agrees_with_cpu_and_marks_nonfinite(quantize):
    """Bit for bit."""
    x_TD = gaussian(64, 96)
    codes, scale = quantize(x_TD)
    codes_cuda, scale_cuda = quantize(x_TD.cuda())
    assert torch.equal(scale_cuda.cpu(), scale)
    assert torch.equal(codes_cuda.cpu(), codes)
    x_TD[1, 0] = math.nan
    codes_cuda, scale_cuda = quantize(x_TD.cuda())
    assert scale_cuda[:3, 0].isnan().tolist() == [False, True, False]
    assert not codes_cuda[1].any()


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_fp4], ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_e4m3_codes_are_exact(quantize, dtype):
    x_TD = gaussian(5, 100, dtype=dtype)
    codes, scale = quantize(x_TD, torch.float8_e4m3fn)
    expected, expected_scale = quantize(x_TD)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, expected_scale)


def test_other_code_types_raise():
    with pytest.raises(ValueError, match=r"code_dtype=torch\.bfloat16 of int4"):
        quantize_int4(torch.ones(2, 2), torch.bfloat16)

"""Low-bit keys and values: hand-computed bytes, error bound, idempotence, the grid, layout and bad input."""

# Shapes: T = tokens, H = heads, D = width of a head, B = bytes of a head.

import math

import pytest
import torch

from bitmoe_kernels.kv_quant import dequantize_kv, packed_width, quantize_kv
from bitmoe_kernels.kv_quant.reference import quantize_kv_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOP = {3: 7, 4: 15}

each_bits = pytest.mark.parametrize("bits", [3, 4])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_head_dim = pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6)).to(dtype)


def codes_of(x_THD: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes int32 [T, H, D]: what comes back under scales of one."""
    packed_THB, scale_TH = quantize_kv(x_THD, bits)
    return dequantize_kv(packed_THB, torch.ones_like(scale_TH), bits, x_THD.shape[-1], torch.float32).int()


@each_dtype
def test_3_bit_hand_values(dtype):
    """max|x| = 7 makes the scale 1 and the codes -7, 7, -5, 1, 1, -1, 3, 5: unsigned 0 7 1 4 4 3 5 6.

    Upper two bits 0 3 0 2 2 1 2 3 in two bytes, features 0, 2, 4, 6 and 1, 3, 5, 7; lower bits 0 1 1 0 0 1 1 0.
    """
    x_THD = torch.tensor([[[-7.0, 6.5, -4.25, 0.5, 0.0, -0.25, 2.0, 4.5]]], dtype=dtype)
    packed, scale = quantize_kv(x_THD, bits=3)
    assert scale.dtype == torch.bfloat16
    assert scale.tolist() == [[1.0]]
    assert codes_of(x_THD, 3).tolist() == [[[-7, 7, -5, 1, 1, -1, 3, 5]]]
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[[0b00_00_10_10, 0b11_10_01_11, 0b01100110]]]
    assert dequantize_kv(packed, scale, 3, 8, dtype).tolist() == [[[-7, 7, -5, 1, 1, -1, 3, 5]]]


@each_dtype
def test_4_bit_hand_values(dtype):
    """max|x| = 30 makes the scale 2: codes -15, 15, 1, -1, 5, 7, -9, 13, unsigned 0 15 8 7 10 11 3 14."""
    x_THD = torch.tensor([[[-30.0, 29.0, 1.0, -3.0, 9.5, 14.0, -18.5, 26.0]]], dtype=dtype)
    packed, scale = quantize_kv(x_THD, bits=4)
    assert scale.tolist() == [[2.0]]
    assert codes_of(x_THD, 4).tolist() == [[[-15, 15, 1, -1, 5, 7, -9, 13]]]
    assert packed.tolist() == [[[0x0A, 0xFB, 0x83, 0x7E]]]
    assert dequantize_kv(packed, scale, 4, 8, dtype).tolist() == [[[-30, 30, 2, -2, 10, 14, -18, 26]]]


def test_codes_are_made_with_the_rounded_scale():
    """1 / 7 = 0.142857 rounds to 0.142578 in bf16, and 4 * 0.14272 lies on different sides of 4 of each."""
    x_THD = torch.full((1, 1, 8), 1.0)
    x_THD[..., 1] = 4 * 0.14272
    packed, scale = quantize_kv(x_THD, bits=3)
    assert scale.item() == 0.142578125
    assert codes_of(x_THD, 3)[0, 0, :2].tolist() == [7, 5]


@each_bits
@each_dtype
@each_head_dim
def test_error_is_at_most_half_a_step(head_dim, dtype, bits):
    """The scale is half a step, also where the rounded scale clips the maximum; 1e-6 of slack for the fp32 division."""
    x_THD = gaussian(40, 3, head_dim, dtype=dtype) * torch.logspace(-3, 3, 40)[:, None, None].to(dtype)
    packed, scale = quantize_kv(x_THD, bits)
    restored_THD = dequantize_kv(packed, scale, bits, head_dim, torch.float32)
    bound_TH1 = scale.float().unsqueeze(-1) * (1 + 1e-6)
    assert ((restored_THD - x_THD.float()).abs() <= bound_TH1).all()
    torch.testing.assert_close(scale.float() * TOP[bits], x_THD.float().abs().amax(-1), rtol=2.0**-8, atol=0)


@each_bits
@each_head_dim
def test_quantizing_again_changes_nothing(head_dim, bits):
    packed, scale = quantize_kv(gaussian(30, 4, head_dim), bits)
    packed_again, scale_again = quantize_kv(dequantize_kv(packed, scale, bits, head_dim, torch.float32), bits)
    assert torch.equal(packed_again, packed)
    assert torch.equal(scale_again, scale)
    rounded = dequantize_kv(packed, scale, bits, head_dim, torch.bfloat16)
    assert torch.equal(quantize_kv(rounded, bits)[0], packed)


@each_bits
def test_every_code_at_every_place_comes_back(bits):
    """Token t has code number (t + d) modulo their count at feature d; the largest is in each, so the scale is one."""
    values = torch.arange(-TOP[bits], TOP[bits] + 1, 2)
    head_dim, count = 72, len(values)
    expected = values[(torch.arange(count)[:, None] + torch.arange(head_dim)) % count]
    packed, scale = quantize_kv(expected.float().unsqueeze(1), bits)
    assert (scale == 1).all()
    restored = dequantize_kv(packed, scale, bits, head_dim, torch.float32)
    assert torch.equal(restored.squeeze(1), expected.float())


@pytest.mark.parametrize(("bits", "gaussian_error"), [(3, 0.0551), (4, 0.0120)])
def test_error_on_gaussian_rows_is_that_of_the_readme(bits, gaussian_error):
    x_THD = gaussian(2000, 8, 128)
    packed, scale = quantize_kv(x_THD, bits)
    error = (dequantize_kv(packed, scale, bits, 128, torch.float32) - x_THD).square().mean() / x_THD.square().mean()
    assert error.item() == pytest.approx(gaussian_error, rel=0.01)


@each_head_dim
def test_4_bit_layout_as_int8(head_dim):
    """README: ((byte << 4 p) & 0xF0) ^ 0x88 as int8 is 8 times the code."""
    x_THD = gaussian(5, 2, head_dim)
    packed, _ = quantize_kv(x_THD, bits=4)
    for plane, codes in enumerate(codes_of(x_THD, 4).chunk(2, dim=-1)):
        assert torch.equal((((packed << (4 * plane)) & 0xF0) ^ 0x88).view(torch.int8).int(), 8 * codes)


@each_head_dim
def test_3_bit_layout_as_int8(head_dim):
    """README: ((high << 2 p & 0xC0) | (low << q >> 2 & 0x20)) ^ 0x90 as int8 is 16 times the code."""
    x_THD = gaussian(5, 2, head_dim)
    packed, _ = quantize_kv(x_THD, bits=3)
    high, low = packed.split([head_dim // 4, head_dim // 8], dim=-1)
    for eighth, codes in enumerate(codes_of(x_THD, 3).chunk(8, dim=-1)):
        high_part = high.chunk(2, dim=-1)[eighth % 2]
        top = ((high_part << (2 * (eighth // 2))) & 0xC0) | (((low << eighth) >> 2) & 0x20)
        assert torch.equal((top ^ 0x90).view(torch.int8).int(), 16 * codes)


@pytest.mark.parametrize(("bits", "ratio"), [(3, 5.12), (4, 3.87)])
def test_bytes_against_bf16(bits, ratio):
    """A head of 128 in bf16 is 256 bytes; in 3 bits 48 and its scale 2."""
    x_THD = gaussian(6, 2, 128, dtype=torch.bfloat16)
    packed, scale = quantize_kv(x_THD, bits)
    assert packed.shape == (6, 2, packed_width(128, bits))
    assert x_THD.nbytes / (packed.nbytes + scale.nbytes) >= ratio


@each_bits
@each_dtype
def test_low_precision_input_equals_its_fp32_copy(dtype, bits):
    x_THD = gaussian(9, 4, 64, dtype=dtype)
    packed, scale = quantize_kv(x_THD, bits)
    packed_fp32, scale_fp32 = quantize_kv(x_THD.float(), bits)
    assert torch.equal(packed, packed_fp32)
    assert torch.equal(scale, scale_fp32)


@each_bits
@each_dtype
def test_result_is_the_product_rounded_once(dtype, bits):
    packed, scale = quantize_kv(gaussian(9, 4, 64), bits)
    restored = dequantize_kv(packed, scale, bits, 64, dtype)
    assert restored.dtype == dtype
    assert torch.equal(restored, dequantize_kv(packed, scale, bits, 64, torch.float64).to(dtype))


@each_bits
def test_each_head_depends_on_itself_alone(bits):
    """A head gives the same bytes apart, under any leading dimensions and strides."""
    x_THD = gaussian(6, 4, 64)
    packed, scale = quantize_kv(x_THD, bits)
    packed_HB, scale_H = quantize_kv(x_THD[3], bits)
    assert torch.equal(packed_HB, packed[3])
    assert torch.equal(scale_H, scale[3])
    packed_B, scale_of_head = quantize_kv(x_THD[3, 1], bits)
    assert torch.equal(packed_B, packed[3, 1])
    assert torch.equal(scale_of_head, scale[3, 1])
    packed_5D, scale_5D = quantize_kv(x_THD.reshape(2, 3, 1, 4, 64), bits)
    assert packed_5D.shape == (2, 3, 1, 4, packed_width(64, bits))
    assert torch.equal(packed_5D.reshape(packed.shape), packed)
    assert torch.equal(scale_5D.reshape(scale.shape), scale)
    transposed = quantize_kv(x_THD.transpose(0, 1), bits)[0].transpose(0, 1)
    assert torch.equal(transposed, packed)
    restored = dequantize_kv(packed, scale, bits, 64, torch.float32)
    assert torch.equal(dequantize_kv(packed_5D, scale_5D, bits, 64, torch.float32).reshape(6, 4, 64), restored)


@each_bits
@pytest.mark.parametrize("tiny", [0.0, 1e-39], ids=["zero", "subnormal"])
def test_zero_heads_come_back_as_zero(tiny, bits):
    """The grid has no zero, so the scale is: also where it would be a subnormal number."""
    x_THD = gaussian(2, 3, 16)
    x_THD[1, 2] = tiny
    packed, scale = quantize_kv(x_THD, bits)
    restored = dequantize_kv(packed, scale, bits, 16, torch.bfloat16)
    assert scale.eq(0).nonzero().tolist() == [[1, 2]]
    assert restored[1, 2].tolist() == [0.0] * 16
    assert restored[1, 1].all()


@each_bits
def test_no_tokens(bits):
    packed, scale = quantize_kv(torch.empty(0, 2, 64), bits)
    assert packed.shape == (0, 2, packed_width(64, bits))
    assert scale.shape == (0, 2)
    assert dequantize_kv(packed, scale, bits, 64, torch.bfloat16).shape == (0, 2, 64)


@each_bits
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_raises(bad, bits):
    for dtype in DTYPES:
        x_THD = gaussian(2, 3, 8, dtype=dtype)
        x_THD[1, 2, 5] = x_THD[0, 0, 0] = bad
        with pytest.raises(ValueError, match=r"x of shape \[2, 3, 8\] .* 2 non-finite"):
            quantize_kv(x_THD, bits)


@each_bits
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_reference_marks_a_nonfinite_head_by_a_nan_scale(bad, bits):
    """What devices other than CPU return: the other heads are untouched."""
    x_THD = gaussian(2, 3, 8)
    codes_clean, scale_clean = quantize_kv_reference(x_THD, bits)
    x_THD[1, 2, 5] = bad
    codes, scale = quantize_kv_reference(x_THD, bits)
    assert scale.isnan().nonzero().tolist() == [[1, 2]]
    assert torch.equal(codes.flatten(0, 1)[:5], codes_clean.flatten(0, 1)[:5])
    assert torch.equal(scale.flatten()[:5], scale_clean.flatten()[:5])


PACKED, SCALE = torch.zeros(2, 3, 48, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_kv(torch.ones(2, 3, 12), 3), "head_dim=12: .* multiple of 8"),
        (lambda: quantize_kv(torch.ones(2, 3, 8), 2), "bits=2: .* 3 or 4"),
        (lambda: quantize_kv(torch.ones(2, 3, 0), 3), r"x has shape \[2, 3, 0\]"),
        (lambda: packed_width(0, 4), "head_dim=0"),
        (lambda: packed_width(128, 16), "bits=16"),
        (lambda: dequantize_kv(PACKED, SCALE, 4, 128, torch.float32), r"must be \[2, 3, 64\]"),
        (lambda: dequantize_kv(PACKED, SCALE[:1], 3, 128, torch.float32), r"must be \[1, 3, 48\]"),
        (lambda: dequantize_kv(PACKED, SCALE, 3, 100, torch.float32), "head_dim=100"),
        (lambda: dequantize_kv(PACKED, SCALE, 8, 128, torch.float32), "bits=8"),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_kv(torch.ones(2, 3, 8, dtype=torch.int8), 3), r"x must be .* torch\.int8"),
        (lambda: dequantize_kv(PACKED.char(), SCALE, 3, 128, torch.float32), r"packed must be .* torch\.int8"),
        (lambda: dequantize_kv(PACKED, SCALE.float(), 3, 128, torch.float32), r"scale must be .* torch\.float32"),
        (lambda: dequantize_kv(PACKED, SCALE, 3, 128, torch.int8), r"dtype=torch\.int8"),
    ],
)
def test_bad_types_raise(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_bits
@each_dtype
def test_cuda_equals_cpu_and_marks_nonfinite(dtype, bits):
    x_THD = gaussian(50, 4, 128, dtype=dtype)
    packed, scale = quantize_kv(x_THD, bits)
    packed_cuda, scale_cuda = quantize_kv(x_THD.cuda(), bits)
    assert torch.equal(packed_cuda.cpu(), packed)
    assert torch.equal(scale_cuda.cpu(), scale)
    restored_cuda = dequantize_kv(packed_cuda, scale_cuda, bits, 128, dtype)
    assert torch.equal(restored_cuda.cpu(), dequantize_kv(packed, scale, bits, 128, dtype))
    x_THD[1, 2, 0] = math.nan
    packed_cuda, scale_cuda = quantize_kv(x_THD.cuda(), bits)
    assert scale_cuda.isnan().nonzero().tolist() == [[1, 2]]
    assert dequantize_kv(packed_cuda, scale_cuda, bits, 128, dtype)[1, 2].isnan().all()

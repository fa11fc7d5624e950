"""Triton's activation quantizers against the reference: codes and scales equal bit for bit."""

# Shapes: T = tokens, D = features, G = groups.

import math

import pytest
import torch

from bitmoe_kernels.act_quant import dequantize, int8_codes, quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.act_quant.reference import (
    dequantize_reference,
    int8_codes_reference,
    quantize_fp4_reference,
    quantize_int4_reference,
    quantize_int8_reference,
)

REFERENCES = {"int4": quantize_int4_reference, "int8": quantize_int8_reference, "fp4": quantize_fp4_reference}
LEVELS = {"int4": 7, "int8": 127, "fp4": 12}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_format = pytest.mark.parametrize("num_format", REFERENCES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def kernels(triton_device):
    """The functions under test, imported when the interpreter has been chosen."""
    from bitmoe_kernels.act_quant import triton_kernels

    return triton_kernels


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def assert_exact(result, expected):
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got.cpu().nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))


@each_format
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (600, 8), (5, 100), (2, 1000), (1, 5460), (2, 3, 33)], ids=str)
def test_quantize_equals_reference(kernels, triton_device, num_format, dtype, shape):
    """Odd sizes, several programs and part-filled tiles."""
    x_TD = gaussian(*shape, dtype=dtype)
    assert_exact(kernels.quantize_triton(x_TD.to(triton_device), num_format), REFERENCES[num_format](x_TD))


@each_dtype
@pytest.mark.parametrize("num_format", ["int4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 7), (5, 100), (2, 1000), (0, 8)], ids=str)
def test_e4m3_codes_equal_int8_codes(kernels, triton_device, num_format, dtype, shape):
    x_TD = gaussian(*shape, dtype=dtype)
    codes, scale = kernels.quantize_triton(x_TD.to(triton_device), num_format, code_dtype=torch.float8_e4m3fn)
    assert codes.dtype == torch.float8_e4m3fn
    expected, expected_scale = REFERENCES[num_format](x_TD)
    assert torch.equal(codes.cpu().view(torch.int8), expected.to(torch.float8_e4m3fn).view(torch.int8))
    assert_exact([scale], [expected_scale])


@each_dtype
@pytest.mark.parametrize("code_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((3, 7), 1), ((5, 100), 4), ((2, 1000), 1), ((2, 3, 9), 3), ((0, 8), 2)])
def test_dequantize_equals_reference(kernels, triton_device, dtype, code_dtype, shape, groups):
    limit = 128 if code_dtype == torch.int8 else 8
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(-limit, limit, shape, generator=generator, dtype=torch.int8).to(code_dtype)
    scale = gaussian(*shape[:-1], groups).exp()
    scale[:1, ..., :1] = float("nan")
    result = kernels.dequantize_triton(codes.to(triton_device), scale.to(triton_device), dtype)
    assert_exact([result], [dequantize_reference(codes, scale, dtype)])


def test_dequantize_multiplies_codes_and_scales_in_the_dtype_of_the_scales():
    codes, scale = torch.tensor([[3, -5, 0, 127]], dtype=torch.int8), torch.tensor([[0.1, 1 / 3]], dtype=torch.float64)
    expected = torch.tensor([[0.3, -0.5, 0.0, 127 / 3]], dtype=torch.float64)
    torch.testing.assert_close(dequantize(codes, scale, torch.float64), expected, rtol=1e-15, atol=0)
    assert dequantize(codes, scale.float(), torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="codes must be int8 or float8_e4m3fn, got torch.int32"):
        dequantize(codes.int(), scale, torch.float32)
    with pytest.raises(ValueError, match="groups=3 does not cut 4 features"):
        dequantize(codes, torch.ones(1, 3), torch.float32)
    with pytest.raises(ValueError, match=r"it must be \[1, 'groups'\]"):
        dequantize(codes, torch.ones(2, 2), torch.float32)


@pytest.mark.parametrize("num_format", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_fractions_of_16_bit_numbers(kernels, triton_device, num_format, dtype):
    """Every fraction at every size that rounds to a code other than 0, under the scales of 300 rows, half of them with
    exact ties.
    """
    bits = 7 if dtype == torch.bfloat16 else 10
    fractions = 1 + torch.arange(2**bits) / 2**bits
    sizes = 2.0 ** -torch.arange(9 if bits == 7 else 5)
    largest = torch.rand(300, 1, generator=torch.Generator().manual_seed(8)) + 1
    largest[::2] = (torch.arange(150)[:, None] % 128) / 128 + 1
    x_TD = (sizes[:, None] * fractions).flatten().repeat(300, 1)
    x_TD = torch.cat([x_TD, largest * 2], dim=1).to(dtype)
    result = kernels.quantize_triton(x_TD.to(triton_device), num_format)
    assert_exact(result, REFERENCES[num_format](x_TD))


@pytest.mark.parametrize("num_format", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_largest_numbers_of_16_bits(kernels, triton_device, num_format, dtype):
    """Scales whose reciprocal is nearly denormal, and one outlier in a long row."""
    limits = torch.finfo(dtype)
    x_TD = (gaussian(4, 200).clamp(-1, 1) * limits.max).to(dtype)
    x_TD[1] = limits.max
    x_TD[2], x_TD[2, 9] = 0, limits.min
    x_TD[3] = gaussian(200).sign() * limits.smallest_normal
    assert_exact(kernels.quantize_triton(x_TD.to(triton_device), num_format), REFERENCES[num_format](x_TD))
    outlier_TD = torch.zeros(1, 14336, dtype=dtype)
    outlier_TD[0, 14000] = -100
    assert_exact(kernels.quantize_triton(outlier_TD.to(triton_device), num_format), REFERENCES[num_format](outlier_TD))


@each_dtype
@pytest.mark.parametrize(("shape", "groups"), [((5, 24), 4), ((3, 2, 35), 5), ((4, 6), 6)], ids=str)
def test_int8_groups_equal_reference(kernels, triton_device, dtype, shape, groups):
    x_TD = gaussian(*shape, dtype=dtype)
    result = kernels.quantize_triton(x_TD.to(triton_device), "int8", groups)
    assert_exact(result, quantize_int8_reference(x_TD, groups))


@pytest.mark.parametrize("num_format", ["int8", "fp4"])
def test_quotients_beside_ties_equal_reference(kernels, triton_device, num_format):
    """Floats that lie up to 3 steps beside (n + 1/2) * scale: a quotient wrong by one bit gives a wrong code."""
    largest = 1 + gaussian(12, 1).abs()
    levels = LEVELS[num_format]
    ties = torch.arange(levels) + 0.5
    x_TD = (ties * (largest / torch.tensor(float(levels)))).repeat(1, 7)
    steps = torch.arange(-3, 4, dtype=torch.int32).repeat_interleave(levels)
    x_TD = (x_TD.view(torch.int32) + steps).view(torch.float32)
    x_TD = torch.cat([x_TD, -x_TD, largest], dim=1)
    x_TD = x_TD.clamp(-largest, largest)
    codes, scale = REFERENCES[num_format](x_TD)
    assert len(codes.unique()) > levels / 2
    assert_exact(kernels.quantize_triton(x_TD.to(triton_device), num_format), (codes, scale))


def test_int4_quotients_beside_ties_equal_reference(kernels, triton_device):
    """As above; the scale is mean / sqrt(7), and one large value in each row moves it little."""
    scale = 0.5 + gaussian(8, 1).abs()
    x_TD = (torch.arange(-9, 8) + 0.5) * scale
    for _ in range(3):
        # Moving the ties moves the mean: a few rounds settle it to rounding error.
        x_TD = (torch.arange(-9, 8) + 0.5) * quantize_int4_reference(torch.cat([x_TD, scale], dim=1))[1]
    rows = [(x_TD.view(torch.int32) + step).view(torch.float32) for step in range(-3, 4)]
    x_TD = torch.cat([torch.cat([row, scale], dim=1) for row in rows])
    codes, scale = quantize_int4_reference(x_TD)
    assert_exact(kernels.quantize_triton(x_TD.to(triton_device), "int4"), (codes, scale))


def test_int4_clips_to_minus_8_and_7(kernels, triton_device):
    x_TD = torch.zeros(2, 10)
    x_TD[0, 3], x_TD[1, 3] = 80.0, -80.0
    codes, _ = kernels.quantize_triton(x_TD.to(triton_device), "int4")
    assert codes[:, 3].tolist() == [7, -8]


@each_format
def test_extreme_values_equal_reference(kernels, triton_device, num_format):
    """All zero, denormal, smallest scale, one outlier, near the largest float."""
    x_TD = gaussian(6, 70)
    x_TD[0] = 0
    x_TD[1] *= 1e-40
    x_TD[2] *= 1e-5
    x_TD[3, 5] = -1e30
    x_TD[4] = 3.4e38
    x_TD[5] = x_TD[5].sign() * 3e38
    assert_exact(kernels.quantize_triton(x_TD.to(triton_device), num_format), REFERENCES[num_format](x_TD))


@each_format
@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_token_has_a_nan_scale_and_codes_0(kernels, triton_device, num_format, dtype, bad):
    x_TD = gaussian(4, 37, dtype=dtype)
    x_TD[1, 36] = x_TD[3, 0] = bad
    result = kernels.quantize_triton(x_TD.to(triton_device), num_format)
    assert result[1].isnan().flatten().tolist() == [False, True, False, True]
    assert not result[0][[1, 3]].any()
    assert_exact(result, REFERENCES[num_format](x_TD))


@each_format
def test_strided_and_empty(kernels, triton_device, num_format):
    x_TD = gaussian(6, 20)
    strided = x_TD.t().contiguous().t().to(triton_device)
    assert_exact(kernels.quantize_triton(strided, num_format), REFERENCES[num_format](x_TD))
    codes, scale = kernels.quantize_triton(torch.zeros(0, 20, device=triton_device), num_format)
    assert codes.shape == (0, 20)
    assert scale.shape == (0, 1)


@each_dtype
@pytest.mark.parametrize("groups", [1, 3])
def test_int8_codes_equal_reference_under_foreign_scales(kernels, triton_device, dtype, groups):
    """Scales of other rows: codes saturate, overflow of the quotient included; NaN gives 0."""
    x_TD = gaussian(7, 36, dtype=dtype)
    x_TD[0, 0], x_TD[0, 1], x_TD[0, 2] = math.nan, math.inf, -math.inf
    scale_TG = gaussian(7, groups).abs() / 50
    scale_TG[1], scale_TG[2], scale_TG[3] = 1e-40, math.nan, 1e30
    codes = kernels.int8_codes_triton(x_TD.to(triton_device), scale_TG.to(triton_device))
    assert {-128, 0, 127} <= set(codes.flatten().tolist())
    assert_exact([codes], [int8_codes_reference(x_TD, scale_TG)])


@pytest.mark.gpu
@each_dtype
def test_public_functions_on_a_gpu_equal_cpu(dtype):
    """The wide rows of real models; fp64 takes the reference."""
    x_TD = gaussian(64, 11008, dtype=dtype)
    for quantize in (quantize_int4, quantize_int8, quantize_fp4):
        assert_exact(quantize(x_TD.cuda()), quantize(x_TD))
    for quantize in (quantize_int4, quantize_fp4):
        codes, _ = quantize(x_TD.cuda(), torch.float8_e4m3fn)
        assert_exact([codes.to(torch.int8)], [quantize(x_TD)[0]])
    codes, scale = quantize_int8(x_TD, groups=8)
    assert_exact(quantize_int8(x_TD.cuda(), groups=8), (codes, scale))
    assert_exact([int8_codes(x_TD.cuda(), scale.cuda())], [codes])
    wide_TD = gaussian(2, 28672, dtype=dtype)
    assert_exact(quantize_int4(wide_TD.cuda()), quantize_int4(wide_TD))
    double_TD = gaussian(4, 100).double()
    assert_exact(quantize_int8(double_TD.cuda()), quantize_int8(double_TD))


@pytest.mark.gpu
def test_more_than_2_to_31_elements(kernels):
    """Offsets beyond int32: the last rows, in the same call, equal those rows alone."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x_TD = torch.zeros(2**31 // 4096 + 8, 4096, dtype=torch.bfloat16, device="cuda")
    x_TD[-9:] = gaussian(9, 4096, dtype=torch.bfloat16).cuda()
    codes, scale = kernels.quantize_triton(x_TD, "int8")
    assert_exact([codes[-9:], scale[-9:]], quantize_int8_reference(x_TD[-9:].cpu()))

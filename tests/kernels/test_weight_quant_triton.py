"""Triton's ternary weight quantization against the reference: fp64 sums, codes equal bit for bit."""

# Shapes: O = output rows, I = input columns, E = experts, G = groups.

import math
from types import SimpleNamespace

import pytest
import torch

from bitmoe_kernels.weight_quant import ternarize
from bitmoe_kernels.weight_quant.reference import (
    absmean_scale_reference,
    absmean_sums_reference,
    ternary_codes_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Shape, groups, axis: one group, a scale a row, groups of rows and of columns, batches, part-filled tiles.
CASES = [
    ((1, 1), 1, -2),
    ((6, 9), 1, -2),
    ((6, 9), 6, -2),
    ((6, 9), 3, -1),
    ((4, 5000), 2, -2),
    ((3, 9000), 2, -1),
    ((2, 40000), 2, -2),
    ((700, 7), 1, -1),
    ((2, 3, 8, 20), 4, -2),
    ((3, 8, 20), 5, -1),
]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize(("shape", "groups", "axis"), CASES, ids=str)

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def kernels(triton_device):
    """The functions under test, imported when the interpreter has been chosen."""
    from bitmoe_kernels.weight_quant import triton_absmean, triton_operands

    return SimpleNamespace(**vars(triton_absmean) | vars(triton_operands))


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def codes_of(kernels, w_OI: torch.Tensor, scale_G: torch.Tensor, axis: int) -> torch.Tensor:
    return kernels.ternary_operands_triton(w_OI, scale_G, axis, torch.int8, False)[0]


@each_dtype
@each_case
def test_absmean_sums_equal_reference(kernels, triton_device, dtype, shape, groups, axis):
    """To the rounding of an fp64 sum, and the scale made from them exactly; twice the same bits."""
    w_OI = gaussian(*shape, dtype=dtype)
    sums = kernels.absmean_sums_triton(w_OI.to(triton_device), groups, axis)
    expected = absmean_sums_reference(w_OI, groups, axis)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums.cpu(), expected, rtol=1e-14, atol=0)
    count = shape[-1] * shape[-2] // groups
    assert torch.equal(absmean_scale_reference(sums.cpu(), count), absmean_scale_reference(expected, count))
    assert torch.equal(kernels.absmean_sums_triton(w_OI.to(triton_device), groups, axis), sums)


def test_absmean_sums_are_fp64_of_the_exact_values(kernels, triton_device):
    """An fp32 sum would lose every 1 beside 2^25."""
    w_OI = torch.ones(1, 9, device=triton_device)
    w_OI[0, 0] = 2.0**25
    assert kernels.absmean_sums_triton(w_OI, 1, -2).tolist() == [2.0**25 + 8]


@each_dtype
@pytest.mark.parametrize(("shape", "groups", "axis"), [case for case in CASES if max(case[0]) < 6000], ids=str)
def test_ternary_codes_equal_reference(kernels, triton_device, dtype, shape, groups, axis):
    w_OI = gaussian(*shape, dtype=dtype)
    scale_G = 0.2 + gaussian(*shape[:-2], groups).abs()
    codes = codes_of(kernels, w_OI.to(triton_device), scale_G.to(triton_device), axis)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.cpu(), ternary_codes_reference(w_OI, scale_G, axis))


def test_ternary_codes_beside_half_a_scale(kernels, triton_device):
    """scale / 2 is a tie and becomes 0; floats one and two steps above it round to a quotient above 1/2."""
    random = torch.randint(2**23, (500,), generator=torch.Generator().manual_seed(8))
    mantissas = torch.cat([torch.tensor([0, 1, 2, 2**23 - 2, 2**23 - 1]), random]).int()
    scale_O = (mantissas + torch.tensor(1.0).view(torch.int32)).view(torch.float32)
    scale_O[250:] *= 1e-5
    steps = torch.arange(-2, 3, dtype=torch.int32)
    w_OI = ((scale_O / 2).view(torch.int32)[:, None] + steps).view(torch.float32)
    w_OI = torch.cat([w_OI, -w_OI], dim=1)
    expected = ternary_codes_reference(w_OI, scale_O, -2)
    assert expected[0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, -1, -1]
    codes = codes_of(kernels, w_OI.to(triton_device), scale_O.to(triton_device), -2)
    assert torch.equal(codes.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_columns", [256, 255], ids=["in pairs", "one by one"])
@pytest.mark.parametrize("scale", [1e-5, 0.37, 1.0, 1e5, 3e38, 2.0**-126, math.inf, math.nan, -math.nan])
def test_codes_of_every_16_bit_number(kernels, triton_device, dtype, num_columns, scale):
    w_OI = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)[:, :num_columns]
    scale_G = torch.full((1,), scale)
    codes = codes_of(kernels, w_OI.to(triton_device), scale_G.to(triton_device), -2)
    assert torch.equal(codes.cpu(), ternary_codes_reference(w_OI, scale_G, -2))


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_group_has_a_nan_scale_and_codes_0(kernels, triton_device, axis, bad):
    w_OI = gaussian(6, 8)
    w_OI[5, 7] = bad
    sums = kernels.absmean_sums_triton(w_OI.to(triton_device), 2, axis)
    scale_G = absmean_scale_reference(sums, count=24)
    assert scale_G.isnan().tolist() == [False, True]
    codes = codes_of(kernels, w_OI.to(triton_device), scale_G, axis).cpu()
    assert not codes.chunk(2, dim=axis)[1].any()
    assert torch.equal(codes, ternary_codes_reference(w_OI, scale_G.cpu(), axis))


def test_strided_and_empty_batch(kernels, triton_device):
    w_OI = gaussian(6, 8)
    strided = w_OI.t().contiguous().t().to(triton_device)
    sums = kernels.absmean_sums_triton(strided, 2, -2)
    torch.testing.assert_close(sums.cpu(), absmean_sums_reference(w_OI, 2, -2), rtol=1e-14, atol=0)
    scale_G = absmean_scale_reference(sums, count=24)
    codes = codes_of(kernels, strided, scale_G, -2)
    assert torch.equal(codes.cpu(), ternary_codes_reference(w_OI, scale_G.cpu(), -2))
    empty = torch.zeros(0, 6, 8, device=triton_device)
    for axis in (-2, -1):
        assert kernels.absmean_sums_triton(empty, 2, axis).shape == (0, 2)
        assert codes_of(kernels, empty, torch.zeros(0, 2, device=triton_device), axis).shape == (0, 6, 8)


@pytest.mark.gpu
@each_dtype
def test_ternarize_on_a_gpu_equals_cpu(dtype):
    """Weights of real models: whole, a scale a row, groups of columns, experts."""
    w_OI = gaussian(2048, 5460, dtype=dtype)
    for groups, dim in ((1, 0), (2048, 0), (4, 1)):
        codes, scale = ternarize(w_OI, groups, dim)
        codes_cuda, scale_cuda = ternarize(w_OI.cuda(), groups, dim)
        assert torch.equal(scale_cuda.cpu(), scale)
        assert torch.equal(codes_cuda.cpu(), codes)


@pytest.mark.gpu
def test_more_than_2_to_31_weights(kernels):
    """Offsets beyond int32: the last row, in the same call, equals that row alone."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    w_OI = torch.zeros(2**31 // 8192 + 2, 8192, dtype=torch.bfloat16, device="cuda")
    w_OI[-1] = gaussian(8192, dtype=torch.bfloat16).cuda()
    sums = kernels.absmean_sums_triton(w_OI, len(w_OI), -2)
    torch.testing.assert_close(sums[-1].cpu(), w_OI[-1].cpu().double().abs().sum(), rtol=1e-14, atol=0)
    scale = torch.ones(1, device="cuda")
    codes = codes_of(kernels, w_OI, scale, -2)
    assert torch.equal(codes[-1:].cpu(), ternary_codes_reference(w_OI[-1:].cpu(), scale.cpu(), -2))

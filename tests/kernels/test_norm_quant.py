"""Norm and quantization in one: the reference against the separate steps, Triton against the reference, bad input."""

# Shapes: T = tokens, D = features, G = groups.

import math

import pytest
import torch

from bitmoe_kernels.act_quant import quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.norm_quant import rms_norm, rms_norm_quantize, sub_norm_quantize
from bitmoe_kernels.norm_quant.reference import (
    rms_norm_quantize_reference,
    rms_norm_reference,
    sub_norm_quantize_reference,
)
from bitmoe_kernels.sparsify import topk_mask

EPS = 1e-5
QUANTIZERS = {"int4": quantize_int4, "int8": quantize_int8, "fp4": quantize_fp4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_format = pytest.mark.parametrize("num_format", QUANTIZERS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_gain_dtype = pytest.mark.parametrize("gain_dtype", DTYPES, ids=lambda dtype: f"gain-{dtype}")


@pytest.fixture
def kernels(triton_device, poison):
    """The functions under test, imported when the interpreter has been chosen; new memory holds garbage."""
    from bitmoe_kernels.norm_quant import triton_kernels

    return triton_kernels


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same standard normal tensor on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def gain(num_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gains around 1 that no dtype holds exactly."""
    return (1 + 0.3 * gaussian(num_features).flip(0)).to(dtype)


def assert_exact(result, expected):
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got.cpu().nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))


def test_rms_norm_quantize_hand_values():
    """Mean square 12.5: 3 / rms = 0.849 and 4 / rms = 1.131; with gains 1 and 3 the largest is 3.394, code 127."""
    codes, scale, rstd = rms_norm_quantize(torch.tensor([[3.0, -4.0]]), torch.tensor([1.0, 3.0]), eps=0.0)
    assert rstd.item() == pytest.approx(1 / math.sqrt(12.5), rel=1e-6)
    assert scale.item() == pytest.approx(12 / math.sqrt(12.5) / 127, rel=1e-6)
    assert codes.tolist() == [[32, -127]]


@each_format
@each_dtype
def test_rms_norm_quantize_is_norm_then_quantizer(num_format, dtype):
    """Against torch's RMSNorm in fp64 rounded to the input's dtype: a code may differ by one step of rounding."""
    x_TD, gain_D = gaussian(20, 100, dtype=dtype), gain(100)
    codes, scale, rstd = rms_norm_quantize(x_TD, gain_D, EPS, num_format)
    y_TD = torch.nn.functional.rms_norm(x_TD.double(), [100], gain_D.double(), EPS)
    expected_codes, expected_scale = QUANTIZERS[num_format](y_TD.to(dtype))
    torch.testing.assert_close(
        rstd.double(), torch.rsqrt(x_TD.double().square().mean(-1, True) + EPS), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(scale, expected_scale, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert (codes != expected_codes).double().mean() < 0.01


@each_format
def test_sub_norm_quantize_is_each_group_apart(num_format):
    x_TD, gain_D = gaussian(6, 24, dtype=torch.bfloat16), gain(24, torch.bfloat16)
    codes, scale, rstd = sub_norm_quantize(x_TD, gain_D, EPS, num_format, groups=4, keep=0.5)
    parts = [
        sub_norm_quantize(x_Td, gain_d, EPS, num_format, keep=0.5)
        for x_Td, gain_d in zip(x_TD.chunk(4, dim=1), gain_D.chunk(4), strict=True)
    ]
    assert_exact((codes, scale, rstd), [torch.cat(blocks, dim=1) for blocks in zip(*parts, strict=True)])


@each_dtype
def test_sub_norm_quantize_masks_by_the_normalized_values(dtype):
    """Gains move the largest magnitudes; x rounds before the gain and after it."""
    x_TD, gain_D = gaussian(8, 40, dtype=dtype), gain(40, dtype) * 2
    codes, _, rstd = sub_norm_quantize(x_TD, gain_D, EPS, "int8", keep=0.25)
    dense, _, _ = sub_norm_quantize(x_TD, gain_D, EPS, "int8")
    y_TD = (x_TD.float() * rstd).to(dtype) * gain_D
    assert torch.equal(codes, dense * topk_mask(y_TD, keep=0.25))
    assert not torch.equal(topk_mask(y_TD, keep=0.25), topk_mask(x_TD, keep=0.25))


def test_fp64_input_computes_in_fp64():
    x_TD, gain_D = gaussian(3, 30).double(), gain(30).double()
    codes, scale, rstd = rms_norm_quantize(x_TD, gain_D, EPS, "int8")
    assert scale.dtype == rstd.dtype == torch.float64
    y_TD = torch.nn.functional.rms_norm(x_TD, [30], gain_D, EPS)
    torch.testing.assert_close(scale, y_TD.abs().amax(-1, True) / 127, rtol=1e-14, atol=0)
    assert torch.equal(codes, quantize_int8(y_TD)[0])


@each_format
@each_dtype
@each_gain_dtype
@pytest.mark.parametrize("shape", [(3, 1), (70, 60), (2, 3, 33), (1, 5460)], ids=str)
def test_triton_rms_norm_equals_reference(kernels, triton_device, num_format, dtype, gain_dtype, shape):
    x_TD, gain_D = gaussian(*shape, dtype=dtype) * 3, gain(shape[-1], gain_dtype)
    result = kernels.norm_quantize_triton(x_TD.to(triton_device), gain_D.to(triton_device), EPS, num_format)
    assert_exact(result, rms_norm_quantize_reference(x_TD, gain_D, EPS, num_format))


@each_format
@each_dtype
@each_gain_dtype
@pytest.mark.parametrize(
    ("num_features", "groups", "keep"), [(105, 1, 1.0), (105, 1, 0.5), (105, 5, 0.3), (105, 5, 1.0), (2210, 2, 1.0)]
)
def test_triton_sub_norm_equals_reference(
    kernels, triton_device, num_format, dtype, gain_dtype, num_features, groups, keep
):
    """In one piece or, 1,105 features a group, in three."""
    x_TD, gain_D = gaussian(7, num_features, dtype=dtype) * 3, gain(num_features, gain_dtype)
    result = kernels.norm_quantize_triton(
        x_TD.to(triton_device), gain_D.to(triton_device), EPS, num_format, True, groups, keep
    )
    assert_exact(result, sub_norm_quantize_reference(x_TD, gain_D, EPS, num_format, groups, keep))


@each_format
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_triton_marks_a_nonfinite_token(kernels, triton_device, num_format, bad):
    x_TD, gain_D = gaussian(4, 20, dtype=torch.bfloat16), gain(20)
    x_TD[1, 3], x_TD[2] = bad, 0
    result = kernels.norm_quantize_triton(x_TD.to(triton_device), gain_D.to(triton_device), EPS, num_format)
    assert result[1].isnan().flatten().tolist() == [False, True, False, False]
    assert not result[0][1:3].any()
    assert_exact(result, rms_norm_quantize_reference(x_TD, gain_D, EPS, num_format))


@each_dtype
@pytest.mark.parametrize("num_format", ["int4", "fp4"])
def test_e4m3_codes_and_normalized_activations(kernels, triton_device, num_format, dtype):
    """Both options at once: e4m3 codes are the int8 codes, y is that of the norm alone."""
    x_TD, gain_D = gaussian(9, 72, dtype=dtype) * 3, gain(72)
    result = kernels.norm_quantize_triton(
        x_TD.to(triton_device),
        gain_D.to(triton_device),
        EPS,
        num_format,
        code_dtype=torch.float8_e4m3fn,
        with_normalized=True,
    )
    codes, scale, rstd = rms_norm_quantize_reference(x_TD, gain_D, EPS, num_format)
    assert result[0].dtype == torch.float8_e4m3fn
    y_TD = rms_norm_reference(x_TD, gain_D, EPS)[0]
    assert_exact((result[0].cpu().to(torch.int8), *result[1:]), (codes, scale, rstd, y_TD))
    public = rms_norm_quantize(x_TD, gain_D, EPS, num_format, torch.float8_e4m3fn, with_normalized=True)
    assert public[0].dtype == torch.float8_e4m3fn
    assert_exact((public[0].to(torch.int8), *public[1:]), (codes, scale, rstd, y_TD))


@each_dtype
@each_gain_dtype
@pytest.mark.parametrize("shape", [(3, 1), (70, 60), (2, 3, 33), (1, 5460)], ids=str)
def test_triton_rms_norm_alone_equals_reference(kernels, triton_device, dtype, gain_dtype, shape):
    x_TD, gain_D = gaussian(*shape, dtype=dtype) * 3, gain(shape[-1], gain_dtype)
    result = kernels.rms_norm_triton(x_TD.to(triton_device), gain_D.to(triton_device), EPS)
    assert_exact(result, rms_norm_reference(x_TD, gain_D, EPS))
    assert_exact(rms_norm(x_TD, gain_D, EPS), rms_norm_reference(x_TD, gain_D, EPS))


@each_dtype
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_triton_rms_norm_of_extreme_rows(kernels, triton_device, dtype, eps):
    """Rows that leave the fast sum of squares: zeros, squares that underflow or overflow, Inf, NaN."""
    largest = torch.finfo(dtype).max
    x_TD = gaussian(9, 40, dtype=dtype)
    x_TD[0] = 0
    x_TD[1] *= 1e-20
    x_TD[2] = x_TD[2].sign() * torch.finfo(dtype).smallest_normal
    x_TD[3] = largest
    x_TD[4, 7] = largest / 2
    x_TD[5, 1] = math.inf
    x_TD[6, 39] = math.nan
    x_TD[7, ::2] = 0
    result = kernels.rms_norm_triton(x_TD.to(triton_device), gain(40).to(triton_device), eps)
    assert_exact(result, rms_norm_reference(x_TD, gain(40), eps))


def test_zero_and_one_token(kernels, triton_device):
    gain_D = gain(10)
    for shape in ((0, 10), (2, 0, 10)):
        x_TD = torch.zeros(shape)
        for result in (
            rms_norm_quantize(x_TD, gain_D, EPS, with_normalized=True),
            kernels.norm_quantize_triton(
                x_TD.to(triton_device), gain_D.to(triton_device), EPS, "int8", with_normalized=True
            ),
        ):
            assert [part.shape[-1] for part in result] == [10, 1, 1, 10]
            assert all(part.shape[:-1] == x_TD.shape[:-1] for part in result)
        assert rms_norm(x_TD, gain_D, EPS)[0].shape == x_TD.shape
    codes, scale, rstd = sub_norm_quantize(gaussian(10), gain_D, EPS, groups=5)
    assert codes.shape == (10,)
    assert scale.shape == rstd.shape == (5,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm_quantize(torch.ones(2, 6), torch.ones(5), EPS), r"gain of shape \[5\]"),
        (lambda: rms_norm_quantize(torch.ones(2, 6), torch.ones(2, 6), EPS), r"gain of shape \[2, 6\]"),
        (lambda: rms_norm_quantize(torch.ones(2, 0), torch.ones(0), EPS), r"x has shape \[2, 0\]"),
        (lambda: rms_norm_quantize(torch.ones(2, 6), torch.ones(6), EPS, "int3"), "num_format='int3'"),
        (lambda: sub_norm_quantize(torch.ones(2, 6), torch.ones(6), EPS, groups=4), "groups=4"),
        (lambda: sub_norm_quantize(torch.ones(2, 6), torch.ones(6), EPS, keep=0.01), r"keep=0\.01"),
        (lambda: sub_norm_quantize(torch.ones(2, 6), torch.ones(6), EPS, keep=1.1), r"keep=1\.1"),
        (lambda: rms_norm_quantize(torch.tensor([[1.0, math.nan]]), torch.ones(2), EPS), "1 non-finite"),
        (lambda: sub_norm_quantize(torch.tensor([[1.0, math.inf]]), torch.ones(2), EPS), "1 non-finite"),
        (lambda: rms_norm(torch.ones(2, 6), torch.ones(5), EPS), r"gain of shape \[5\]"),
        (
            lambda: rms_norm_quantize(torch.ones(2, 6), torch.ones(6), EPS, "int8", torch.float8_e4m3fn),
            "float8_e4m3fn of int8",
        ),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_raise():
    with pytest.raises(TypeError, match=r"x must be .* torch\.int8"):
        rms_norm_quantize(torch.ones(2, 2, dtype=torch.int8), torch.ones(2), EPS)
    with pytest.raises(TypeError, match="gain must be"):
        sub_norm_quantize(torch.ones(2, 2), torch.ones(2, dtype=torch.int32), EPS)


@pytest.mark.gpu
@each_format
@each_dtype
def test_public_functions_on_a_gpu_equal_cpu(num_format, dtype):
    """The rows of real models."""
    x_TD, gain_D = gaussian(64, 4096, dtype=dtype), gain(4096, dtype)
    assert_exact(
        rms_norm_quantize(x_TD.cuda(), gain_D.cuda(), EPS, num_format, with_normalized=True),
        rms_norm_quantize(x_TD, gain_D, EPS, num_format, with_normalized=True),
    )
    if num_format != "int8":
        codes, _, _ = rms_norm_quantize(x_TD.cuda(), gain_D.cuda(), EPS, num_format, torch.float8_e4m3fn)
        assert_exact([codes.to(torch.int8)], [rms_norm_quantize(x_TD, gain_D, EPS, num_format)[0]])
    x_TD, gain_D = gaussian(64, 11008, dtype=dtype), gain(11008, dtype)
    for groups, keep in ((1, 0.5), (8, 1.0)):
        assert_exact(
            sub_norm_quantize(x_TD.cuda(), gain_D.cuda(), EPS, num_format, groups, keep),
            sub_norm_quantize(x_TD, gain_D, EPS, num_format, groups, keep),
        )

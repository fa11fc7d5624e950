"""Backward of the norms: against fp64 autograd of the equations, and the reference's own fp64."""

# Shapes: T = tokens, D = features, G = groups.

import pytest
import torch

from bitmoe_kernels.norm_quant import rms_norm, rms_norm_backward, sub_norm_backward, sub_norm_quantize

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def norm_backward(triton_device, poison):
    """The function under test on tensors moved to its device; new memory holds garbage."""
    from bitmoe_kernels.norm_quant.triton_kernels import norm_backward_triton

    def on_device(*tensors):
        tensors = [tensor if tensor is None else tensor.to(triton_device) for tensor in tensors]
        return tuple(result.cpu() for result in norm_backward_triton(*tensors))

    return on_device


def gaussian(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A standard normal tensor, the same on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def autograd(dy_TD, x_TD, gain_D, groups=1, residual_grad_TD=None):
    """dx, dgain and rstd in fp64, of the norm without its roundings."""
    x_TD, gain_D = x_TD.double().requires_grad_(), gain_D.double().requires_grad_()
    x_TGd = x_TD.unflatten(-1, (groups, -1))
    rstd_TG1 = (x_TGd.square().mean(-1, keepdim=True) + EPS).rsqrt()
    y_TD = (x_TGd * rstd_TG1).flatten(-2) * gain_D
    dx_TD, dgain_D = torch.autograd.grad(y_TD, (x_TD, gain_D), dy_TD.double())
    if residual_grad_TD is not None:
        dx_TD = dx_TD + residual_grad_TD.double()
    return dx_TD, dgain_D, rstd_TG1.detach().squeeze(-1)


def assert_close(result, expected, dtype):
    """dx to one rounding to its dtype and the fp32 sum; dgain to fp32 sums."""
    dx_TD, dgain_D = result
    assert dx_TD.dtype == dtype
    assert dgain_D.dtype == torch.float32
    torch.testing.assert_close(dx_TD.double(), expected[0], rtol=1.01 * STEP[dtype], atol=3e-6)
    torch.testing.assert_close(dgain_D.double(), expected[1], rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize(("shape", "groups"), [((3, 1), 1), ((40, 60), 5), ((2, 3, 33), 3), ((1, 5460), 1)], ids=str)
@pytest.mark.parametrize("has_residual", [False, True])
def test_triton_equals_fp64_autograd(norm_backward, dtype, shape, groups, has_residual):
    dy_TD, x_TD = gaussian(*shape, seed=4, dtype=dtype), gaussian(*shape, dtype=dtype) * 3
    gain_D = (1 + 0.3 * gaussian(shape[-1], seed=5)).to(dtype)
    residual_TD = gaussian(*shape, seed=6, dtype=dtype) if has_residual else None
    expected = autograd(dy_TD, x_TD, gain_D, groups, residual_TD)
    result = norm_backward(dy_TD, x_TD, gain_D, expected[2].float(), residual_TD)
    assert result[0].shape == x_TD.shape
    assert_close(result, expected, dtype)


@each_dtype
def test_public_functions_equal_fp64_autograd(dtype):
    """On CPU, with the rstd of the forward pass; strided gradients."""
    dy_TD, x_TD = gaussian(60, 7, seed=4, dtype=dtype).T, gaussian(7, 60, dtype=dtype) * 3
    gain_D, residual_TD = 1 + 0.3 * gaussian(60, seed=5), gaussian(7, 60, seed=6, dtype=dtype)
    _, rstd_T1 = rms_norm(x_TD, gain_D, EPS)
    result = rms_norm_backward(dy_TD, x_TD, gain_D, rstd_T1, residual_TD)
    assert_close(result, autograd(dy_TD, x_TD, gain_D, 1, residual_TD), dtype)
    _, _, rstd_TG = sub_norm_quantize(x_TD, gain_D, EPS, groups=4, keep=0.5)
    assert_close(sub_norm_backward(dy_TD, x_TD, gain_D, rstd_TG), autograd(dy_TD, x_TD, gain_D, 4), dtype)


def test_fp64_is_exact_to_fp64():
    dy_TD, x_TD, gain_D = gaussian(5, 24, seed=4).double(), gaussian(5, 24).double(), gaussian(24, seed=5).double()
    for groups, backward in ((1, rms_norm_backward), (3, sub_norm_backward)):
        dx_TD, dgain_D, rstd_TG = autograd(dy_TD, x_TD, gain_D, groups)
        result = backward(dy_TD, x_TD, gain_D, rstd_TG)
        torch.testing.assert_close(result, (dx_TD, dgain_D), rtol=1e-12, atol=1e-12)


def test_no_token_and_strided_gradients(norm_backward):
    gain_D = gaussian(10)
    for backward in (norm_backward, rms_norm_backward):
        dx_TD, dgain_D = backward(torch.zeros(0, 10), torch.zeros(0, 10), gain_D, torch.zeros(0, 1))
        assert dx_TD.shape == (0, 10)
        assert dgain_D.tolist() == [0.0] * 10
    dy_TD, x_TD = gaussian(10, 6, seed=4).T, gaussian(6, 10)
    expected = autograd(dy_TD, x_TD, gain_D)
    assert_close(norm_backward(dy_TD, x_TD, gain_D, expected[2].float()), expected, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy_TD": torch.ones(2, 5)}, r"dy of shape \[2, 5\]"),
        ({"gain_D": torch.ones(5)}, r"gain of shape \[5\]"),
        ({"rstd_T1": torch.ones(3, 1)}, r"rstd of shape \[3, 1\]"),
        ({"rstd_T1": torch.ones(2, 4)}, "groups=4"),
        ({"rstd_T1": torch.ones(2, 3)}, "use sub_norm_backward"),
        ({"residual_grad_TD": torch.ones(6)}, r"residual_grad \[6\]"),
    ],
)
def test_shapes_that_do_not_fit_raise(change, message):
    arguments = {
        "dy_TD": torch.ones(2, 6),
        "x_TD": torch.ones(2, 6),
        "gain_D": torch.ones(6),
        "rstd_T1": torch.ones(2, 1),
    }
    with pytest.raises(ValueError, match=message):
        rms_norm_backward(**{**arguments, **change})


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(("features", "groups"), [(4096, 1), (11008, 8), (11008, 1), (28672, 1)])
def test_rows_of_real_models_on_a_gpu(dtype, features, groups):
    """Many programs; the same bits on a second run."""
    dy_TD, x_TD = (gaussian(1000, features, seed=seed, dtype=dtype).cuda() for seed in (4, 3))
    gain_D, residual_TD = (1 + 0.3 * gaussian(features, seed=5)).cuda(), gaussian(1000, features, seed=6).cuda()
    expected = autograd(dy_TD, x_TD, gain_D, groups)
    result = sub_norm_backward(dy_TD, x_TD, gain_D, expected[2].float())
    torch.testing.assert_close(result[0].double(), expected[0], rtol=1.01 * STEP[dtype], atol=3e-6)
    torch.testing.assert_close(result[1].double(), expected[1], rtol=1e-5, atol=3e-4)
    assert all(map(torch.equal, result, sub_norm_backward(dy_TD, x_TD, gain_D, expected[2].float())))
    if groups == 1:
        dx_TD, _ = rms_norm_backward(dy_TD, x_TD, gain_D, expected[2].float(), residual_TD)
        torch.testing.assert_close(
            dx_TD.double(), expected[0] + residual_TD.double(), rtol=1.01 * STEP[dtype], atol=3e-6
        )

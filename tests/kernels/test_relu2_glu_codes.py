"""Backward of ReLU2-GLU with its result as e4m3 codes: what the separate steps give."""

# Shapes: T = tokens, F = features, E = experts, R = tokens sorted by expert.

import pytest
import torch

from bitmoe_kernels.grouped_ternary_gemm.reference import grouped_quantize_grad_reference
from bitmoe_kernels.relu2_glu import (
    relu2_glu_quantize,
    relu2_glu_quantize_backward,
    relu2_glu_quantize_backward_codes,
)
from bitmoe_kernels.ternary_gemm.reference import quantize_grad_reference

EPS = 1e-5
COUNTS = [None, [5, 0, 9, 0], [0, 1, 0, 13]]

each_counts = pytest.mark.parametrize("counts", COUNTS, ids=str)
with_or_without_gain = pytest.mark.parametrize("has_gain", [True, False], ids=["gain", "no gain"])


@pytest.fixture
def run_triton(triton_device, poison):
    """Triton's kernels with their arguments on the device under test; new memory holds garbage."""
    from bitmoe_kernels.relu2_glu import triton_backward

    def run(name, *arguments):
        return getattr(triton_backward, name)(*(None if x is None else x.to(triton_device) for x in arguments))

    return run


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> torch.Tensor:
    """The same standard normal tensor on every call with the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_case(num_tokens, num_features, counts, has_gain, dtype=torch.bfloat16):
    """Arguments of the backward, scales of the weights of gate and up, token scales; tokens of very different size."""
    expert_R = None
    if counts is not None:
        expert_R = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    experts = [] if counts is None else [len(counts)]
    gate_up = gaussian(num_tokens, 2 * num_features, dtype=dtype)
    gain = (1 + 0.3 * gaussian(*experts, num_features, seed=3)).to(dtype) if has_gain else None
    rstd_T1 = relu2_glu_quantize(gate_up, gain, EPS, "int8", 1, expert_R)[2]
    dy = gaussian(num_tokens, num_features, seed=5) * torch.logspace(-6, 1, num_tokens)[:, None]
    w_scale, x_scale = gaussian(*experts, 2, seed=6).abs() + 0.1, gaussian(num_tokens, 1, seed=7).abs() + 0.1
    return (dy.to(dtype), gate_up, gain, rstd_T1, expert_R), w_scale, x_scale


def separately_rounded(dgate_up, expert_R, counts, w_scale, x_scale):
    """The fields of the rounded gradient, by the references of the products' operators."""
    w_scale_EO = w_scale.view(-1, 2).repeat_interleave(dgate_up.shape[1] // 2, dim=1)
    if counts is None:
        return quantize_grad_reference(dgate_up, w_scale_EO[0], x_scale)
    return grouped_quantize_grad_reference(dgate_up, w_scale_EO, x_scale, torch.tensor(counts).cumsum(0).int())


@each_counts
@with_or_without_gain
@pytest.mark.parametrize("num_features", [20, 257, 800, 1100])
def test_kernel_gives_what_its_steps_give(run_triton, num_features, has_gain, counts):
    arguments, w_scale, x_scale = make_case(14, num_features, counts, has_gain)
    weight = None if counts is None else gaussian(14, 1, seed=8).abs()
    grad, *others = run_triton("relu2_glu_rounded_backward_triton", *arguments, w_scale.view(-1, 2), x_scale, weight)
    dy, gate_up, gain, rstd, expert_R = arguments
    experts = None if gain is None else expert_R
    dgate_up, *expected_others = run_triton(
        "relu2_glu_quantize_backward_triton", dy, gate_up, gain, rstd, experts, weight
    )
    expected = separately_rounded(dgate_up.cpu(), expert_R, counts, w_scale, x_scale)
    if not torch.cuda.is_available():
        for got, want in zip(grad, expected, strict=True):
            assert torch.equal(got.float(), want.float())
        assert [part is None for part in others] == [gain is None, weight is None]
        assert all(got is None or torch.equal(got, want) for got, want in zip(others, expected_others, strict=True))
        return
    # The compiler fuses multiplications and additions differently, so a few numbers are rounded the other way.
    assert (grad[0].cpu().float() != expected[0].float()).float().mean() < 2e-3
    torch.testing.assert_close(grad[1].cpu(), expected[1], rtol=1e-6, atol=0)
    assert torch.equal(grad[3].cpu(), expected[3])


@each_counts
@with_or_without_gain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_codes_are_the_gradients(dtype, has_gain, counts):
    arguments, w_scale, x_scale = make_case(14, 36, counts, has_gain, dtype)
    weight = gaussian(14, 1, seed=8).abs()
    grad, dgain, dweight = relu2_glu_quantize_backward_codes(*arguments[:4], w_scale, x_scale, arguments[4], weight)
    dgate_up, expected_dgain, expected_dweight = relu2_glu_quantize_backward(*arguments, weight)
    codes, scale, power, largest = grad
    w_scale_T2 = w_scale.expand(14, 2) if counts is None else w_scale[arguments[4].long()]
    dequantized = codes.float() * scale / w_scale_T2.repeat_interleave(36, dim=1)
    error = (dequantized - dgate_up.float()).norm(dim=1) / dgate_up.float().norm(dim=1)
    assert error.max() < 2**-4
    assert torch.equal(dgain, expected_dgain) if has_gain else dgain is None
    assert torch.equal(dweight, expected_dweight)
    torch.testing.assert_close(scale * x_scale, power, rtol=1e-6, atol=0)
    assert largest.max() == power.max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_token_that_is_not_finite_is_marked(run_triton, bad):
    arguments, w_scale, x_scale = make_case(14, 257, [5, 0, 9, 0], True)
    arguments[0][7, 30] = bad
    (codes, scale, power, largest), *_ = run_triton("relu2_glu_rounded_backward_triton", *arguments, w_scale, x_scale)
    assert scale.isnan().nonzero().tolist() == [[7, 0]]
    assert codes[7].float().abs().max() == 0
    assert power[7] == largest[2] == float("inf")
    assert largest[0].isfinite()
    assert largest[1] == largest[3] == 0


def test_no_token(run_triton):
    arguments, w_scale, x_scale = make_case(0, 20, [0, 0], True)
    (codes, scale, power, largest), dgain, _ = run_triton(
        "relu2_glu_rounded_backward_triton", *arguments, w_scale, x_scale
    )
    assert (codes.shape, scale.shape, power.shape) == ((0, 40), (0, 1), (0, 1))
    assert largest.tolist() == [0, 0]
    assert dgain.abs().max() == 0


def test_refusals():
    (dy, gate_up, gain, rstd, _), w_scale, x_scale = make_case(4, 20, None, True)
    with pytest.raises(ValueError, match="one group"):
        relu2_glu_quantize_backward_codes(dy, gate_up, gain, rstd.expand(-1, 2), w_scale, x_scale)
    with pytest.raises(ValueError, match=r"x_scale of shape \[3, 1\]"):
        relu2_glu_quantize_backward_codes(dy, gate_up, gain, rstd, w_scale, x_scale[:3])
    with pytest.raises(ValueError, match=r"w_scale has shape \[1\]: pass \[2\]"):
        relu2_glu_quantize_backward_codes(dy, gate_up, gain, rstd, w_scale[:1], x_scale)
    with pytest.raises(ValueError, match="gain and rstd come together"):
        relu2_glu_quantize_backward_codes(dy, gate_up, None, rstd, w_scale, x_scale)

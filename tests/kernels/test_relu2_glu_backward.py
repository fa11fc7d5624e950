"""Backward of ReLU2-GLU and sub-norm against fp64 autograd, which passes straight through every rounding.

Tolerance: half a unit in the last place of the output (its one rounding), and 2e-6 of the largest gradient for fp32
arithmetic, whose terms may cancel.
"""

# Shapes: T = tokens, F = features, G = groups, E = experts, R = tokens sorted by expert.

import pytest
import torch

from bitmoe_kernels.relu2_glu import relu2_glu_quantize, relu2_glu_quantize_backward
from bitmoe_kernels.relu2_glu.reference import relu2_glu_reference

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_size = pytest.mark.parametrize(
    ("num_tokens", "num_features", "groups"),
    [(1, 1, 1), (70, 20, 1), (5, 20, 4), (9, 100, 1), (3, 257, 1), (6, 1032, 4), (3, 1540, 1)],
)


@pytest.fixture
def run_triton(triton_device, poison):
    """Triton's kernels with their arguments on the device under test; new memory holds garbage."""
    from bitmoe_kernels.relu2_glu.triton_backward import relu2_glu_quantize_backward_triton

    def run(*arguments):
        return relu2_glu_quantize_backward_triton(*(None if x is None else x.to(triton_device) for x in arguments))

    return run


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> torch.Tensor:
    """The same standard normal tensor on every call with the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(num_tokens, num_features, dtype, groups=1, counts=None):
    """dy, gate_up, gain, the forward's rstd and experts with ``counts`` tokens; no experts without counts."""
    expert_R = None
    if counts is not None:
        expert_R = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    gate_up = gaussian(num_tokens, 2 * num_features, dtype=dtype)
    gain = (1 + 0.3 * gaussian(*([] if counts is None else [len(counts)]), num_features, seed=3)).to(dtype)
    rstd_TG = relu2_glu_quantize(gate_up, gain, EPS, "int8", groups, expert_R)[2]
    return gaussian(num_tokens, num_features, dtype=dtype, seed=5), gate_up, gain, rstd_TG, expert_R


def autograd(dy_TF, gate_up, gain, rstd_TG, expert_R, weight_T1=None):
    """Gradients of gate_up, gain and weight in fp64, at the very values that the forward rounded its steps to."""

    def with_value(x64, value):
        return x64 + (value.double() - x64).detach()

    gate_up64 = gate_up.double().requires_grad_()
    gate_TF, up_TF = gate_up64.chunk(2, dim=-1)
    h_TF = relu2_glu_reference(*gate_up.chunk(2, dim=-1))
    y_TF = with_value(gate_TF.relu() ** 2 * up_TF, h_TF)
    gain64 = None
    if gain is not None:
        y_TGd, gain64 = y_TF.unflatten(-1, (rstd_TG.shape[-1], -1)), gain.double().requires_grad_()
        unit_TF = (y_TGd * torch.rsqrt(y_TGd.square().mean(-1, keepdim=True) + EPS)).flatten(-2)
        h_TGd = h_TF.to(rstd_TG.dtype).unflatten(-1, (rstd_TG.shape[-1], -1))
        unit_value_TF = (h_TGd * rstd_TG[..., None]).flatten(-2)
        unit_TF = with_value(unit_TF, unit_value_TF.to(h_TF.dtype))
        y_TF = unit_TF * (gain64 if expert_R is None else gain64[expert_R.long()])
    weight64 = torch.ones(len(y_TF), 1).double() if weight_T1 is None else weight_T1.double()
    (y_TF * weight64.requires_grad_()).backward(dy_TF.double())
    return gate_up64.grad, None if gain64 is None else gain64.grad, None if weight_T1 is None else weight64.grad


def assert_rounded_once(got, want, dtype):
    assert got.dtype == dtype
    assert got.shape == want.shape
    rtol = 0.501 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), want, rtol=rtol, atol=2e-6 * want.abs().max().item())


def assert_gradients(result, arguments):
    dgate_up, *others = autograd(*arguments)
    assert_rounded_once(result[0], dgate_up, arguments[1].dtype)
    for got, want in zip(result[1:], others, strict=True):
        if want is None:
            assert got is None
        else:
            assert_rounded_once(got, want, torch.float32)


@each_dtype
@each_size
def test_reference_is_the_gradient(num_tokens, num_features, groups, dtype):
    arguments = inputs(num_tokens, num_features, dtype, groups)
    assert_gradients(relu2_glu_quantize_backward(*arguments), arguments)


@each_dtype
@each_size
def test_triton_is_the_gradient(run_triton, num_tokens, num_features, groups, dtype):
    arguments = inputs(num_tokens, num_features, dtype, groups)
    assert_gradients(run_triton(*arguments), arguments)


@each_dtype
def test_without_a_norm(run_triton, dtype):
    arguments = gaussian(37, 130, dtype=dtype), gaussian(37, 260, dtype=dtype, seed=2), None, None, None
    assert_gradients(run_triton(*arguments), arguments)
    assert_gradients(relu2_glu_quantize_backward(*arguments), arguments)


@each_dtype
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    "counts",
    [[0, 7, 37, 0, 0, 1, 0], [45], [0, 0, 45], [1] * 20 + [25], [16, 16, 0, 13], [15, 1, 0, 2, 27]],
    ids=str,
)
def test_experts(run_triton, counts, groups, dtype):
    """Blocks of 16 tokens with one expert and several, experts over several blocks, experts without tokens."""
    arguments = inputs(45, 20, dtype, groups, counts)
    result = run_triton(*arguments)
    assert_gradients(result, arguments)
    assert not result[1].cpu()[torch.tensor(counts) == 0].any()
    assert_gradients(relu2_glu_quantize_backward(*arguments), arguments)


@each_dtype
@pytest.mark.parametrize("has_gain", [True, False], ids=["gain", "no gain"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("counts", [None, [0, 7, 37, 0, 1]], ids=str)
def test_weights_of_tokens(run_triton, counts, groups, has_gain, dtype):
    """Some of them 0; without a norm a group is the row."""
    dy_TF, gate_up, gain, rstd_TG, expert_R = inputs(45, 36, dtype, groups, counts)
    weight_T1 = gaussian(45, 1, seed=8).relu()
    # What is rounded before the sum over features: u, which autograd has rounded, and the gradient has not.
    gate_up = gate_up if has_gain and dtype == torch.float32 else gate_up.sign().to(dtype)
    if has_gain:
        rstd_TG = relu2_glu_quantize(gate_up, gain, EPS, "int8", groups, expert_R)[2]
        arguments = dy_TF, gate_up, gain, rstd_TG, expert_R, weight_T1
    else:
        arguments = dy_TF, gate_up, None, None, None, weight_T1
    expected = autograd(*arguments)
    for result in (run_triton(*arguments), relu2_glu_quantize_backward(*arguments)):
        assert_rounded_once(result[0], expected[0], dtype)
        assert result[2].shape == (45, 1)
        # The gradient's y is not rounded; autograd's is.
        tolerance = torch.finfo(dtype).eps * (dy_TF.double() * 8).norm(dim=1, keepdim=True)
        assert ((result[2].cpu().double() - expected[2]).abs() <= tolerance + 1e-5).all()


def test_many_experts_in_long_blocks(run_triton, monkeypatch):
    """Blocks of several steps, that end amid a step at a block's and an expert's end."""
    monkeypatch.setattr("bitmoe_kernels.relu2_glu.triton_backward._WARPS_IN_FLIGHT", 4)
    arguments = inputs(21, 140, torch.bfloat16, 1, [0, 6, 0, 9, 1, 5])
    assert_gradients(run_triton(*arguments), arguments)


@each_dtype
def test_gains_and_gradients_of_another_type(run_triton, dtype):
    dy_TF, gate_up, gain, _, _ = inputs(6, 60, dtype)
    gain, dy_TF = gain.float() + 1e-4, dy_TF.float() + 1e-4
    rstd_TG = relu2_glu_quantize(gate_up, gain, EPS)[2]
    arguments = dy_TF, gate_up, gain, rstd_TG, None
    assert_gradients(run_triton(*arguments), arguments)
    assert_gradients(relu2_glu_quantize_backward(*arguments), arguments)


def test_fp64_stays_fp64():
    dy_TF, gate_up, gain, _, _ = (x if x is None else x.double() for x in inputs(4, 12, torch.float32))
    rstd_TG = relu2_glu_quantize(gate_up, gain, EPS, groups=3)[2]
    arguments = dy_TF, gate_up, gain, rstd_TG, None, gaussian(4, 1).double()
    for got, want in zip(relu2_glu_quantize_backward(*arguments), autograd(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_leading_dimensions_and_no_tokens(run_triton):
    dy_TF, gate_up, gain, rstd_TG, _ = inputs(6, 20, torch.bfloat16, 4)
    flat = run_triton(dy_TF, gate_up, gain, rstd_TG, None)
    deep = run_triton(*(x.unflatten(0, (2, 3)) for x in (dy_TF, gate_up)), gain, rstd_TG.unflatten(0, (2, 3)), None)
    assert torch.equal(deep[0].flatten(0, 1), flat[0])
    assert torch.equal(deep[1], flat[1])
    expert_R = torch.zeros(0, dtype=torch.int32)
    for arguments in (
        (dy_TF[:0], gate_up[:0], gain, rstd_TG[:0], None),
        (dy_TF[:0], gate_up[:0], gain.expand(3, -1), rstd_TG[:0], expert_R),
    ):
        for dgate_up, dgain, _ in (run_triton(*arguments), relu2_glu_quantize_backward(*arguments)):
            assert dgate_up.shape == (0, 40)
            assert torch.equal(dgain.cpu(), torch.zeros_like(arguments[2], dtype=torch.float32))


def test_a_nan_stays_in_its_row(run_triton):
    dy_TF, gate_up, gain, rstd_TG, _ = inputs(5, 20, torch.bfloat16)
    gate_up[2, 3] = rstd_TG[2] = torch.nan
    dgate_up, dgain, _ = run_triton(dy_TF, gate_up, gain, rstd_TG, None)
    assert dgate_up.isnan().any(dim=1).tolist() == [False, False, True, False, False]
    assert dgain.isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [None, 64])
@pytest.mark.parametrize(("num_features", "groups"), [(1408, 1), (5460, 1), (5504, 8), (11008, 1), (14336, 8)])
def test_public_function_on_a_gpu(num_features, groups, num_experts):
    """Rows of real models: the gradient, and the same bits in every run."""
    counts = None
    if num_experts:
        counts = torch.randint(0, 9, (num_experts,), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = inputs(sum(counts) if counts else 300, num_features, torch.bfloat16, groups, counts)
    on_gpu = [None if x is None else x.cuda() for x in arguments]
    result = relu2_glu_quantize_backward(*on_gpu)
    assert_gradients(result, arguments)
    for _ in range(3):
        again = relu2_glu_quantize_backward(*on_gpu)
        assert all(torch.equal(x, y) for x, y in zip(result[:2], again[:2], strict=True))

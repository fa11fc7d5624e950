"""ReLU2-GLU, sub-norm and quantizer in one: against the separate steps, Triton against the reference, bad input."""

# Shapes: T = tokens, F = features, G = groups, E = experts, R = tokens sorted by expert.

import math

import pytest
import torch

from bitmoe_kernels.act_quant import quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.norm_quant import sub_norm_quantize
from bitmoe_kernels.relu2_glu import relu2_glu, relu2_glu_quantize, relu2_glu_quantize_backward
from bitmoe_kernels.relu2_glu.reference import relu2_glu_quantize_reference

EPS = 1e-5
QUANTIZERS = {"int4": quantize_int4, "int8": quantize_int8, "fp4": quantize_fp4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_format = pytest.mark.parametrize("num_format", QUANTIZERS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def kernels(triton_device, poison):
    """The functions under test, imported when the interpreter has been chosen; new memory holds garbage."""
    from bitmoe_kernels.relu2_glu import triton_kernels

    return triton_kernels


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 9) -> torch.Tensor:
    """The same standard normal tensor on every call with the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gain(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gains around 1 that no dtype holds exactly."""
    return (1 + 0.3 * gaussian(*shape, seed=3)).to(dtype)


def assert_exact(result, expected):
    for got, want in zip(result, expected, strict=True):
        if want is None:
            assert got is None
            continue
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got.cpu().nan_to_num(nan=-1.0), want.cpu().nan_to_num(nan=-1.0))


def run_forward(kernels, device, gate_up, gain_F, num_format="int8", groups=1, expert_R=None, weight_T1=None):
    """Triton's kernel with its arguments on the device under test."""
    tensors = (gate_up, gain_F, expert_R, weight_T1)
    gate_up, gain_F, *others = (None if x is None else x.to(device) for x in tensors)
    return kernels.relu2_glu_quantize_triton(gate_up, gain_F, EPS, num_format, groups, *others)


def test_hand_values():
    """h = 2^2 * 3 and 1^2 * -4, mean square 80; gains 1 and 2 make -8 / rms the largest."""
    gate_up = torch.tensor([[2.0, 1.0, 3.0, -4.0]])
    codes, scale, rstd = relu2_glu_quantize(gate_up, torch.tensor([1.0, 2.0]), eps=0.0)
    assert rstd.item() == pytest.approx(1 / math.sqrt(80), rel=1e-6)
    assert scale.item() == pytest.approx(12 / math.sqrt(80) / 127, rel=1e-6)
    assert codes.tolist() == [[127, -85]]
    codes, scale, rstd = relu2_glu_quantize(gate_up, None, eps=0.0)
    assert (codes.tolist(), scale.item(), rstd) == ([[127, -42]], pytest.approx(12 / 127), None)


@each_format
@each_dtype
@pytest.mark.parametrize("groups", [1, 4])
def test_equals_the_separate_steps(num_format, dtype, groups):
    gate_up, gain_F = gaussian(3, 5, 2 * 36, dtype=dtype), gain(36, dtype=dtype)
    h_TF = relu2_glu(*gate_up.chunk(2, dim=-1))
    assert_exact(
        relu2_glu_quantize(gate_up, gain_F, EPS, num_format, groups),
        sub_norm_quantize(h_TF, gain_F, EPS, num_format, groups),
    )
    parts = zip(*(QUANTIZERS[num_format](h_Td) for h_Td in h_TF.chunk(groups, dim=-1)), strict=True)
    assert_exact(
        relu2_glu_quantize(gate_up, None, EPS, num_format, groups),
        [*(torch.cat(blocks, dim=-1) for blocks in parts), None],
    )


def test_each_expert_has_its_gain():
    gate_up, gain_EF = gaussian(9, 2 * 12, dtype=torch.bfloat16), gain(4, 12, dtype=torch.bfloat16)
    expert_R = torch.tensor([0] * 2 + [2] * 6 + [3], dtype=torch.int32)
    parts = [relu2_glu_quantize(gate_up[expert_R == e], gain_EF[e], EPS, groups=3) for e in range(4)]
    assert_exact(
        relu2_glu_quantize(gate_up, gain_EF, EPS, groups=3, expert_R=expert_R),
        [torch.cat(blocks) for blocks in zip(*parts, strict=True)],
    )


def test_fp64_input_computes_in_fp64():
    gate_up, gain_F = gaussian(3, 2 * 30).double() * (1 + 1e-12), gain(30).double()
    _, scale, rstd = relu2_glu_quantize(gate_up, gain_F, EPS)
    h_TF = gate_up[:, :30].clamp(min=0) ** 2 * gate_up[:, 30:]
    y_TF = torch.nn.functional.rms_norm(h_TF, [30], gain_F, EPS)
    torch.testing.assert_close(scale, y_TF.abs().amax(-1, True) / 127, rtol=1e-14, atol=0)
    torch.testing.assert_close(rstd, torch.rsqrt(h_TF.square().mean(-1, True) + EPS), rtol=1e-14, atol=0)


@each_format
@each_dtype
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3,), 1), ((70, 20), 1), ((5, 20), 4), ((2, 3, 100), 1), ((3, 257), 1), ((6, 1032), 4), ((2, 1540), 1)],
    ids=str,
)
def test_triton_equals_reference(kernels, triton_device, num_format, dtype, shape, groups):
    """With gains of the same type, of another one and without."""
    gate_up = gaussian(*shape[:-1], 2 * shape[-1], dtype=dtype) * 2
    for gain_F in (gain(shape[-1], dtype=dtype), gain(shape[-1], dtype=torch.float32), None):
        result = run_forward(kernels, triton_device, gate_up, gain_F, num_format, groups)
        assert_exact(result, relu2_glu_quantize_reference(gate_up, gain_F, EPS, num_format, groups, None))


@each_dtype
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("expert_dtype", [torch.int32, torch.int64], ids=str)
def test_triton_experts_equal_reference(kernels, triton_device, dtype, groups, expert_dtype):
    gate_up, gain_EF = gaussian(45, 2 * 140, dtype=dtype), gain(6, 140, dtype=dtype)
    expert_R = torch.tensor([1] * 7 + [2] * 37 + [4], dtype=expert_dtype)
    result = run_forward(kernels, triton_device, gate_up, gain_EF, "int8", groups, expert_R)
    assert_exact(result, relu2_glu_quantize_reference(gate_up, gain_EF, EPS, "int8", groups, expert_R))


@each_dtype
@pytest.mark.parametrize("groups", [1, 4])
def test_weights_multiply_the_scale(kernels, triton_device, dtype, groups):
    """And nothing else: codes and rstd are those without."""
    gate_up, gain_F, weight_T1 = gaussian(45, 2 * 140, dtype=dtype), gain(140, dtype=dtype), gaussian(45, 1).relu()
    expected = relu2_glu_quantize_reference(gate_up, gain_F, EPS, "int8", groups, None, weight_T1)
    assert_exact(run_forward(kernels, triton_device, gate_up, gain_F, "int8", groups, None, weight_T1), expected)
    codes, scale, rstd = relu2_glu_quantize(gate_up, gain_F, EPS, "int8", groups)
    assert_exact(relu2_glu_quantize(gate_up, gain_F, EPS, "int8", groups, None, weight_T1), expected)
    assert_exact(expected, (codes, scale * weight_T1, rstd))


def test_triton_reads_strided_input(kernels, triton_device):
    gate_up, gain_F = gaussian(6, 4 * 24, dtype=torch.bfloat16)[:, ::2], gain(48)[::2]
    result = run_forward(kernels, triton_device, gate_up, gain_F)
    assert_exact(result, relu2_glu_quantize_reference(gate_up, gain_F, EPS, "int8", 1, None))


@each_format
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["gate", "up", "up of a closed gate"])
def test_triton_marks_a_nonfinite_token(kernels, triton_device, num_format, bad, place):
    gate_up = gaussian(4, 2 * 20, dtype=torch.bfloat16)
    gate_up[1, 3], gate_up[1, 23] = (-1.0 if place == "up of a closed gate" else 1.0), 1.0
    gate_up[1, 3 if place == "gate" else 23], gate_up[2] = bad, 0
    for gain_F in (gain(20), None):
        result = run_forward(kernels, triton_device, gate_up, gain_F, num_format)
        assert result[1].isnan().flatten().tolist() == [False, True, False, False]
        assert not result[0][1:3].any()
        assert_exact(result, relu2_glu_quantize_reference(gate_up, gain_F, EPS, num_format, 1, None))


def test_no_tokens(kernels, triton_device):
    for gain_F in (gain(10), None):
        expected = relu2_glu_quantize(torch.zeros(2, 0, 20), gain_F, EPS, groups=5)
        assert [expected[0].shape, expected[1].shape] == [(2, 0, 10), (2, 0, 5)]
        assert_exact(run_forward(kernels, triton_device, torch.zeros(2, 0, 20), gain_F, groups=5), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relu2_glu_quantize(torch.ones(2, 6), torch.ones(4), EPS), r"gain of shape \[4\].* 3 features"),
        (lambda: relu2_glu_quantize(torch.ones(2, 6), torch.ones(2, 3), EPS), r"gain of shape \[2, 3\].*pass \[F\]"),
        (
            lambda: relu2_glu_quantize(torch.ones(2, 6), torch.ones(3), EPS, expert_R=torch.zeros(2, dtype=torch.int)),
            r"gain of shape \[3\].*pass \[E, F\]",
        ),
        (
            lambda: relu2_glu_quantize(torch.ones(2, 6), None, EPS, expert_R=torch.zeros(3, dtype=torch.int)),
            r"expert_R of shape \[3\]",
        ),
        (
            lambda: relu2_glu_quantize(torch.ones(2, 6), None, EPS, weight_T1=torch.ones(2)),
            r"weight of shape \[2\] .* \[2, 1\]",
        ),
        (lambda: relu2_glu_quantize(torch.ones(2, 5), None, EPS), "gate_up has 5 features"),
        (lambda: relu2_glu_quantize(torch.ones(2, 0), None, EPS), r"gate_up has shape \[2, 0\]"),
        (lambda: relu2_glu_quantize(torch.ones(2, 6), None, EPS, "int3"), "num_format='int3'"),
        (lambda: relu2_glu_quantize(torch.ones(2, 6), None, EPS, groups=2), "groups=2"),
        (lambda: relu2_glu_quantize(torch.tensor([[1.0, math.nan]]), None, EPS), "1 non-finite"),
        (lambda: relu2_glu_quantize(torch.tensor([[1.0, math.inf]]), torch.ones(1), EPS), "1 non-finite"),
        (
            lambda: relu2_glu_quantize_backward(torch.ones(2, 6), torch.ones(2, 6), None, None),
            r"dy has shape \[2, 6\].*pass \[2, 3\]",
        ),
        (
            lambda: relu2_glu_quantize_backward(torch.ones(2, 3), torch.ones(2, 6), torch.ones(3), None),
            "gain and rstd come together",
        ),
        (
            lambda: relu2_glu_quantize_backward(torch.ones(2, 3), torch.ones(2, 6), torch.ones(3), torch.ones(1, 1)),
            r"rstd of shape \[1, 1\]",
        ),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_raise():
    with pytest.raises(TypeError, match=r"gate_up must be .* torch\.int8"):
        relu2_glu_quantize(torch.ones(2, 2, dtype=torch.int8), None, EPS)
    with pytest.raises(TypeError, match="gain must be"):
        relu2_glu_quantize(torch.ones(2, 4), torch.ones(2, dtype=torch.int32), EPS)
    with pytest.raises(TypeError, match=r"expert_R is torch\.float32"):
        relu2_glu_quantize(torch.ones(2, 4), torch.ones(1, 2), EPS, expert_R=torch.zeros(2))
    with pytest.raises(TypeError, match="dy must be"):
        relu2_glu_quantize_backward(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 4), None, None)


@pytest.mark.gpu
@each_format
@each_dtype
@pytest.mark.parametrize("num_features", [1408, 5460, 5504, 11008, 14336])
def test_public_function_on_a_gpu_equals_cpu(num_format, dtype, num_features):
    """The rows of real models."""
    gate_up, gain_F = gaussian(64, 2 * num_features, dtype=dtype), gain(num_features, dtype=dtype)
    for groups in (1, 4):
        assert_exact(
            relu2_glu_quantize(gate_up.cuda(), gain_F.cuda(), EPS, num_format, groups),
            relu2_glu_quantize(gate_up, gain_F, EPS, num_format, groups),
        )

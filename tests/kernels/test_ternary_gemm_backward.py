"""The 8-bit backward: only dY is rounded, and by no more than its codes' precision; shapes, padding and NaN hold."""

import pytest
import torch

from bitmoe_kernels.dispatch import LONGEST_ROW
from bitmoe_kernels.ternary_gemm import QuantizedGrad, input_grad, quantize_grad, transpose_codes, weight_grad
from bitmoe_kernels.ternary_gemm.reference import (
    LARGEST_SHIFT,
    padded_length,
    quantize_grad_reference,
    shifted_columns_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT8 = torch.float8_e4m3fn
# Rounding to 4 significant bits moves a number by at most 1/16 of it, evenly spread by 1/16 / sqrt(3).
E4M3_ERROR = 2**-4 / 3**0.5


def random(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codes(*shape: int, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8).to(DEVICE)


def w_columns(w_OI: torch.Tensor) -> torch.Tensor:
    """Transposed e4m3 codes of weights, as ``weight_quant.ternary_operands`` writes them."""
    return transpose_codes(w_OI).to(FLOAT8)


def run_kernels(dy_TO, w_scale_O, x_scale_T1) -> QuantizedGrad:
    """Outputs of the Triton kernel."""
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_grad")
    return QuantizedGrad(*kernels.quantize_grad(dy_TO, w_scale_O, x_scale_T1, None))


def run_reference(dy_TO, w_scale_O, x_scale_T1) -> QuantizedGrad:
    return QuantizedGrad(*quantize_grad_reference(dy_TO, w_scale_O, x_scale_T1))


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(*(part.cpu().flatten().clone().view(torch.int8) for part in (x, y)))


def assert_same_bits(actual: QuantizedGrad, expected: QuantizedGrad) -> None:
    for name, x, y in zip(QuantizedGrad._fields, actual, expected, strict=True):
        assert (x is None) == (y is None), name
        assert x is None or same_bits(x, y), name


def make_case(tokens, outputs, dtype, fold_w_scale, with_x_scale):
    """dY of tokens of very different size, some of it zeros, and both scales or None for them."""
    dy = random(tokens, outputs) * torch.logspace(-12, 2, tokens, device=DEVICE)[:, None]
    dy[:, ::3] *= 1e-3
    dy[3:4] = 0
    w_scale = random(outputs, seed=6).abs() if fold_w_scale else None
    return dy.to(dtype), w_scale, random(tokens, 1, seed=7).abs() if with_x_scale else None


@pytest.mark.parametrize("with_x_scale", [False, True], ids=["", "x_scale"])
@pytest.mark.parametrize("fold_w_scale", [False, True], ids=["", "w_scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "outputs"), [(1, 1), (33, 47), (0, 8), (200, 130), (3, 2050)])
@pytest.mark.usefixtures("poison")
def test_kernel_has_the_references_bits(tokens, outputs, dtype, fold_w_scale, with_x_scale):
    case = make_case(tokens, outputs, dtype, fold_w_scale, with_x_scale)
    assert_same_bits(run_kernels(*case), run_reference(*case))


def test_kernel_rounds_ties_to_even_and_keeps_small_numbers():
    """Every half between two e4m3 numbers, normal and subnormal, and a little above and below."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(FLOAT8).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    around = torch.cat([halves, halves * (1 + 2**-20), halves * (1 - 2**-20), numbers])
    dy = torch.stack([around, -around]).to(DEVICE)
    for x_scale in (None, torch.ones(2, 1, device=DEVICE)):
        grad = run_kernels(dy, None, x_scale)
        assert torch.equal(grad.scale_T1, torch.ones(2, 1, device=DEVICE))
        assert same_bits(grad.codes_TO, dy.cpu().to(FLOAT8))


def test_scale_times_that_of_the_activations_is_the_least_power_of_2_that_holds_the_token():
    dy, x_scale = random(500, 40) * torch.logspace(-8, 3, 500, device=DEVICE)[:, None], random(500, 1).abs() + 1e-3
    grad = quantize_grad(dy, None, x_scale)
    mantissa, _ = torch.frexp(grad.power_T1)
    assert (mantissa == 0.5).all()
    torch.testing.assert_close(grad.scale_T1 * x_scale, grad.power_T1, rtol=1e-6, atol=0)
    largest_T = grad.codes_TO.float().abs().amax(1)
    assert 208 <= largest_T.min() <= largest_T.max() <= 448
    assert grad.largest_1.item() == grad.power_T1.max()


@pytest.mark.gpu
@pytest.mark.parametrize("with_x_scale", [False, True], ids=["", "x_scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "outputs"), [(1, 16), (2500, 300), (1030, 257), (70, 22016), (3, LONGEST_ROW + 8)])
def test_quantize_grad_on_gpu_has_the_references_bits(tokens, outputs, dtype, with_x_scale):
    dy = (random(tokens, outputs) * torch.logspace(-3, 2, tokens, device=DEVICE)[:, None]).to(dtype)
    w_scale, x_scale = random(outputs).abs(), random(tokens, 1).abs() if with_x_scale else None
    expected = run_reference(*(x if x is None else x.cpu() for x in (dy, w_scale, x_scale)))
    assert_same_bits(quantize_grad(dy, w_scale, x_scale), expected)


@pytest.mark.parametrize("with_x_scale", [False, True], ids=["", "x_scale"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_token_that_is_not_finite_is_marked_and_spoils_the_weight_gradient(bad, with_x_scale):
    dy = random(300, 20)
    dy[200, 5] = bad
    case = dy, None, torch.ones(300, 1, device=DEVICE) if with_x_scale else None
    for grad in (run_kernels(*case), run_reference(*case)):
        assert grad.scale_T1.isnan().nonzero().tolist() == [[200, 0]]
        assert grad.codes_TO[200].float().abs().max() == 0
        if with_x_scale:
            assert grad.largest_1.item() == float("inf")
            assert weight_grad(grad, codes(300, 16, low=-8, high=7).to(FLOAT8)).isnan().all()


@pytest.mark.parametrize(("tokens", "inputs"), [(1, 1), (33, 47), (300, 130), (0, 5)])
@pytest.mark.parametrize("lowest", [-14, -11])
def test_shifted_columns_have_the_references_bits_and_lose_nothing_within_15_bits(tokens, inputs, lowest):
    """Tiles that stay normal numbers change exponents alone."""
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_columns")
    x, exponent = codes(tokens, inputs, low=-8, high=7).to(FLOAT8), codes(tokens, 1, low=lowest, high=0)
    power, largest = torch.exp2(exponent.float()), torch.ones(1, device=DEVICE)
    columns = torch.full((inputs, padded_length(tokens)), 77, dtype=torch.int8, device=DEVICE).view(FLOAT8)
    kernels.transpose_codes(x, columns, power, largest)
    assert same_bits(columns, shifted_columns_reference(x, power, largest))
    assert torch.equal(columns.float().T[:tokens], x.float() * power * LARGEST_SHIFT)


@pytest.mark.gpu
def test_shifted_columns_on_gpu_have_the_references_bits():
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_columns")
    x, exponent = codes(3000, 1030, low=-12, high=12), codes(3000, 1, low=-25, high=0)
    # FP4's codes, of which 12 is the largest; tokens so small that rounding sets in.
    x = torch.where(x.abs() > 8, x.sign() * 12, x.clamp(-8, 8)).to(FLOAT8)
    power, largest = torch.exp2(exponent.float()), torch.ones(1, device=DEVICE)
    columns = torch.empty(1030, padded_length(3000), dtype=FLOAT8, device=DEVICE)
    kernels.transpose_codes(x, columns, power, largest)
    assert same_bits(columns, shifted_columns_reference(x.cpu(), power.cpu(), largest.cpu()))


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def expected_error(grad: QuantizedGrad, x_codes_TI: torch.Tensor) -> torch.Tensor:
    """Norm of the weight gradient's error if every code of dY is off by a share of its last place, independently."""
    # 4 significant bits: a last place is 1/8 to 1/16 of the number, and 2**-9 at least.
    magnitude_TO = grad.codes_TO.double().abs().clamp(min=2.0**-6)
    step_TO = grad.power_T1.double() * 2 ** (magnitude_TO.log2().floor() - 3)
    return (step_TO.square().T / 12 @ x_codes_TI.double().square()).sum().sqrt()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(300, 64, 96), (1100, 48, 33), (17, 90, 40)])
def test_gradients_agree_with_fp64(tokens, inputs, outputs):
    x, w = codes(tokens, inputs, low=-7, high=7), codes(outputs, inputs, low=-1, high=1)
    x_scale, w_scale = random(tokens, 1).abs() + 0.1, random(1).abs() + 0.1
    dy = random(tokens, outputs) * (random(tokens, 1, seed=6).abs() + 0.1)
    grad = quantize_grad(dy, None, x_scale)
    dx, dw = input_grad(grad, w_columns(w), w_scale), weight_grad(grad, x.to(FLOAT8))
    assert dx.dtype == dw.dtype == torch.bfloat16
    assert relative_error(dx, dy.double() @ (w.double() * w_scale.double())) < E4M3_ERROR
    true_dw = dy.double().T @ (x.double() * x_scale.double())
    assert (dw.double() - true_dw).norm() < 1.1 * expected_error(grad, x) + 2**-9 * true_dw.norm()


def test_weight_grad_of_tokens_of_very_different_size():
    """Tokens 2^-20 the size of others: their part is lost little by little, and the whole stays as accurate."""
    x, dy = codes(600, 64, low=-8, high=7), random(600, 48) * torch.logspace(-6, 0, 600, device=DEVICE)[:, None]
    x_scale = random(600, 1, seed=8).abs() + 0.1
    dw = weight_grad(quantize_grad(dy, None, x_scale), x.to(FLOAT8))
    assert relative_error(dw, dy.double().T @ (x.double() * x_scale.double())) < E4M3_ERROR


@pytest.mark.parametrize("groups", [2, 3])
def test_input_grad_scales_groups_of_inputs(groups):
    w, w_scale, dy = codes(40, 24, low=-1, high=1), random(groups).abs() + 0.1, random(9, 40)
    dx = input_grad(quantize_grad(dy), w_columns(w), w_scale)
    assert relative_error(dx, dy.double() @ w.double() * w_scale.double().repeat_interleave(24 // groups)) < E4M3_ERROR


def test_input_grad_folds_a_scale_per_output():
    w, w_scale, dy = codes(40, 24, low=-1, high=1), random(40).abs() + 0.1, random(9, 40)
    dx = input_grad(quantize_grad(dy, w_scale), w_columns(w))
    assert relative_error(dx, dy.double() @ (w.double() * w_scale.double()[:, None])) < E4M3_ERROR


def test_gradients_without_the_scale_that_was_folded():
    x, w, w_scale = codes(90, 24, low=-8, high=7), codes(40, 24, low=-1, high=1), random(40).abs() + 0.1
    dy, x_scale = random(90, 40), random(90, 1).abs() + 0.1
    grad = quantize_grad(dy, w_scale, x_scale)
    assert relative_error(input_grad(grad, w_columns(w)), dy.double() @ (w.double() * w_scale[:, None])) < E4M3_ERROR
    true_dw = dy.double().T @ (x.double() * x_scale.double())
    assert relative_error(weight_grad(grad, x.to(FLOAT8), w_scale), true_dw) < E4M3_ERROR


def test_no_token_gives_no_gradient():
    grad = quantize_grad(random(0, 32), None, random(0, 1))
    assert input_grad(grad, codes(16, 32, low=-1, high=1).to(FLOAT8)).shape == (0, 16)
    dw = weight_grad(grad, torch.empty(0, 16, dtype=FLOAT8, device=DEVICE))
    assert dw.shape == (32, 16)
    assert dw.abs().max() == 0


def test_backward_refuses():
    dy, ones = random(4, 8), torch.ones(4, 1, device=DEVICE)
    with pytest.raises(TypeError, match="dy must be a floating-point tensor"):
        quantize_grad(dy.long())
    with pytest.raises(ValueError, match=r"must be \[T, O\]"):
        quantize_grad(dy[None])
    with pytest.raises(ValueError, match=r"must be \[4, 1\]: it needs one group"):
        quantize_grad(dy, None, ones.expand(4, 2))
    with pytest.raises(ValueError, match="one value for each of 8"):
        quantize_grad(dy, torch.ones(1, device=DEVICE))
    grad = quantize_grad(dy, None, ones)
    with pytest.raises(TypeError, match="must all be int8 or all float8_e4m3fn"):
        input_grad(grad, codes(16, 8, low=-1, high=1))
    with pytest.raises(ValueError, match=r"must be \[I, O\] with O = 8"):
        input_grad(grad, codes(16, 9, low=-1, high=1).to(FLOAT8))
    x_codes = codes(3, 32, low=-8, high=7)
    with pytest.raises(ValueError, match=r"must be \[4, I\]"):
        weight_grad(grad, x_codes.to(FLOAT8))
    with pytest.raises(TypeError, match="must all be int8 or all float8_e4m3fn"):
        weight_grad(grad, x_codes)
    with pytest.raises(ValueError, match="pass x_scale to quantize_grad"):
        weight_grad(quantize_grad(dy), x_codes.to(FLOAT8))

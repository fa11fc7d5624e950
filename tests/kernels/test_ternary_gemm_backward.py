"""The 8-bit backward: only dY is rounded, and by no more than its codes' precision; shapes, padding and NaN hold."""

import pytest
import torch

from bitmoe_kernels.dispatch import LONGEST_ROW
from bitmoe_kernels.ternary_gemm import QuantizedGrad, input_grad, quantize_grad, transpose_codes, weight_grad
from bitmoe_kernels.ternary_gemm.reference import (
    padded_length,
    quantize_columns_reference,
    quantize_rows_reference,
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


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), 0x7F, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)


def run_kernels(dy_TO, w_scale_O, x_scale_T1) -> QuantizedGrad:
    """Outputs of the Triton kernels from poisoned memory: rows alone where there is no ``x_scale_T1``."""
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_grad")
    tokens, outputs = dy_TO.shape
    rows = poisoned(tokens, outputs, dtype=FLOAT8), poisoned(tokens, 1, dtype=torch.float32)
    if x_scale_T1 is None:
        kernels.quantize_rows(dy_TO, w_scale_O, None, *rows)
        return QuantizedGrad(*rows)
    columns = poisoned(outputs, padded_length(tokens), dtype=FLOAT8), poisoned(outputs, 1, dtype=torch.float32)
    kernels.quantize_rows_and_columns(dy_TO, w_scale_O, x_scale_T1, *rows, *columns)
    return QuantizedGrad(*rows, *columns)


def run_reference(dy_TO, w_scale_O, x_scale_T1) -> QuantizedGrad:
    columns = () if x_scale_T1 is None else quantize_columns_reference(dy_TO, x_scale_T1)
    return QuantizedGrad(*quantize_rows_reference(dy_TO, w_scale_O), *columns)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.int8).cpu(), y.contiguous().view(torch.int8).cpu())


def assert_same_bits(actual: QuantizedGrad, expected: QuantizedGrad) -> None:
    for name, x, y in zip(QuantizedGrad._fields, actual, expected, strict=True):
        assert (x is None) == (y is None), name
        assert x is None or same_bits(x, y), name


def make_case(tokens, outputs, dtype, fold_w_scale, with_columns):
    """dY of tokens of very different size, some of it zeros, and both scales or None for them."""
    dy = random(tokens, outputs) * torch.logspace(-12, 2, tokens, device=DEVICE)[:, None]
    dy[:, ::3] *= 1e-3
    dy[3:4] = 0
    w_scale = random(outputs, seed=6).abs() if fold_w_scale else None
    return dy.to(dtype), w_scale, random(tokens, 1, seed=7).abs() if with_columns else None


@pytest.mark.parametrize("with_columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("fold_w_scale", [False, True], ids=["", "w_scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "outputs"), [(1, 1), (33, 47), (0, 8), (200, 130), (3, 2050)])
def test_kernels_have_the_references_bits(tokens, outputs, dtype, fold_w_scale, with_columns):
    case = make_case(tokens, outputs, dtype, fold_w_scale, with_columns)
    assert_same_bits(run_kernels(*case), run_reference(*case))


def test_kernels_round_ties_to_even_and_keep_small_numbers():
    """Every half between two e4m3 numbers, normal and subnormal, and a little above and below."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(FLOAT8).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    around = torch.cat([halves, halves * (1 + 2**-20), halves * (1 - 2**-20), numbers])
    dy = torch.stack([around, -around]).to(DEVICE)
    case = dy, None, torch.ones(2, 1, device=DEVICE)
    for grad in (run_kernels(dy, None, None), run_kernels(*case)):
        assert torch.equal(grad.row_scale_T1, torch.ones(2, 1, device=DEVICE))
        assert same_bits(grad.rows_TO, dy.cpu().to(FLOAT8))
    assert_same_bits(run_kernels(*case), run_reference(*case))


@pytest.mark.gpu
@pytest.mark.parametrize("with_columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "outputs"), [(1, 16), (2500, 300), (1030, 257), (70, 22016), (3, LONGEST_ROW + 8)])
def test_quantize_grad_on_gpu_has_the_references_bits(tokens, outputs, dtype, with_columns):
    dy = (random(tokens, outputs) * torch.logspace(-3, 2, tokens, device=DEVICE)[:, None]).to(dtype)
    w_scale, x_scale = random(outputs).abs(), random(tokens, 1).abs() if with_columns else None
    expected = run_reference(*(x if x is None else x.cpu() for x in (dy, w_scale, x_scale)))
    assert_same_bits(quantize_grad(dy, w_scale, x_scale), expected)


@pytest.mark.parametrize("with_columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_quantize_grad_marks_what_is_not_finite(bad, with_columns):
    dy = random(300, 20)
    dy[200, 5] = bad
    case = dy, None, torch.ones(300, 1, device=DEVICE) if with_columns else None
    for grad in (run_kernels(*case), run_reference(*case)):
        assert grad.row_scale_T1.isnan().nonzero().tolist() == [[200, 0]]
        assert grad.rows_TO[200].float().abs().max() == 0
        if with_columns:
            assert grad.column_scale_O1.isnan().nonzero().tolist() == [[5, 0]]
            assert grad.columns_OP[5].float().abs().max() == 0


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def expected_error(grad: QuantizedGrad, x_codes_TI: torch.Tensor) -> torch.Tensor:
    """Norm of the weight gradient's error if every code of dY is off by a share of its last place, independently."""
    # 4 significant bits: a last place is 1/8 to 1/16 of the number, and 2**-9 at least.
    magnitude_OT = grad.columns_OP[:, : len(x_codes_TI)].double().abs().clamp(min=2.0**-6)
    step_OT = grad.column_scale_O1.double() * 2 ** (magnitude_OT.log2().floor() - 3)
    return (step_OT.square() / 12 @ x_codes_TI.double().square()).sum().sqrt()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(300, 64, 96), (1100, 48, 33), (17, 90, 40)])
def test_gradients_agree_with_fp64(tokens, inputs, outputs):
    x, w = codes(tokens, inputs, low=-7, high=7), codes(outputs, inputs, low=-1, high=1)
    x_scale, w_scale = random(tokens, 1).abs() + 0.1, random(1).abs() + 0.1
    dy = random(tokens, outputs) * (random(tokens, 1, seed=6).abs() + 0.1)
    grad = quantize_grad(dy, None, x_scale)
    dx, dw = input_grad(grad, w_columns(w), w_scale), weight_grad(grad, transpose_codes(x.to(FLOAT8)))
    assert dx.dtype == dw.dtype == torch.bfloat16
    assert relative_error(dx, dy.double() @ (w.double() * w_scale.double())) < E4M3_ERROR
    true_dw = dy.double().T @ (x.double() * x_scale.double())
    assert (dw.double() - true_dw).norm() < 1.1 * expected_error(grad, x) + 2**-9 * true_dw.norm()


@pytest.mark.parametrize("groups", [2, 3])
def test_input_grad_scales_groups_of_inputs(groups):
    w, w_scale, dy = codes(40, 24, low=-1, high=1), random(groups).abs() + 0.1, random(9, 40)
    dx = input_grad(quantize_grad(dy), w_columns(w), w_scale)
    assert relative_error(dx, dy.double() @ w.double() * w_scale.double().repeat_interleave(24 // groups)) < E4M3_ERROR


def test_input_grad_folds_a_scale_per_output():
    w, w_scale, dy = codes(40, 24, low=-1, high=1), random(40).abs() + 0.1, random(9, 40)
    dx = input_grad(quantize_grad(dy, w_scale), w_columns(w))
    assert relative_error(dx, dy.double() @ (w.double() * w_scale.double()[:, None])) < E4M3_ERROR


def test_rows_are_the_same_with_columns():
    dy, w_scale = random(40, 24), random(24).abs()
    rows, both = quantize_grad(dy, w_scale), quantize_grad(dy, w_scale, random(40, 1).abs())
    assert_same_bits(QuantizedGrad(*both[:2]), rows)


def test_no_token_gives_no_gradient():
    grad = quantize_grad(random(0, 32), None, random(0, 1))
    assert input_grad(grad, codes(16, 32, low=-1, high=1).to(FLOAT8)).shape == (0, 16)
    dw = weight_grad(grad, torch.empty(16, 0, dtype=FLOAT8, device=DEVICE))
    assert dw.shape == (32, 16)
    assert dw.abs().max() == 0


def test_backward_refuses():
    dy, ones = random(4, 8), torch.ones(4, 1, device=DEVICE)
    with pytest.raises(TypeError, match="dy must be a floating-point tensor"):
        quantize_grad(dy.long())
    with pytest.raises(ValueError, match=r"must be \[T, O\]"):
        quantize_grad(dy[None])
    with pytest.raises(ValueError, match=r"must be \[4, 1\]: columns need one group"):
        quantize_grad(dy, None, ones.expand(4, 2))
    with pytest.raises(ValueError, match="one value for each of 8"):
        quantize_grad(dy, torch.ones(1, device=DEVICE))
    grad = quantize_grad(dy, None, ones)
    with pytest.raises(TypeError, match="must all be int8 or all float8_e4m3fn"):
        input_grad(grad, codes(16, 8, low=-1, high=1))
    with pytest.raises(ValueError, match=r"must be \[I, O\] with O = 8"):
        input_grad(grad, codes(16, 9, low=-1, high=1).to(FLOAT8))
    x_codes = codes(16, 32, low=-8, high=7)
    with pytest.raises(ValueError, match=r"must be \[I, 16\]"):
        weight_grad(grad, x_codes.to(FLOAT8))
    with pytest.raises(TypeError, match="must all be int8 or all float8_e4m3fn"):
        weight_grad(grad, x_codes)
    with pytest.raises(ValueError, match="rounded by row only"):
        weight_grad(quantize_grad(dy), x_codes.to(FLOAT8))

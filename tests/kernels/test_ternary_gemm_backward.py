"""The 8-bit backward: only dY is rounded, and by no more than its codes' precision; shapes, padding and NaN hold."""

import pytest
import torch

from bitmoe_kernels.ternary_gemm import input_grad, k_major_codes, quantize_grad, weight_grad
from bitmoe_kernels.ternary_gemm.backward import INT8_BLOCK_TOKENS
from bitmoe_kernels.ternary_gemm.reference import (
    LEVELS,
    MIN_ABSMAX,
    padded_length,
    quantize_grad_reference,
    weight_grad_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT8 = torch.float8_e4m3fn
TILE_TOKENS = 128
# Rounding to 4 significant bits moves a number by at most 1/16 of it, evenly spread by 1/16 / sqrt(3).
E4M3_ERROR = 2**-4 / 3**0.5


def random(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codes(*shape: int, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8).to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), 0x7F, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)


def run_kernel(dy_TO, x_scale_TG, w_scale_O, column_dtype, block_tokens):
    """Outputs of the Triton kernels, as ``quantize_grad_reference`` returns them, from poisoned memory."""
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_kernels")
    (tokens, outputs), groups = dy_TO.shape, x_scale_TG.shape[1]
    out = (
        poisoned(tokens, outputs, dtype=FLOAT8),
        poisoned(tokens, 1, dtype=torch.float32),
        poisoned(groups, outputs, padded_length(tokens), dtype=column_dtype),
        poisoned(groups, outputs, -(-tokens // block_tokens), dtype=torch.float32),
    )
    levels = (LEVELS[FLOAT8], LEVELS[column_dtype])
    kernels.quantize_grad(dy_TO, x_scale_TG, w_scale_O, block_tokens, MIN_ABSMAX, levels, *out)
    return out


def assert_same_bits(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x.contiguous().view(torch.int8), y.contiguous().view(torch.int8))


@pytest.mark.parametrize(("tokens", "outputs"), [(1, 1), (33, 47), (0, 8), (200, 130)])
@pytest.mark.parametrize("fold_w_scale", [False, True])
def test_quantize_grad_kernel_of_e4m3_numbers_is_exact(tokens, outputs, fold_w_scale):
    # Numbers that need no rounding: the interpreter rounds to e4m3 wrongly (it cuts off, and drops the carry).
    grid = torch.tensor([0, 0.25, 0.3125, -1, 1.875, -7.5, 52, 240, -448], device=DEVICE)
    dy = grid[codes(tokens, outputs, low=0, high=8).long()]
    dy[:, :1], dy[:1] = 448, 448
    power_T1 = 2.0 ** codes(tokens, 1, low=-9, high=9)
    w_scale = 2.0 ** -codes(outputs, low=0, high=3).float() if fold_w_scale else None
    if fold_w_scale:
        w_scale[0] = 1
    args = (dy * power_T1, 0.125 / power_T1, w_scale, FLOAT8, max(padded_length(tokens), 1))
    actual = run_kernel(*args)
    assert_same_bits(actual, quantize_grad_reference(*args))
    rows = dy if w_scale is None else dy * w_scale
    assert torch.equal(actual[0].float() * actual[1], rows * power_T1)
    assert torch.equal(actual[2][0, :, :tokens].float().T * actual[3][0].T, dy * 0.125)


@pytest.mark.parametrize(("tokens", "outputs", "groups"), [(1, 1, 1), (33, 47, 3), (300, 20, 1), (256, 17, 2)])
def test_quantize_grad_kernel_rounds_to_int8_like_the_reference(tokens, outputs, groups):
    dy = random(tokens, outputs) * torch.logspace(-12, 2, tokens, device=DEVICE)[:, None]
    args = (dy, random(tokens, groups).abs(), None, torch.int8, TILE_TOKENS)
    actual, expected = run_kernel(*args), quantize_grad_reference(*args)
    assert_same_bits(actual[1:], expected[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("column_dtype", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "groups"), [(1, 16, 1), (2500, 300, 1), (1030, 257, 4)])
def test_quantize_grad_on_gpu_has_the_references_bits(tokens, outputs, groups, dtype, column_dtype):
    dy = (random(tokens, outputs) * torch.logspace(-6, 2, tokens, device=DEVICE)[:, None]).to(dtype)
    x_scale, w_scale = random(tokens, groups).abs(), random(outputs).abs()
    grad = quantize_grad(dy, x_scale, w_scale, column_dtype)
    expected = quantize_grad_reference(dy.cpu(), x_scale.cpu(), w_scale.cpu(), column_dtype, grad.block_tokens)
    assert_same_bits([x.cpu() for x in grad[:4]], expected)


@pytest.mark.parametrize("column_dtype", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_quantize_grad_marks_what_is_not_finite(column_dtype, bad):
    dy = random(300, 20)
    dy[200, 5] = bad
    args = (
        dy,
        torch.ones(300, 1, device=DEVICE),
        None,
        column_dtype,
        TILE_TOKENS if column_dtype == torch.int8 else 304,
    )
    for rows, row_scale, columns, column_scale in (run_kernel(*args), quantize_grad_reference(*args)):
        assert row_scale.isnan().nonzero().tolist() == [[200, 0]]
        assert column_scale[0].isnan().nonzero().tolist() == [[5, 1 if column_dtype == torch.int8 else 0]]
        assert rows[200].float().abs().max() == 0
        assert columns[0, 5, 128:256].float().abs().max() == 0


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def expected_error(grad, x_codes_TI: torch.Tensor) -> torch.Tensor:
    """Norm of the weight gradient's error if every code of dY is off by a share of its last place, independently."""
    num_tokens, num_groups = len(x_codes_TI), len(grad.columns_GOP)
    step_GOT = grad.column_scale_GOC.repeat_interleave(grad.block_tokens, 2)[:, :, :num_tokens].double()
    if grad.columns_GOP.dtype == FLOAT8:
        # 4 significant bits: a last place is 1/8 to 1/16 of the number, and 2**-9 at least.
        magnitude = grad.columns_GOP[:, :, :num_tokens].double().abs().clamp(min=2.0**-6)
        step_GOT = step_GOT * 2 ** (magnitude.log2().floor() - 3)
    x_square_GTi = x_codes_TI.double().square().unflatten(1, (num_groups, -1)).transpose(0, 1)
    return (step_GOT.square() / 12 @ x_square_GTi).sum().sqrt()


@pytest.mark.parametrize("column_dtype", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "groups"), [(300, 64, 96, 1), (1100, 48, 33, 3), (17, 90, 40, 2)]
)
def test_gradients_agree_with_fp64(tokens, inputs, outputs, groups, column_dtype):
    high = 7 if column_dtype == FLOAT8 else 127
    x, w = codes(tokens, inputs, low=-high, high=high), codes(outputs, inputs, low=-1, high=1)
    x_scale, w_scale = random(tokens, groups).abs() + 0.1, random(groups).abs() + 0.1
    dy = random(tokens, outputs) * (random(tokens, 1, seed=6).abs() + 0.1)
    _, x_columns = k_major_codes(x, torch.int8, column_dtype)
    _, w_columns = k_major_codes(w, torch.int8, FLOAT8)
    grad = quantize_grad(dy, x_scale, None, column_dtype)
    dx, dw = input_grad(grad, w_columns, w_scale), weight_grad(grad, x_columns)
    x_dq = x.double().unflatten(1, (groups, -1)) * x_scale.double()[:, :, None]
    w_dq = w.double().unflatten(1, (groups, -1)) * w_scale.double()[:, None]
    assert dx.dtype == dw.dtype == torch.bfloat16
    assert relative_error(dx, dy.double() @ w_dq.flatten(1)) < E4M3_ERROR
    true_dw = dy.double().T @ x_dq.flatten(1)
    assert (dw.double() - true_dw).norm() < 1.1 * expected_error(grad, x) + 2**-9 * true_dw.norm()


def test_input_grad_folds_a_scale_per_output():
    w, w_scale, dy = codes(40, 24, low=-1, high=1), random(40).abs() + 0.1, random(9, 40)
    _, w_columns = k_major_codes(w, torch.int8, FLOAT8)
    dx = input_grad(quantize_grad(dy, torch.ones(9, 1, device=DEVICE), w_scale), w_columns)
    assert relative_error(dx, dy.double() @ (w.double() * w_scale.double()[:, None])) < E4M3_ERROR


def test_weight_grad_of_int8_is_exact_for_exact_codes():
    tokens = INT8_BLOCK_TOKENS + 40
    dy, x = codes(tokens, 20, low=-127, high=127).float(), codes(tokens, 24, low=-128, high=127)
    dy[0], dy[INT8_BLOCK_TOKENS] = 127, 127
    grad = quantize_grad(dy, torch.ones(tokens, 1, device=DEVICE), None, torch.int8)
    dw = weight_grad(grad, k_major_codes(x, torch.int8, torch.int8)[1])
    assert torch.equal(dw, (dy.double().T @ x.double()).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "groups"), [(2500, 640, 300, 1), (1030, 528, 256, 4)])
def test_weight_grad_of_int8_on_gpu_has_the_references_bits(tokens, inputs, outputs, groups):
    grad = quantize_grad(random(tokens, outputs), random(tokens, groups).abs(), None, torch.int8)
    x_columns = k_major_codes(codes(tokens, inputs, low=-128, high=127), torch.int8, torch.int8)[1]
    expected = weight_grad_reference(
        grad.columns_GOP.cpu(), grad.column_scale_GOC.cpu(), grad.block_tokens, x_columns.cpu()
    )
    assert torch.equal(weight_grad(grad, x_columns).cpu(), expected)


@pytest.mark.parametrize("column_dtype", [torch.int8, FLOAT8], ids=str)
def test_no_token_gives_no_gradient(column_dtype):
    grad = quantize_grad(random(0, 32), random(0, 2), None, column_dtype)
    assert input_grad(grad, codes(16, 32, low=-1, high=1).to(FLOAT8)).shape == (0, 16)
    dw = weight_grad(grad, torch.empty(16, 0, dtype=column_dtype, device=DEVICE))
    assert dw.shape == (32, 16)
    assert dw.abs().max() == 0


def test_backward_refuses():
    dy, ones = random(4, 8), torch.ones(4, 1, device=DEVICE)
    with pytest.raises(TypeError, match="column_dtype must be int8 or float8_e4m3fn"):
        quantize_grad(dy, ones, None, torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be \[T, O\] and \[T, groups\]"):
        quantize_grad(dy, ones[:3])
    with pytest.raises(ValueError, match="one value for each of 8"):
        quantize_grad(dy, ones, torch.ones(1, device=DEVICE))
    grad = quantize_grad(dy, ones)
    with pytest.raises(TypeError, match="must all be int8 or all float8_e4m3fn"):
        input_grad(grad, codes(16, 8, low=-1, high=1))
    with pytest.raises(ValueError, match=r"must be \[I, O\] with O = 8"):
        input_grad(grad, codes(16, 9, low=-1, high=1).to(FLOAT8))
    with pytest.raises(ValueError, match=r"must be \[I, 16\]"):
        weight_grad(grad, codes(16, 32, low=-8, high=7).to(FLOAT8))

"""The weight gradient of INT8 codes: dY is rounded to INT8 by output and chunk of tokens, and nothing else."""

# Shapes: T = tokens, R = rows sorted by expert, E = experts, O = outputs, I = inputs, C = chunks.

import pytest
import torch

from bitmoe_kernels.grouped_ternary_gemm import grouped_int8_weight_grad
from bitmoe_kernels.grouped_ternary_gemm.reference import (
    expert_slices,
    grouped_int8_outer_reference,
    grouped_quantize_columns_reference,
    padded_ends_reference,
    padded_rows,
)
from bitmoe_kernels.ternary_gemm import int8_weight_grad
from bitmoe_kernels.ternary_gemm.reference import (
    CHUNK,
    int8_outer_reference,
    padded_length,
    quantize_columns_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest of 256 normal numbers (3) times scales of 0.5 to 1.5, and of the largest alone among 256.
NORMAL_ERROR, WORST_ERROR = 4 / 127 / 12**0.5, 256**0.5 / 127 / 12**0.5
# Triton's interpreter cuts bf16 off where a GPU rounds.
RESULT_ERROR = {torch.bfloat16: 2**-8, torch.float32: 1e-6}
COUNTS = [[17, 0, 300, 1], [0, 0, 512], [256, 3, 40, 700], [0, 0]]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def random(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codes(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)


def scales(num_rows: int) -> torch.Tensor:
    return torch.rand(num_rows, 1, generator=torch.Generator().manual_seed(7)).to(DEVICE) + 0.5


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int().to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), 0x7F, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def make_dy(num_rows: int, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, some of it zeros."""
    dy = random(num_rows, outputs) * torch.logspace(-4, 1, max(num_rows, 1), device=DEVICE)[:num_rows, None]
    dy[:, ::5] = 0
    return dy.to(dtype)


@DTYPES
@pytest.mark.parametrize("outputs", [70, 128])
@pytest.mark.parametrize("tokens", [1, 15, 256, 300, 600])
def test_columns_have_the_references_bits(tokens, outputs, dtype):
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_grad_columns")
    dy, x_scale = make_dy(tokens, outputs, dtype), random(tokens, 1, seed=6).abs()
    columns, scale = quantize_columns_reference(dy, x_scale)
    found_columns, found_scale = poisoned(*columns.shape, dtype=torch.int8), poisoned(*scale.shape, dtype=scale.dtype)
    kernels.quantize_columns(dy, x_scale, found_columns, found_scale)
    assert columns.shape == (outputs, padded_length(tokens))
    assert columns.max() == 127
    assert torch.equal(found_columns, columns)
    assert torch.equal(found_scale, scale)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_columns_of_experts_have_the_references_bits(counts):
    """Of rows, and of rows that have the gradient of a token."""
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_grad_columns")
    from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import row_tiles

    # Two rows past the last expert's, which nobody may read.
    num_rows, ends_E = sum(counts) + 2, ends(counts)
    dy, x_scale = make_dy(num_rows, 70, torch.bfloat16), random(num_rows, 1, seed=6).abs()
    dy[-2:] = float("nan")
    num_columns = padded_rows(num_rows, len(counts), CHUNK)
    tiles = row_tiles(ends_E, num_columns, CHUNK, padding=CHUNK)
    end = int(tiles.padded_ends_E[-1])
    expected = grouped_quantize_columns_reference(dy, x_scale, ends_E)
    source_R = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    for source, given in ((None, dy), (source_R, dy[source_R.argsort()].contiguous())):
        columns = poisoned(70, num_columns, dtype=torch.int8)
        scale = poisoned(num_columns // CHUNK, 70, dtype=torch.float32)
        kernels.quantize_columns(given, x_scale, columns, scale, tiles, source)
        assert torch.equal(columns[:, :end], expected[0][:, :end])
        assert torch.equal(scale[: end // CHUNK], expected[1][: end // CHUNK])
        assert (columns[:, end:] == 0x7F).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (20, 33), (136, 140)])
@pytest.mark.parametrize("tokens", [16, 256, 528])
def test_outer_adds_what_its_codes_say(tokens, inputs, outputs, dtype):
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_outer")
    dy, x, scale = codes(outputs, tokens), codes(inputs, tokens), random(-(-tokens // CHUNK), outputs).abs()
    dw = poisoned(1, outputs, inputs, dtype=dtype)
    kernels.outer(dy, scale, x, None, dw)
    assert relative_error(dw[0], int8_outer_reference(dy, scale, x).double()) < RESULT_ERROR[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (20, 33), (64, 140)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_outer_adds_each_experts_rows(counts, inputs, outputs, dtype):
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_outer")
    # What follows the last expert's columns is not zero: no expert may read it.
    num_columns = padded_rows(sum(counts), len(counts), CHUNK)
    dy, x, scale = codes(outputs, num_columns), codes(inputs, num_columns), random(num_columns // CHUNK, outputs).abs()
    padded_ends_E = padded_ends_reference(ends(counts), CHUNK)
    dw = poisoned(len(counts), outputs, inputs, dtype=dtype)
    kernels.outer(dy, scale, x, padded_ends_E, dw)
    for found, truth in zip(dw, grouped_int8_outer_reference(dy, scale, x, padded_ends_E), strict=True):
        assert relative_error(found, truth.double()) < RESULT_ERROR[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 100, 700])
def test_gradient_agrees_with_fp64(tokens, dtype):
    dy, x, x_scale = random(tokens, 70).to(dtype), codes(tokens, 40), scales(tokens)
    dw = int8_weight_grad(dy, x, x_scale.to(torch.promote_types(dtype, torch.float32)))
    truth = dy.double().T @ (x.double() * x_scale.double())
    assert (dw.dtype, dw.shape) == (dtype, truth.shape)
    assert relative_error(dw, truth) < NORMAL_ERROR
    # One token's largest codes are exact.
    assert tokens == 1 or relative_error(dw, truth) > 1e-3


def test_one_token_among_small_ones():
    """The worst case: what others are rounded by is a part of the largest, in each chunk."""
    dy, x, x_scale = random(1024, 64) * 1e-2, codes(1024, 40), torch.ones(1024, 1, device=DEVICE)
    dy[::256] *= 100
    dw, truth = int8_weight_grad(dy, x, x_scale), dy.double().T @ x.double()
    assert relative_error(dw, truth) < WORST_ERROR
    assert torch.cosine_similarity(dw.double().flatten(), truth.flatten(), 0) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("counts", COUNTS[:3], ids=str)
def test_experts_gradients_agree_with_fp64(counts, dtype):
    """Of rows, and of rows that have the gradient of a token: the same."""
    num_rows, generator = sum(counts), torch.Generator().manual_seed(0)
    dy_TO, x, x_scale = random(90, 70).to(dtype), codes(num_rows, 40), scales(num_rows)
    source_R = torch.randint(90, (num_rows,), generator=generator).int().to(DEVICE)
    dy_RO = dy_TO[source_R.long()]
    dw = grouped_int8_weight_grad(dy_RO, x, x_scale, ends(counts))
    assert torch.equal(grouped_int8_weight_grad(dy_TO, x, x_scale, ends(counts), source_R=source_R), dw)
    assert (dw.dtype, dw.shape) == (dtype, (len(counts), 70, 40))
    for expert, rows in enumerate(expert_slices(ends(counts))):
        truth = dy_RO[rows].double().T @ (x[rows].double() * x_scale[rows].double())
        assert relative_error(dw[expert], truth) < NORMAL_ERROR if counts[expert] else not dw[expert].any()


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")], ids=str)
def test_what_is_not_finite_spoils_its_output_only(bad):
    """As it does in a product of dY itself."""
    dy, x, x_scale = random(300, 20), codes(300, 16), torch.ones(300, 1, device=DEVICE)
    dy[280, 5] = bad
    dw = int8_weight_grad(dy, x, x_scale)
    assert dw.isnan().all(1).nonzero().flatten().tolist() == [5]
    assert dw.isnan().any(1).sum() == 1
    dw = grouped_int8_weight_grad(dy, x, x_scale, ends([100, 0, 200]))
    assert dw.isnan().any(2).nonzero().tolist() == [[2, 5]]


def test_zeros_and_no_rows_give_zeros():
    one = torch.ones(40, 1, device=DEVICE)
    assert not int8_weight_grad(torch.zeros(40, 8, device=DEVICE), codes(40, 16), one).any()
    none = random(0, 8), codes(0, 16), one[:0]
    assert torch.equal(int8_weight_grad(*none), torch.zeros(8, 16, device=DEVICE))
    assert torch.equal(grouped_int8_weight_grad(*none, ends([0, 0, 0])), torch.zeros(3, 8, 16, device=DEVICE))


def test_refuses():
    dy, x, one, end = random(4, 8), codes(4, 16), torch.ones(4, 1, device=DEVICE), ends([1, 3])
    for function in (int8_weight_grad, lambda *args: grouped_int8_weight_grad(*args, end)):
        with pytest.raises(TypeError, match="dy must be a floating-point tensor"):
            function(dy.long(), x, one)
        with pytest.raises(TypeError, match="x_codes must be int8, got torch.float32"):
            function(dy, x.float(), one)
        with pytest.raises(ValueError, match=r"x_codes of shape \[3, 16\] must be \[4, I\]"):
            function(dy, x[:3], one)
        with pytest.raises(ValueError, match=r"must be .*\[[4R], 1\]"):
            function(dy, x, one.expand(4, 2))
    with pytest.raises(TypeError, match="ends must be int32"):
        grouped_int8_weight_grad(dy, x, one, end.long())
    with pytest.raises(ValueError, match=r"x_codes of shape \[4, 16\] must be \[6, I\]"):
        grouped_int8_weight_grad(dy, x, one, end, source_R=torch.zeros(6, dtype=torch.int32, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(2000, 5504, 2048), (777, 100, 300)])
def test_on_gpu_as_on_cpu(tokens, inputs, outputs):
    dy, x, x_scale = random(tokens, outputs).bfloat16(), codes(tokens, inputs), random(tokens, 1).abs()
    expected = int8_weight_grad(dy.cpu(), x.cpu(), x_scale.cpu()).double()
    assert relative_error(int8_weight_grad(dy, x, x_scale).cpu(), expected) < 2e-3
    end = ends([300, 0, 77, tokens - 377])
    expected = grouped_int8_weight_grad(dy.cpu(), x.cpu(), x_scale.cpu(), end.cpu()).double()
    assert relative_error(grouped_int8_weight_grad(dy, x, x_scale, end).cpu(), expected) < 2e-3

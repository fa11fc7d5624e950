"""The 8-bit backward of routed experts: only dY is rounded, each expert by itself, and empty experts get zeros."""

import pytest
import torch

from bitmoe_kernels.grouped_ternary_gemm import (
    GroupedQuantizedGrad,
    float8_matmul,
    grouped_input_grad,
    grouped_quantize_grad,
    grouped_transpose_codes,
    grouped_weight_grad,
)
from bitmoe_kernels.grouped_ternary_gemm.reference import (
    expert_slices,
    grouped_quantize_columns_reference,
    grouped_quantize_rows_reference,
    grouped_weight_grad_reference,
    padded_ends_reference,
    padded_rows,
)
from bitmoe_kernels.ternary_gemm import transpose_codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
FLOAT8 = torch.float8_e4m3fn
# Rounding to 4 significant bits moves a number by at most 1/16 of it, evenly spread by 1/16 / sqrt(3).
E4M3_ERROR = 2**-4 / 3**0.5
COUNTS = [[17, 0, 32, 1], [0, 0, 50, 0], [0, 3, 40, 7]]


def random(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def codes(*shape: int, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8).to(DEVICE)


def w_columns(w_EOI: torch.Tensor) -> torch.Tensor:
    """Transposed e4m3 codes of weights, as ``weight_quant.ternary_operands`` writes them."""
    return torch.stack([transpose_codes(w_OI) for w_OI in w_EOI]).to(FLOAT8)


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int().to(DEVICE)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), 0x7F, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.int8).cpu(), y.contiguous().view(torch.int8).cpu())


def run_kernels(dy, ends_E, w_scale, x_scale) -> GroupedQuantizedGrad:
    """Outputs of the Triton kernels from poisoned memory: rows alone where there is no ``x_scale``."""
    kernels = pytest.importorskip("bitmoe_kernels.grouped_ternary_gemm.triton_codes")
    (num_rows, outputs), experts = dy.shape, len(ends_E)
    rows = poisoned(num_rows, outputs, dtype=FLOAT8), poisoned(num_rows, 1, dtype=torch.float32)
    if x_scale is None:
        from bitmoe_kernels.ternary_gemm import triton_grad

        triton_grad.quantize_rows(dy, w_scale, ends_E, *rows)
        return GroupedQuantizedGrad(*rows)
    columns = (
        poisoned(outputs, padded_rows(num_rows, experts), dtype=FLOAT8),
        poisoned(experts, outputs, dtype=torch.float32),
    )
    tiles = kernels.grouped_quantize_rows_and_columns(dy, w_scale, x_scale, ends_E, *rows, *columns)
    return GroupedQuantizedGrad(*rows, *columns, tiles.padded_ends_E)


def run_reference(dy, ends_E, w_scale, x_scale) -> GroupedQuantizedGrad:
    columns = () if x_scale is None else grouped_quantize_columns_reference(dy, x_scale, ends_E)
    return GroupedQuantizedGrad(*grouped_quantize_rows_reference(dy, w_scale, ends_E), *columns)


def assert_same_defined_bits(actual: GroupedQuantizedGrad, expected: GroupedQuantizedGrad, num_rows: int) -> None:
    """All that belongs to an expert has the bits of the reference; the rest is as it was."""
    parts = [(actual.rows_RO, expected.rows_RO, num_rows), (actual.row_scale_R1, expected.row_scale_R1, num_rows)]
    assert (actual.columns_OP is None) == (expected.columns_OP is None)
    if actual.columns_OP is not None:
        assert torch.equal(actual.padded_ends_E.cpu(), expected.padded_ends_E.cpu())
        parts.append((actual.columns_OP.T, expected.columns_OP.T, int(actual.padded_ends_E[-1])))
        assert same_bits(actual.column_scale_EO, expected.column_scale_EO)
    for part, truth, end in parts:
        assert same_bits(part[:end], truth[:end])
        assert (part[end:].contiguous().view(torch.int8) == 0x7F).all()


@pytest.mark.parametrize("with_columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("fold_w_scale", [False, True], ids=["", "w_scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("counts", [*COUNTS, [0, 0], [200, 0, 1, 260]], ids=str)
def test_kernels_have_the_references_bits(counts, dtype, fold_w_scale, with_columns):
    # Two rows past the last expert's, which nobody may read or write.
    num_rows, outputs = sum(counts) + 2, 140
    dy = random(num_rows, outputs) * torch.logspace(-12, 2, num_rows, device=DEVICE)[:, None]
    dy[-2:] = float("nan")
    w_scale = random(len(counts), outputs, seed=6).abs() if fold_w_scale else None
    x_scale = random(num_rows, 1, seed=7).abs() if with_columns else None
    case = dy.to(dtype), ends(counts), w_scale, x_scale
    assert_same_defined_bits(run_kernels(*case), run_reference(*case), sum(counts))


@pytest.mark.gpu
@pytest.mark.parametrize("with_columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("outputs", [300, 2816])
def test_quantize_grad_on_gpu_has_the_references_bits(outputs, dtype, with_columns):
    counts = [0, 1700, 3, 2000, 0, 33]
    num_rows = sum(counts)
    dy = (random(num_rows, outputs) * torch.logspace(-6, 2, num_rows, device=DEVICE)[:, None]).to(dtype)
    w_scale, x_scale = random(len(counts), outputs).abs(), random(num_rows, 1).abs() if with_columns else None
    grad = grouped_quantize_grad(dy, ends(counts), w_scale, x_scale)
    expected = run_reference(*(x if x is None else x.cpu() for x in (dy, ends(counts), w_scale, x_scale)))
    assert same_bits(grad.rows_RO, expected.rows_RO)
    assert same_bits(grad.row_scale_R1, expected.row_scale_R1)
    if with_columns:
        end = int(expected.padded_ends_E[-1])
        assert same_bits(grad.columns_OP[:, :end], expected.columns_OP[:, :end])
        assert same_bits(grad.column_scale_EO, expected.column_scale_EO)


@pytest.mark.parametrize("with_columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")], ids=str)
def test_quantize_grad_marks_what_is_not_finite_in_its_expert_only(bad, with_columns):
    counts, dy = [10, 0, 200], random(210, 20)
    dy[160, 5] = bad
    case = dy, ends(counts), None, torch.ones(210, 1, device=DEVICE) if with_columns else None
    for grad in (run_kernels(*case), run_reference(*case)):
        assert grad.row_scale_R1.isnan().nonzero().tolist() == [[160, 0]]
        assert grad.rows_RO[160].float().abs().max() == 0
        if with_columns:
            assert grad.column_scale_EO.isnan().nonzero().tolist() == [[2, 5]]
            assert grad.columns_OP[5, 32 : 32 + 200].float().abs().max() == 0
            assert grad.columns_OP[5, :10].float().abs().max() > 0


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 40), (20, 33)])
@pytest.mark.parametrize("counts", [*COUNTS, [0, 300, 0, 5]], ids=str)
def test_grouped_outer_adds_what_its_codes_say(counts, inputs, outputs):
    kernels = pytest.importorskip("bitmoe_kernels.grouped_ternary_gemm.triton_kernels")
    # What follows the last expert's columns is not zero: no expert may read it.
    num_columns = padded_rows(sum(counts), 4)
    columns, x = (codes(size, num_columns, low=-8, high=7).to(FLOAT8) for size in (outputs, inputs))
    args = columns, random(4, outputs).abs(), x, padded_ends_reference(ends(counts))
    dw = poisoned(4, outputs, inputs, dtype=torch.float32)
    kernels.grouped_outer(*args, dw, tile=TILE)
    assert torch.equal(dw.bfloat16(), grouped_weight_grad_reference(*args))


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


def cosine(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.double() * truth).sum() / x.double().norm() / truth.norm())


@pytest.mark.parametrize(("inputs", "outputs"), [(48, 40), (20, 33)])
@pytest.mark.parametrize("counts", [*COUNTS, [600, 0, 30, 0]], ids=str)
def test_gradients_agree_with_fp64_autograd(counts, inputs, outputs):
    num_rows = sum(counts)
    x, w = codes(num_rows, inputs, low=-7, high=7), codes(4, outputs, inputs, low=-1, high=1)
    x_scale, w_scale = random(num_rows, 1).abs() + 0.1, random(4, 1).abs() + 0.1
    dy = random(num_rows, outputs) * (random(num_rows, 1, seed=6).abs() + 0.1)
    grad = grouped_quantize_grad(dy, ends(counts), None, x_scale)
    dx = grouped_input_grad(grad, w_columns(w), w_scale, ends(counts))
    dw = grouped_weight_grad(grad, grouped_transpose_codes(x.to(FLOAT8), ends(counts)))
    assert dx.dtype == dw.dtype == torch.bfloat16

    x_dq = (x.double() * x_scale.double()).requires_grad_()
    w_dq = (w.double() * w_scale.double()[:, :, None]).requires_grad_()
    for expert, rows in enumerate(expert_slices(ends(counts))):
        (x_dq[rows] @ w_dq[expert].T).backward(dy[rows].double())
    assert relative_error(dx, x_dq.grad) < E4M3_ERROR
    assert relative_error(dw, w_dq.grad) < E4M3_ERROR
    assert min(cosine(dx, x_dq.grad), cosine(dw, w_dq.grad)) > 0.999
    for expert, count in enumerate(counts):
        assert count or dw[expert].abs().max() == 0


def test_products_are_those_of_the_rounded_operands():
    counts = [17, 0, 32, 1]
    x, w = codes(50, 64, low=-7, high=7), codes(4, 40, 64, low=-1, high=1)
    w_scale = random(4, 2).abs() + 0.1
    grad = grouped_quantize_grad(random(50, 40), ends(counts), None, random(50, 1).abs() + 0.1)
    dx = grouped_input_grad(grad, w_columns(w), w_scale, ends(counts))
    dw = grouped_weight_grad(grad, grouped_transpose_codes(x.to(FLOAT8), ends(counts)))
    rows_dq = grad.rows_RO.double() * grad.row_scale_R1
    w_dq = (w.double().unflatten(2, (2, -1)) * w_scale[:, None, :, None]).flatten(2)
    for expert, (rows, padded) in enumerate(
        zip(expert_slices(ends(counts)), expert_slices(grad.padded_ends_E), strict=True)
    ):
        torch.testing.assert_close(dx[rows].double(), rows_dq[rows] @ w_dq[expert], rtol=2**-8, atol=1e-3)
        columns = grad.columns_OP[:, padded][:, : rows.stop - rows.start].double()
        expected = columns @ x[rows].double() * grad.column_scale_EO[expert, :, None]
        torch.testing.assert_close(dw[expert].double(), expected, rtol=2**-8, atol=1e-3)


def test_input_grad_folds_a_scale_per_output():
    counts, w, w_scale = [5, 0, 4], codes(3, 40, 24, low=-1, high=1), random(3, 40).abs() + 0.1
    dy = random(9, 40)
    dx = grouped_input_grad(grouped_quantize_grad(dy, ends(counts), w_scale), w_columns(w), None, ends(counts))
    for expert, rows in enumerate(expert_slices(ends(counts))):
        truth = dy[rows].double() @ (w[expert].double() * w_scale[expert, :, None])
        assert relative_error(dx[rows], truth) < E4M3_ERROR or counts[expert] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float8_backends_agree_on_gpu(monkeypatch, backend):
    for product in ("input_grad", "weight_grad"):
        monkeypatch.setitem(float8_matmul.BACKENDS, product, backend)
    counts = [0, 700, 3, 321]
    x, w = codes(1024, 528, low=-7, high=7), codes(4, 272, 528, low=-1, high=1)
    x_scale, w_scale = random(1024, 1).abs() + 0.1, random(4, 1).abs() + 0.1
    grad = grouped_quantize_grad(random(1024, 272), ends(counts), None, x_scale)
    x_columns = grouped_transpose_codes(x.to(FLOAT8), ends(counts))
    for fast_accum in (False, True):
        dx = grouped_input_grad(grad, w_columns(w), w_scale, ends(counts), fast_accum=fast_accum)
        dw = grouped_weight_grad(grad, x_columns, fast_accum=fast_accum)
        on_cpu = GroupedQuantizedGrad(*(field.cpu() for field in grad))
        true_dx = grouped_input_grad(on_cpu, w_columns(w).cpu(), w_scale.cpu(), ends(counts).cpu())
        # bf16 has 8 significant bits; sums in the tensor cores lose one more where 700 rows are added.
        limit = 2**-7 if fast_accum else 2**-8
        assert relative_error(dx.cpu(), true_dx.double()) < limit
        assert relative_error(dw.cpu(), grouped_weight_grad(on_cpu, x_columns.cpu()).double()) < limit
        assert dw[0].abs().max() == 0


def test_no_row_gives_no_gradient():
    none = ends([0, 0, 0])
    grad = grouped_quantize_grad(random(0, 32), none, None, random(0, 1))
    assert grouped_input_grad(grad, codes(3, 16, 32, low=-1, high=1).to(FLOAT8), None, none).shape == (0, 16)
    dw = grouped_weight_grad(grad, grouped_transpose_codes(codes(0, 16, low=0, high=1).to(FLOAT8), none))
    assert dw.shape == (3, 32, 16)
    assert dw.abs().max() == 0


def test_backward_refuses():
    dy, ones, end = random(4, 8), torch.ones(4, 1, device=DEVICE), ends([1, 3])
    with pytest.raises(TypeError, match="ends must be int32"):
        grouped_quantize_grad(dy, end.long())
    with pytest.raises(TypeError, match="dy must be a floating-point tensor"):
        grouped_quantize_grad(dy.long(), end)
    with pytest.raises(ValueError, match=r"must be \[R, O\]"):
        grouped_quantize_grad(dy[None], end)
    with pytest.raises(ValueError, match=r"must be \[4, 1\]: columns need one group"):
        grouped_quantize_grad(dy, end, None, ones[:3])
    with pytest.raises(ValueError, match=r"it must be \[2, 8\]"):
        grouped_quantize_grad(dy, end, torch.ones(8, device=DEVICE))
    grad = grouped_quantize_grad(dy, end, None, ones)
    with pytest.raises(TypeError, match="w_codes must be float8_e4m3fn"):
        grouped_input_grad(grad, codes(2, 16, 16, low=-1, high=1), None, end)
    with pytest.raises(ValueError, match=r"must be \[2, I, 16\]"):
        grouped_input_grad(grad, codes(2, 16, 8, low=-1, high=1).to(FLOAT8), None, end)
    with pytest.raises(ValueError, match=r"must be \[2, groups\]"):
        grouped_input_grad(grad, codes(2, 16, 16, low=-1, high=1).to(FLOAT8), ones, end)
    with pytest.raises(TypeError, match="x_codes must be float8_e4m3fn"):
        grouped_weight_grad(grad, codes(16, 48, low=-1, high=1))
    with pytest.raises(ValueError, match=r"must be \[I, 48\]"):
        grouped_weight_grad(grad, codes(16, 32, low=-1, high=1).to(FLOAT8))
    with pytest.raises(ValueError, match="rounded by row only"):
        grouped_weight_grad(grouped_quantize_grad(dy, end), codes(16, 48, low=-1, high=1).to(FLOAT8))

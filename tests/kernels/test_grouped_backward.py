"""The 8-bit backward of routed experts: only dY is rounded, each expert by itself, and empty experts get zeros."""

import pytest
import torch

from bitmoe_kernels.grouped_ternary_gemm import (
    GroupedQuantizedGrad,
    float8_matmul,
    grouped_input_grad,
    grouped_quantize_grad,
    grouped_quantize_token_grad,
    grouped_weight_grad,
)
from bitmoe_kernels.grouped_ternary_gemm.reference import (
    expert_slices,
    grouped_quantize_grad_reference,
    grouped_shifted_columns_reference,
    grouped_transpose_codes_reference,
    grouped_weight_grad_reference,
    padded_ends_reference,
    padded_rows,
)
from bitmoe_kernels.ternary_gemm import quantize_grad, transpose_codes

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
    if x.shape != y.shape or x.dtype.itemsize != y.dtype.itemsize:
        return False
    return torch.equal(*(part.cpu().flatten().clone().view(torch.int8) for part in (x, y)))


def run_kernel(dy, ends_E, w_scale, x_scale) -> GroupedQuantizedGrad:
    """Outputs of the Triton kernel."""
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_grad")
    return GroupedQuantizedGrad(*kernels.quantize_grad(dy, w_scale, x_scale, ends_E))


def run_reference(dy, ends_E, w_scale, x_scale) -> GroupedQuantizedGrad:
    return GroupedQuantizedGrad(*grouped_quantize_grad_reference(dy, w_scale, x_scale, ends_E))


def assert_same_defined_bits(actual: GroupedQuantizedGrad, expected: GroupedQuantizedGrad, num_rows: int) -> None:
    """All that belongs to an expert has the bits of the reference."""
    for name, part, truth in zip(GroupedQuantizedGrad._fields, actual, expected, strict=True):
        assert (part is None) == (truth is None), name
        end = None if name == "largest_E" else num_rows
        assert part is None or same_bits(part[:end], truth[:end]), name


@pytest.mark.parametrize("with_x_scale", [False, True], ids=["", "x_scale"])
@pytest.mark.parametrize("fold_w_scale", [False, True], ids=["", "w_scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("counts", [*COUNTS, [0, 0], [200, 0, 1, 260]], ids=str)
@pytest.mark.usefixtures("poison")
def test_kernel_has_the_references_bits(counts, dtype, fold_w_scale, with_x_scale):
    # Two rows past the last expert's, which nobody may read or write.
    num_rows, outputs = sum(counts) + 2, 140
    dy = random(num_rows, outputs) * torch.logspace(-12, 2, num_rows, device=DEVICE)[:, None]
    dy[-2:] = float("nan")
    w_scale = random(len(counts), outputs, seed=6).abs() if fold_w_scale else None
    x_scale = random(num_rows, 1, seed=7).abs() if with_x_scale else None
    case = dy.to(dtype), ends(counts), w_scale, x_scale
    grad = run_kernel(*case)
    assert_same_defined_bits(grad, run_reference(*case), sum(counts))
    if not torch.cuda.is_available():  # Where memory is poisoned.
        assert (grad.codes_RO[-2:].view(torch.int8) == -77).all()
        assert (grad.scale_R1[-2:] == 12345).all()


@pytest.mark.gpu
@pytest.mark.parametrize("with_x_scale", [False, True], ids=["", "x_scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("outputs", [300, 2816])
def test_quantize_grad_on_gpu_has_the_references_bits(outputs, dtype, with_x_scale):
    counts = [0, 1700, 3, 2000, 0, 33]
    num_rows = sum(counts)
    dy = (random(num_rows, outputs) * torch.logspace(-6, 2, num_rows, device=DEVICE)[:, None]).to(dtype)
    w_scale, x_scale = random(len(counts), outputs).abs(), random(num_rows, 1).abs() if with_x_scale else None
    grad = grouped_quantize_grad(dy, ends(counts), w_scale, x_scale)
    expected = run_reference(*(x if x is None else x.cpu() for x in (dy, ends(counts), w_scale, x_scale)))
    assert_same_defined_bits(grad, expected, num_rows)


@pytest.mark.parametrize("with_x_scale", [False, True], ids=["", "x_scale"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")], ids=str)
def test_a_row_that_is_not_finite_spoils_its_experts_weight_gradient_only(bad, with_x_scale):
    counts, dy = [10, 0, 200], random(210, 20)
    dy[160, 5] = bad
    case = dy, ends(counts), None, torch.ones(210, 1, device=DEVICE) if with_x_scale else None
    for grad in (run_kernel(*case), run_reference(*case)):
        assert grad.scale_R1.isnan().nonzero().tolist() == [[160, 0]]
        assert grad.codes_RO[160].float().abs().max() == 0
        if with_x_scale:
            x = codes(210, 16, low=-8, high=7).to(FLOAT8)
            dw = grouped_weight_grad(grad, x, None, ends(counts))
            assert dw[2].isnan().all()
            assert dw[0].abs().max() > 0
            assert dw[1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("counts", [*COUNTS, [0, 0], [200, 0, 1, 260]], ids=str)
def test_transposing_kernel_has_the_references_bits(counts, dtype):
    kernels = pytest.importorskip("bitmoe_kernels.grouped_ternary_gemm.triton_codes")
    from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import row_tiles

    num_rows, ends_E = sum(counts), ends(counts)
    x, num_columns = codes(num_rows + 2, 140, low=-8, high=7).to(dtype), padded_rows(num_rows + 2, len(counts))
    power, largest = torch.exp2(codes(num_rows + 2, 1, low=-9, high=0).float()), (torch.tensor(counts) > 0).float()
    tiles = row_tiles(ends_E, num_columns, 128, padding=128)
    end = int(tiles.padded_ends_E[-1])
    plain = grouped_transpose_codes_reference(x, ends_E)
    cases = {(): plain}
    if dtype == FLOAT8:
        cases[power, largest.to(DEVICE)] = grouped_shifted_columns_reference(x, power, largest, ends_E)
    source_R = torch.randperm(num_rows + 2, generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    tokens = x.view(torch.int8)[source_R.argsort()].contiguous()
    for powers, expected in cases.items():
        for source, given in ((None, x.view(torch.int8)), (source_R, tokens)):
            columns = torch.full((140, num_columns), 77, dtype=torch.int8, device=DEVICE)
            kernels.grouped_transpose_codes(given, tiles, columns, *(powers or (None, None)), source)
            assert same_bits(columns[:, :end], expected[:, :end])
            assert (columns[:, end:] == 77).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 40), (20, 33)])
@pytest.mark.parametrize("counts", [*COUNTS, [0, 300, 0, 5]], ids=str)
def test_grouped_outer_adds_what_its_codes_say(counts, inputs, outputs):
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_outer")
    # What follows the last expert's columns is not zero: no expert may read it.
    num_columns = padded_rows(sum(counts), 4)
    columns, x = (codes(size, num_columns, low=-8, high=7).to(FLOAT8) for size in (outputs, inputs))
    args = columns, random(4, outputs).abs(), x, padded_ends_reference(ends(counts))
    dw = poisoned(4, outputs, inputs, dtype=torch.float32)
    kernels.outer(*args, dw, tile=TILE)
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
    dw = grouped_weight_grad(grad, x.to(FLOAT8), None, ends(counts))
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
    w_scale, x_scale = random(4, 2).abs() + 0.1, random(50, 1).abs() + 0.1
    grad = grouped_quantize_grad(random(50, 40), ends(counts), None, x_scale)
    dx = grouped_input_grad(grad, w_columns(w), w_scale, ends(counts), fast_accum=False)
    dw = grouped_weight_grad(grad, x.to(FLOAT8), None, ends(counts), fast_accum=False)
    dy_dq = grad.codes_RO.double() * grad.scale_R1
    w_dq = (w.double().unflatten(2, (2, -1)) * w_scale[:, None, :, None]).flatten(2)
    for expert, rows in enumerate(expert_slices(ends(counts))):
        if counts[expert]:
            assert relative_error(dx[rows], dy_dq[rows] @ w_dq[expert]) < 2**-8
            assert relative_error(dw[expert], dy_dq[rows].T @ (x[rows].double() * x_scale[rows])) < 2**-8


def test_gradients_with_a_folded_scale_per_output():
    counts, w, w_scale = [50, 0, 40], codes(3, 40, 24, low=-1, high=1), random(3, 40).abs() + 0.1
    dy, x, x_scale = random(90, 40), codes(90, 16, low=-8, high=7), random(90, 1).abs() + 0.1
    grad = grouped_quantize_grad(dy, ends(counts), w_scale, x_scale)
    dx = grouped_input_grad(grad, w_columns(w), None, ends(counts))
    dw = grouped_weight_grad(grad, x.to(FLOAT8), w_scale, ends(counts))
    for expert, rows in enumerate(expert_slices(ends(counts))):
        if counts[expert]:
            assert relative_error(dx[rows], dy[rows].double() @ (w[expert].double() * w_scale[expert, :, None])) < (
                E4M3_ERROR
            )
            assert relative_error(dw[expert], dy[rows].double().T @ (x[rows].double() * x_scale[rows])) < E4M3_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float8_backends_agree_on_gpu(monkeypatch, backend):
    for product in ("input_grad", "weight_grad"):
        monkeypatch.setitem(float8_matmul.BACKENDS, product, backend)
    counts = [0, 700, 3, 321]
    x, w = codes(1024, 528, low=-7, high=7), codes(4, 272, 528, low=-1, high=1)
    x_scale, w_scale = random(1024, 1).abs() + 0.1, random(4, 1).abs() + 0.1
    grad = grouped_quantize_grad(random(1024, 272), ends(counts), None, x_scale)
    x = x.to(FLOAT8)
    for fast_accum in (False, True):
        dx = grouped_input_grad(grad, w_columns(w), w_scale, ends(counts), fast_accum=fast_accum)
        dw = grouped_weight_grad(grad, x, None, ends(counts), fast_accum=fast_accum)
        on_cpu = GroupedQuantizedGrad(*(field.cpu() for field in grad))
        true_dx = grouped_input_grad(on_cpu, w_columns(w).cpu(), w_scale.cpu(), ends(counts).cpu())
        true_dw = grouped_weight_grad(on_cpu, x.cpu(), None, ends(counts).cpu())
        # bf16 has 8 significant bits; sums in the tensor cores lose one more where 700 rows are added.
        limit = 2**-7 if fast_accum else 2**-8
        assert relative_error(dx.cpu(), true_dx.double()) < limit
        assert relative_error(dw.cpu(), true_dw.double()) < limit
        assert dw[0].abs().max() == 0


def test_rows_may_have_the_codes_of_tokens():
    """On the device of the tensors: what copies of the tokens' codes give."""
    counts, generator = [30, 0, 33], torch.Generator().manual_seed(0)
    tokens, source_R = codes(21, 48, low=-8, high=7).to(FLOAT8), torch.randint(21, (63,), generator=generator).int()
    source_R = source_R.to(DEVICE)
    rows = tokens.view(torch.int8)[source_R.long()].view(FLOAT8)
    grad = grouped_quantize_grad(random(63, 40), ends(counts), None, random(63, 1).abs() + 0.1)
    dw = grouped_weight_grad(grad, tokens, None, ends(counts), source_R=source_R)
    assert torch.equal(dw, grouped_weight_grad(grad, rows, None, ends(counts)))
    with pytest.raises(ValueError, match=r"\[21, 48\] must be \[63, I\]"):
        grouped_weight_grad(grad, tokens, None, ends(counts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "topk", "outputs"), [(41, 3, 140), (5, 1, 33), (300, 6, 2048), (0, 2, 16)])
@pytest.mark.usefixtures("poison")
def test_the_gradient_that_rows_share_is_rounded_once_a_token(tokens, topk, outputs, dtype):
    """By the operator and by Triton's kernel: every row has the codes and the scale of its token."""
    triton_grad = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_grad")
    dy = (random(tokens, outputs) * torch.logspace(-9, 2, tokens, device=DEVICE)[:, None]).to(dtype)
    dy[4:5, 3] = float("nan")
    rows = torch.randperm(tokens * topk, generator=torch.Generator().manual_seed(2)).int()
    row_TK = rows.view(tokens, topk).to(DEVICE)
    codes_TO, scale_T1, *_ = quantize_grad(dy)
    for grad in (grouped_quantize_token_grad(dy, row_TK), triton_grad.quantize_grad(dy, None, None, None, row_TK)):
        assert grad[0].shape == (tokens * topk, outputs)
        for copy in range(topk):
            row_T = row_TK[:, copy].long()
            assert torch.equal(grad[0].view(torch.int8)[row_T], codes_TO.view(torch.int8))
            assert torch.equal(grad[1].view(torch.int32)[row_T], scale_T1.view(torch.int32))


def test_no_row_gives_no_gradient():
    none = ends([0, 0, 0])
    grad = grouped_quantize_grad(random(0, 32), none, None, random(0, 1))
    assert grouped_input_grad(grad, codes(3, 16, 32, low=-1, high=1).to(FLOAT8), None, none).shape == (0, 16)
    dw = grouped_weight_grad(grad, codes(0, 16, low=0, high=1).to(FLOAT8), None, none)
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
    with pytest.raises(ValueError, match=r"must be \[4, 1\]: it needs one group"):
        grouped_quantize_grad(dy, end, None, ones[:3])
    with pytest.raises(ValueError, match=r"it must be \[2, 8\]"):
        grouped_quantize_grad(dy, end, torch.ones(8, device=DEVICE))
    with pytest.raises(TypeError, match="rows must be int32"):
        grouped_quantize_token_grad(dy, end.long()[:, None])
    with pytest.raises(ValueError, match=r"dy \[4, 8\] and rows \[2, 1\] must be \[T, O\] and \[T, K\]"):
        grouped_quantize_token_grad(dy, end[:, None])
    grad = grouped_quantize_grad(dy, end, None, ones)
    with pytest.raises(TypeError, match="w_codes must be float8_e4m3fn"):
        grouped_input_grad(grad, codes(2, 16, 16, low=-1, high=1), None, end)
    with pytest.raises(ValueError, match=r"must be \[2, I, 16\]"):
        grouped_input_grad(grad, codes(2, 16, 8, low=-1, high=1).to(FLOAT8), None, end)
    with pytest.raises(ValueError, match=r"must be \[2, groups\]"):
        grouped_input_grad(grad, codes(2, 16, 16, low=-1, high=1).to(FLOAT8), ones, end)
    with pytest.raises(TypeError, match="x_codes must be float8_e4m3fn"):
        grouped_weight_grad(grad, codes(4, 48, low=-1, high=1), None, end)
    with pytest.raises(ValueError, match=r"must be \[4, I\]"):
        grouped_weight_grad(grad, codes(16, 32, low=-1, high=1).to(FLOAT8), None, end)
    with pytest.raises(ValueError, match="pass x_scale to grouped_quantize_grad"):
        grouped_weight_grad(grouped_quantize_grad(dy, end), codes(4, 48, low=-1, high=1).to(FLOAT8), None, end)

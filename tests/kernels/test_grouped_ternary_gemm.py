"""The 8-bit forward of routed experts: each expert's rows with its own codes and scales, and nobody else's."""

import pytest
import torch

from bitmoe_kernels.grouped_ternary_gemm import (
    float8_matmul,
    grouped_scaled_code_matmul,
)
from bitmoe_kernels.grouped_ternary_gemm.reference import (
    expert_slices,
    grouped_scaled_code_matmul_reference,
    grouped_transpose_codes_reference,
    padded_ends_reference,
    padded_rows,
)
from bitmoe_kernels.ternary_gemm.reference import scaled_code_matmul_reference

# Without a GPU the kernels run in Triton's interpreter, which cuts bf16 off instead of rounding: fp32 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
FLOAT8 = torch.float8_e4m3fn
# An expert without rows between others and at either end, all rows with one expert, no row at all.
COUNTS = [[17, 0, 32, 1], [0, 0, 50, 0], [0, 3, 40, 7], [0, 0, 0, 0]]


def codes(*shape: int, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8).to(DEVICE)


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(7)) + 0.1).to(DEVICE)


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int().to(DEVICE)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int8)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), 0x7F, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)


def expected_tiles(counts: list[int], block: int, padding: int | None) -> list[tuple[int, int, int, int]]:
    tiles, start, column = [], 0, 0
    for expert, count in enumerate(counts):
        padded = max(-(-count // (padding or 128)), 1) * (padding or 128)
        for offset in range(0, padded if padding else count, block):
            tiles.append((expert, start + offset, start + count, column + offset))
        start, column = start + count, column + padded
    return tiles


@pytest.mark.parametrize("padding", [None, 128, 256])
@pytest.mark.parametrize("counts", [*COUNTS, [5], [31, 32, 33] + [0] * 30 + [64]], ids=str)
def test_row_tiles(counts, padding):
    tiles = pytest.importorskip("bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles")
    num_columns = padded_rows(sum(counts), len(counts), padding or 128)
    found = tiles.row_tiles(ends(counts), num_columns if padding else sum(counts), 32, padding=padding)
    expected = expected_tiles(counts, 32, padding)
    assert found.count_1.item() == len(expected) <= found.table_4S.shape[1]
    assert list(zip(*found.table_4S[:, : len(expected)].tolist(), strict=True)) == expected
    assert torch.equal(found.padded_ends_E.cpu(), padded_ends_reference(ends(counts), padding or 128).cpu())
    assert found.padded_ends_E[-1] <= num_columns


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"), [(48, 40, 1), (64, 70, 2), (96, 70, 2), (20, 33, 1), (90, 40, 3)]
)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_int8_matmul_has_the_references_bits(counts, inputs, outputs, groups):
    kernels = pytest.importorskip("bitmoe_kernels.grouped_ternary_gemm.triton_kernels")
    # Two rows past the last expert's: whatever they hold stays out, and their results are not written.
    num_rows = sum(counts) + 2
    x, w = codes(num_rows, inputs, low=-128, high=127), codes(4, outputs, inputs, low=-1, high=1)
    x_scale, w_scale = scales(num_rows, groups), scales(4, outputs, groups)
    x_scale[-2:] = float("nan")
    y = poisoned(num_rows, outputs, dtype=torch.float32)
    kernels.grouped_matmul(x, x_scale, w, w_scale, ends(counts), inputs // groups, y, tile=TILE)
    expected = grouped_scaled_code_matmul_reference(x, x_scale, w, w_scale, ends(counts), torch.float32)
    assert torch.equal(y[:-2], expected[:-2])
    assert torch.equal(y[-2:], poisoned(2, outputs, dtype=torch.float32))


@pytest.mark.parametrize("chunk_size", [48, 64, 96])
@pytest.mark.parametrize("value", [None, 7, -8])
def test_grouped_float8_matmul_is_exact(value, chunk_size):
    kernels = pytest.importorskip("bitmoe_kernels.grouped_ternary_gemm.triton_kernels")
    x, w = codes(50, 96, low=-8, high=7), codes(4, 40, 96, low=-1, high=1)
    if value is not None:
        x, w = torch.full_like(x, value), torch.ones_like(w)
    one_R1, one_EN1 = torch.ones(50, 1, device=DEVICE), torch.ones(4, 40, 1, device=DEVICE)
    y = poisoned(50, 40, dtype=torch.float32)
    ends_E = ends(COUNTS[0])
    kernels.grouped_matmul(x.to(FLOAT8), one_R1, w.to(FLOAT8), one_EN1, ends_E, chunk_size, y, tile=TILE)
    assert torch.equal(y, grouped_scaled_code_matmul_reference(x, one_R1, w, one_EN1, ends_E, torch.float32))


def test_reference_is_the_dense_one_for_each_expert():
    counts, x, w = COUNTS[0], codes(50, 48, low=-128, high=127), codes(4, 40, 48, low=-1, high=1)
    x_scale, w_scale = scales(50, 2), scales(4, 2)
    y = grouped_scaled_code_matmul(x, x_scale, w, w_scale, ends(counts), torch.float32)
    for expert, rows in enumerate(expert_slices(ends(counts))):
        args = x[rows], x_scale[rows], w[expert], w_scale[expert].expand(40, 2), torch.float32
        assert torch.equal(y[rows], scaled_code_matmul_reference(*args))


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 40), (20, 33), (4096, 48)])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_scaled_code_matmul(counts, inputs, outputs, dtype):
    x, w = codes(sum(counts), inputs, low=-8, high=7), codes(4, outputs, inputs, low=-1, high=1)
    x_scale = scales(sum(counts), 1)
    for w_scale in (scales(4, 1), scales(4, outputs)):
        y = grouped_scaled_code_matmul(x.to(dtype), x_scale, w.to(dtype), w_scale, ends(counts))
        w_scale_EO1 = w_scale.expand(4, outputs).unsqueeze(2)
        expected = grouped_scaled_code_matmul_reference(x, x_scale, w, w_scale_EO1, ends(counts), torch.bfloat16)
        if dtype == torch.int8:
            assert torch.equal(y, expected)
        else:
            torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("counts", [[0, 700, 1, 323], [0, 5, 0, 2]], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_grouped_scaled_code_matmul_on_gpu_has_the_references_bits(counts, groups, out_dtype):
    x, w = codes(sum(counts), 2816, low=-128, high=127), codes(4, 400, 2816, low=-1, high=1)
    x_scale, w_scale = scales(sum(counts), groups), scales(4, groups)
    y = grouped_scaled_code_matmul(x, x_scale, w, w_scale, ends(counts), out_dtype)
    w_scale_EOG = w_scale.unsqueeze(1).expand(-1, 400, -1)
    args = (x, x_scale, w, w_scale_EOG, ends(counts))
    assert torch.equal(y.cpu(), grouped_scaled_code_matmul_reference(*(arg.cpu() for arg in args), out_dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [None, 7, -8])
def test_grouped_float8_forward_is_exact_on_gpu(monkeypatch, backend, value):
    monkeypatch.setitem(float8_matmul.BACKENDS, "forward", backend)
    counts = [0, 700, 1, 323]
    x, w = codes(1024, 16384, low=-8, high=7), codes(4, 272, 16384, low=-1, high=1)
    if value is not None:
        x, w = torch.full_like(x, value), torch.ones_like(w)
    one_R1, one_E1 = torch.ones(1024, 1, device=DEVICE), torch.ones(4, 1, device=DEVICE)
    y = grouped_scaled_code_matmul(x.to(FLOAT8), one_R1, w.to(FLOAT8), one_E1, ends(counts))
    assert torch.equal(y, grouped_scaled_code_matmul(x, one_R1, w, one_E1, ends(counts)))


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=str)
def test_transposed_codes_have_experts_at_multiples_of_128(dtype):
    counts, x = [130, 0, 5], codes(135, 3, low=-8, high=7)
    columns = grouped_transpose_codes_reference(x.to(dtype), ends(counts))
    assert (columns.dtype, columns.shape) == (dtype, (3, 256 + 3 * 128))
    columns = columns.float()
    assert torch.equal(columns[:, :130], x[:130].T.float())
    assert torch.equal(columns[:, 384:389], x[130:].T.float())
    assert columns[:, 130:384].abs().max() == columns[:, 389:].abs().max() == 0


def test_forward_refuses():
    x, w, x_scale, w_scale = codes(4, 8, low=-8, high=7), codes(2, 6, 8, low=-1, high=1), scales(4, 1), scales(2, 1)
    end = ends([1, 3])
    with pytest.raises(TypeError, match="ends must be int32, got torch.int64"):
        grouped_scaled_code_matmul(x, x_scale, w, w_scale, end.long())
    with pytest.raises(TypeError, match="must all be int8 or all float8_e4m3fn"):
        grouped_scaled_code_matmul(x.to(FLOAT8), x_scale, w, w_scale, end)
    with pytest.raises(ValueError, match=r"must be \[R, I\] and \[2, O, I\]"):
        grouped_scaled_code_matmul(x, x_scale, w[:1], w_scale, end)
    with pytest.raises(ValueError, match="contracted sizes 8 and 7"):
        grouped_scaled_code_matmul(x, x_scale, w[:, :, :7], w_scale, end)
    with pytest.raises(ValueError, match=r"x_scale must be fp32 \[4, groups\]"):
        grouped_scaled_code_matmul(x, x_scale[:3], w, w_scale, end)
    with pytest.raises(ValueError, match="groups=3 does not cut 8 inputs"):
        grouped_scaled_code_matmul(x, scales(4, 3), w, w_scale, end)
    with pytest.raises(ValueError, match=r"w_scale must be fp32 of shape \(2, 1\) or \(2, 6\)"):
        grouped_scaled_code_matmul(x, x_scale, w, scales(2, 2), end)
    with pytest.raises(ValueError, match="e4m3 codes need one group"):
        grouped_scaled_code_matmul(x.to(FLOAT8), scales(4, 2), w.to(FLOAT8), scales(2, 2), end)

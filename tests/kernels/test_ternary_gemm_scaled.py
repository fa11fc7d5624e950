"""The 8-bit forward: sums exact, scales in the reference's order, every element written, nothing read past the end."""

import pytest
import torch

from bitmoe_kernels.ternary_gemm import code_matmul, scaled_code_matmul, transpose_codes
from bitmoe_kernels.ternary_gemm.op import padded_groups
from bitmoe_kernels.ternary_gemm.reference import (
    code_matmul_reference,
    padded_length,
    scaled_code_matmul_reference,
)

# Without a GPU the kernels run in Triton's interpreter, which cuts bf16 off instead of rounding: fp32 there.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
FLOAT8 = torch.float8_e4m3fn


def codes(*shape: int, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8).to(DEVICE)


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(7)) + 0.1).to(DEVICE)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int8)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((*shape, dtype.itemsize), 0x7F, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)


SHAPES = [
    (1, 1, 1, 1),
    (0, 8, 8, 1),
    (33, 96, 47, 1),
    (33, 96, 47, 3),
    (40, 96, 35, 2),  # tiles past a chunk's end
    (40, 90, 35, 2),
    (65, 31, 70, 1),
    (5, 256, 6, 8),
]


@pytest.mark.parametrize(("tokens", "inputs", "outputs", "groups"), SHAPES)
def test_scaled_int8_matmul_has_the_references_bits(tokens, inputs, outputs, groups):
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_kernels")
    x, w = codes(tokens, inputs, low=-128, high=127), codes(outputs, inputs, low=-1, high=1)
    x_scale, w_scale = scales(tokens, groups), scales(outputs, groups)
    y = poisoned(tokens, outputs, dtype=torch.float32)
    kernels.scaled_int8_matmul(x, x_scale, w, w_scale, inputs // groups, y, tile=TILE)
    assert torch.equal(y, scaled_code_matmul_reference(x, x_scale, w, w_scale, torch.float32))


def test_tiles_are_read_whole_where_memory_is_aligned():
    tiles = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_tiles")

    def has_tiles(codes_RK, chunk_size):
        return tiles.operand_tiles(codes_RK, codes_RK, TILE, chunk_size)[0] is not None

    aligned = codes(4, 96, low=-1, high=1)
    assert has_tiles(aligned, 96)
    assert has_tiles(aligned, 32)
    assert has_tiles(aligned, 48)
    assert not has_tiles(aligned, 24)  # every other chunk starts between two multiples of 16 bytes
    assert not has_tiles(aligned, 64)  # the last chunk is shorter
    assert not has_tiles(aligned[:, :80], 40)  # 40 does not divide the stride of rows
    assert has_tiles(aligned[:, :40], 40)
    assert not has_tiles(aligned[:, 8:], 88)
    assert not has_tiles(codes(4, 40, low=-1, high=1), 40)
    assert not has_tiles(aligned[:0], 96)


def test_tiles_of_products():
    """Two programs a processor where it has something else to do than multiply, unless registers, rows or chunks are
    short."""
    tiles = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_tiles")

    def tile(rows=640, inputs=256, outputs=512, chunk=256, dtype=torch.int8, out_dtype=torch.bfloat16, matrices=1):
        a, b = (codes(n, inputs, low=-1, high=1).to(dtype) for n in (rows, outputs * matrices))
        return tiles.product_tile(a, b, torch.empty(rows, outputs, dtype=out_dtype), chunk, matrices)

    assert tile() is tiles.PAIR_TILE
    assert tile(inputs=255) is tiles.WIDE_TILE  # pointers
    assert tile(inputs=384, chunk=192) is tiles.CHUNK_TILE
    assert tile(chunk=128) is tile(inputs=402, chunk=201) is tiles.SHORT_TILE  # less than a step; pointers
    assert tile(inputs=768, chunk=384) is tiles.SHORT_TILE  # a third of padding
    assert tile(rows=64) is tile(rows=640, matrices=10) is tiles.SHORT_TILE
    assert tile(out_dtype=torch.float32) is tiles.SQUARE_TILE
    assert tile(dtype=FLOAT8) is tiles.WIDE_TILE
    assert tile(dtype=FLOAT8, outputs=1408) is tiles.PAIR_TILE  # 5.5 wide ones
    assert tile(dtype=FLOAT8, chunk=128) is tiles.SQUARE_TILE
    processors = tiles.num_programs(10**6, tiles.WIDE_TILE, torch.device(DEVICE))
    assert tiles.num_programs(10**6, tiles.PAIR_TILE, torch.device(DEVICE)) == 2 * processors
    assert tiles.num_programs(1, tiles.PAIR_TILE, torch.device(DEVICE)) == 1


@pytest.mark.parametrize(("x_value", "w_value"), [(127, 1), (-128, -1), (7, 1), (-8, 1)])
def test_scaled_int8_matmul_is_exact_at_the_largest_sums(x_value, w_value):
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_kernels")
    x = torch.full((2, 4096), x_value, dtype=torch.int8, device=DEVICE)
    w = torch.full((3, 4096), w_value, dtype=torch.int8, device=DEVICE)
    one, y = torch.ones(3, 1, device=DEVICE), poisoned(2, 3, dtype=torch.float32)
    kernels.scaled_int8_matmul(x, one[:2], w, one, 4096, y, tile=TILE)
    assert torch.equal(y.cpu().long(), code_matmul_reference(x.cpu(), w.cpu()))


def test_scaled_int8_matmul_reads_and_writes_strided_rows():
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_kernels")
    a, b = codes(40, 64, low=-128, high=127), codes(36, 80, low=-128, high=127)[:, :64]
    a_scale, b_scale = scales(40, 3), scales(1, 1).expand(36, 3)
    y = poisoned(40, 72, dtype=torch.float32)
    kernels.scaled_int8_matmul(a, a_scale, b, b_scale, 24, y[:, 36:], tile=TILE)
    expected = torch.zeros(40, 36, device=DEVICE)
    for chunk, features in enumerate((slice(0, 24), slice(24, 48), slice(48, 64))):
        expected += a[:, features].float() @ b[:, features].float().T * a_scale[:, chunk, None] * b_scale[:, chunk]
    assert torch.equal(y[:, 36:], expected)
    assert torch.equal(y[:, :36], poisoned(40, 36, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (0, 5), (33, 47), (130, 200), (70, 134)])
def test_transpose_codes(rows, columns, dtype):
    kernels = pytest.importorskip("bitmoe_kernels.ternary_gemm.triton_columns")
    x = codes(rows, columns, low=-8, high=7).to(dtype)
    transposed = transpose_codes(x)
    assert (transposed.dtype, transposed.shape) == (dtype, (columns, padded_length(rows)))
    assert torch.equal(transposed.float()[:, :rows], x.float().T)
    assert not transposed.float()[:, rows:].any()
    written = poisoned(*transposed.shape, dtype=torch.int8)
    kernels.transpose_codes(bits(x), written)
    assert torch.equal(written, bits(transposed))


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 16, 16), (0, 32, 16), (63, 100, 17), (130, 512, 144)])
def test_scaled_code_matmul(tokens, inputs, outputs, dtype):
    x, w = codes(tokens, inputs, low=-8, high=7), codes(outputs, inputs, low=-1, high=1)
    x_scale = scales(tokens, 1)
    for w_scale in (scales(1), scales(outputs)):
        y = scaled_code_matmul(x.to(dtype), x_scale, w.to(dtype), w_scale)
        expected = (code_matmul(x, w) * x_scale * w_scale).bfloat16()
        if dtype == torch.int8:
            assert torch.equal(y, expected)
        else:
            torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("value", [7, -8])
def test_scaled_code_matmul_float8_is_exact_in_the_worst_case(value):
    x = torch.full((16, 16384), value, dtype=torch.int8, device=DEVICE)
    w = torch.ones(16, 16384, dtype=torch.int8, device=DEVICE)
    w[1, :1024] = 0
    one = torch.ones(16, 1, device=DEVICE)
    y = scaled_code_matmul(x.to(FLOAT8), one, w.to(FLOAT8), one[:1, 0])
    assert torch.equal(y, code_matmul(x, w).bfloat16())


def test_scaled_code_matmul_adds_groups_in_order():
    x, w = codes(7, 48, low=-128, high=127), codes(5, 48, low=-1, high=1)
    x_scale, w_scale = scales(7, 3), scales(3)
    y = scaled_code_matmul(x, x_scale, w, w_scale, torch.float32)
    parts = [
        code_matmul(x[:, g : g + 16], w[:, g : g + 16]) * x_scale[:, g // 16, None] * w_scale[g // 16]
        for g in (0, 16, 32)
    ]
    assert torch.equal(y, parts[0] + parts[1] + parts[2])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "groups"), [(257, 4096, 512, 1), (300, 5504, 400, 8), (40, 5460, 130, 4)]
)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scaled_code_matmul_on_gpu_has_the_references_bits(tokens, inputs, outputs, groups, out_dtype):
    x, w = codes(tokens, inputs, low=-128, high=127), codes(outputs, inputs, low=-1, high=1)
    x_scale, w_scale = scales(tokens, groups), scales(groups)
    y = scaled_code_matmul(x, x_scale, w, w_scale, out_dtype)
    w_scale_OG = w_scale.expand(outputs, groups)
    expected = scaled_code_matmul_reference(x.cpu(), x_scale.cpu(), w.cpu(), w_scale_OG.cpu(), out_dtype)
    assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize(("inputs", "groups"), [(48, 3), (45, 3), (10, 1), (34, 2)])
def test_padded_groups_leave_products_as_they_are(inputs, groups):
    x, w = codes(5, inputs, low=-128, high=127), codes(4, inputs, low=-1, high=1)
    x_padded, w_padded = padded_groups(x, groups), padded_groups(w, groups)
    assert x_padded.shape[1] % (16 * groups) == 0
    for parts in zip(*(m.chunk(groups, 1) for m in (x, w, x_padded, w_padded)), strict=True):
        assert torch.equal(code_matmul(*parts[2:]), code_matmul(*parts[:2]))


def test_scaled_code_matmul_carries_nan_scales():
    x_scale = scales(3, 1)
    x_scale[1] = float("nan")
    y = scaled_code_matmul(codes(3, 8, low=-8, high=7), x_scale, codes(4, 8, low=-1, high=1), scales(1))
    assert y.isnan().all(dim=1).tolist() == [False, True, False]
    assert not y[[0, 2]].isnan().any()


def test_scaled_code_matmul_refuses():
    x, w = codes(2, 8, low=-8, high=7), codes(4, 8, low=-1, high=1)
    with pytest.raises(TypeError, match="must all be int8 or all float8_e4m3fn"):
        scaled_code_matmul(x.to(FLOAT8), scales(2, 1), w, scales(1))
    with pytest.raises(ValueError, match="contracted sizes 8 and 7"):
        scaled_code_matmul(x, scales(2, 1), w[:, :7], scales(1))
    with pytest.raises(ValueError, match=r"x_scale must be fp32 \[2, groups\]"):
        scaled_code_matmul(x, scales(3, 1), w, scales(1))
    with pytest.raises(ValueError, match="groups=3 does not cut 8 inputs"):
        scaled_code_matmul(x, scales(2, 3), w, scales(3))
    with pytest.raises(ValueError, match=r"w_scale must be fp32 with \[2\] values"):
        scaled_code_matmul(x, scales(2, 2), w, scales(4))
    with pytest.raises(ValueError, match="e4m3 codes need one group"):
        scaled_code_matmul(x.to(FLOAT8), scales(2, 2), w.to(FLOAT8), scales(2))
    with pytest.raises(TypeError, match="must all be int8 or all float8_e4m3fn"):
        transpose_codes(x.float())
    with pytest.raises(ValueError, match="codes must be matrices"):
        transpose_codes(x[None])

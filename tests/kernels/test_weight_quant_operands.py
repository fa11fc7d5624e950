"""Ternary codes in the layouts of 8-bit products, with counts: reference by definition, Triton bit for bit.

Sums by id are here, too: they and the operands are what training uses.
"""

# Shapes: O = output rows, P = O padded to a multiple of 16, I = input columns, E = experts, G = groups, S = scales.

from types import SimpleNamespace

import pytest
import torch

from bitmoe_kernels.weight_quant import (
    TernaryOperands,
    absmean_operands,
    absmean_scale,
    absmean_sums,
    absmean_sums_by_id,
    ternary_codes,
    ternary_operands,
)
from bitmoe_kernels.weight_quant.reference import (
    absmean_scale_reference,
    absmean_sums_by_id_reference,
    absmean_sums_reference,
    ternary_operands_reference,
)

E4M3 = torch.float8_e4m3fn
# Shape, groups, axis: one weight, odd sizes, a scale a row, groups of either, experts, more than one tile, groups of
# whole tiles.
CASES = [
    ((1, 1), 1, -2),
    ((17, 33), 1, -2),
    ((17, 33), 17, -2),
    ((18, 33), 3, -1),
    ((130, 140), 2, -1),
    ((3, 17, 33), 17, -2),
    ((2, 80, 132), 4, -1),
    ((2, 2, 6, 8), 2, -2),
    ((2, 128, 10), 2, -2),
    ((192, 130), 3, -2),
]

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
each_case = pytest.mark.parametrize(("shape", "groups", "axis"), CASES, ids=str)
each_row_dtype = pytest.mark.parametrize("row_dtype", [torch.int8, E4M3], ids=str)


@pytest.fixture
def kernels(triton_device, poison):
    """The functions under test, imported when the interpreter has been chosen; their memory starts as garbage."""
    from bitmoe_kernels.weight_quant import triton_absmean, triton_one_launch, triton_operands

    return SimpleNamespace(**vars(triton_absmean) | vars(triton_operands) | vars(triton_one_launch))


def gaussian(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(shape: tuple[int, ...], groups: int) -> torch.Tensor:
    return 0.4 + gaussian(*shape[:-2], groups).abs()


def assert_same_bits(got, wanted) -> None:
    for tensor, expected in zip(got, wanted, strict=True):
        if expected is None:
            assert tensor is None
        else:
            assert tensor.dtype == expected.dtype
            is_code = expected.dtype in (torch.int8, E4M3)
            pair = (x.cpu().view(torch.int8) if is_code else x.cpu() for x in (tensor, expected))
            assert torch.equal(*pair)


@each_row_dtype
def test_reference_of_hand_values(row_dtype):
    """Rows are the codes, columns their transposition with zeros after the two outputs; e4m3 +-1 are 0x38 and 0xB8."""
    w_OI = torch.tensor([[0.4, -3.0, 0.6], [2.0, 0.0, -0.6]])
    operands = ternary_operands(w_OI, torch.ones(1), row_dtype=row_dtype, with_columns=True)
    assert operands.rows.dtype == row_dtype
    assert operands.rows.float().tolist() == [[0, -1, 1], [1, 0, -1]]
    assert operands.columns.shape == (3, 16)
    padding = [0] * 14
    expected = [[0, 0x38, *padding], [0xB8, 0, *padding], [0x38, 0xB8, *padding]]
    assert operands.columns.view(torch.uint8).tolist() == expected
    assert operands.counts.tolist() == [2, 0, 6]
    assert torch.equal(ternary_codes(w_OI, torch.ones(1)), operands.rows.to(torch.int8))


@each_row_dtype
@pytest.mark.parametrize("former_dtype", [torch.int8, E4M3], ids=str)
def test_changes_are_counted_whatever_the_types(row_dtype, former_dtype):
    former = ternary_operands(torch.tensor([[1.0, -1.0, 0.0, 1.0]]), torch.ones(1), row_dtype=former_dtype)
    w_OI = torch.tensor([[1.0, 1.0, -1.0, 0.0]])
    assert ternary_operands(w_OI, torch.ones(1), row_dtype=row_dtype, former=former).counts.tolist() == [1, 3, 4]


@each_dtype
@each_case
@pytest.mark.parametrize("with_columns", [False, True])
def test_operands_equal_reference(kernels, triton_device, dtype, shape, groups, axis, with_columns):
    """The first time without former codes, then with those of other weights."""
    scale_G = scales(shape, groups)
    former_rows = None
    former = None
    for seed in (4, 5):
        w_OI = gaussian(*shape, seed=seed, dtype=dtype)
        wanted = ternary_operands_reference(w_OI, scale_G, axis, E4M3, with_columns, former_rows)
        arguments = (w_OI.to(triton_device), scale_G.to(triton_device), axis, E4M3, with_columns)
        got = kernels.ternary_operands_triton(*arguments, former)
        assert_same_bits(got, wanted)
        former_rows, former = wanted[0], got[:2]


@each_row_dtype
@pytest.mark.parametrize("former_dtype", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize("with_columns", [False, True])
@pytest.mark.parametrize("former_columns", [False, True])
@pytest.mark.parametrize(("num_columns", "dtype"), [(33, torch.float32), (34, torch.bfloat16)], ids=str)
def test_former_memory_is_used_again_where_it_fits(
    kernels, triton_device, row_dtype, former_dtype, with_columns, former_columns, num_columns, dtype
):
    """Between stages types and layouts change; former codes are counted against all the same, in pairs or not."""
    old, new = gaussian(70, num_columns, seed=6, dtype=dtype), gaussian(70, num_columns, seed=7, dtype=dtype)
    scale = torch.full((1,), 0.8)
    device_scale = scale.to(triton_device)
    former = kernels.ternary_operands_triton(old.to(triton_device), device_scale, -2, former_dtype, former_columns)[:2]
    former_rows = former[0].cpu().clone()
    got = kernels.ternary_operands_triton(new.to(triton_device), device_scale, -2, row_dtype, with_columns, former)
    assert_same_bits(got, ternary_operands_reference(new, scale, -2, row_dtype, with_columns, former_rows))
    assert 0 < int(got[2][1]) < new.numel()
    assert (got[0].data_ptr() == former[0].data_ptr()) == (row_dtype == former_dtype)
    if with_columns and former_columns:
        assert got[1].data_ptr() == former[1].data_ptr()


@each_dtype
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 6, 9), 1), ((5, 64, 33), 2), ((2, 2, 17, 300), 1), ((1, 160, 700), 5), ((4, 1, 1), 1)]
)
def test_one_launch_equals_its_steps(kernels, triton_device, dtype, shape, groups):
    """Scales and codes of many matrices, or blocks of their rows, over two values of the weights."""
    tile, former_rows, former = {"BLOCK_O": 32, "BLOCK_I": 64, "num_warps": 4}, None, None
    for seed in (4, 5):
        w_OI = gaussian(*shape, seed=seed, dtype=dtype) * (1 + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)))
        w_OI = w_OI.to(dtype)
        wanted_G = absmean_scale_reference(absmean_sums_reference(w_OI, groups, -2), shape[-1] * shape[-2] // groups)
        wanted = ternary_operands_reference(w_OI, wanted_G, -2, E4M3, True, former_rows)
        got_G, *got = kernels.absmean_operands_triton(w_OI.to(triton_device), groups, E4M3, True, former, True, tile)
        assert_same_bits([got_G, *got], [wanted_G, *wanted])
        former_rows, former = wanted[0], got[:2]


def test_one_launch_of_a_matrix_that_is_not_finite(kernels, triton_device):
    w_EOI = gaussian(4, 20, 12)
    w_EOI[1, 0, 0], w_EOI[2, 1, 1] = float("nan"), float("inf")
    scale_E1, rows, _, _ = kernels.absmean_operands_triton(w_EOI.to(triton_device), 1, torch.int8, False)
    assert scale_E1.flatten().isnan().tolist() == [False, True, True, False]
    assert rows.flatten(1).any(1).tolist() == [True, False, False, True]


def test_which_weights_take_one_launch(kernels):
    """Several units, none too large, of whole tiles."""
    takes = kernels.takes_one_launch
    w_EOI = torch.empty(4, 256, 24)
    assert takes(w_EOI, 1, -1)
    assert takes(w_EOI, 2, -2)
    assert not takes(w_EOI, 2, -1)
    assert not takes(w_EOI, 4, -2)  # half a tile
    assert not takes(w_EOI[:2], 1, -1)
    assert not takes(w_EOI[:0], 1, -1)
    assert not takes(torch.empty(4, 2048, 2048), 1, -1)


@pytest.mark.parametrize(("groups", "dim"), [(1, 0), (2, 0), (4, 1)])
def test_absmean_operands_are_its_steps(groups, dim):
    w_EOI = gaussian(3, 8, 12, dtype=torch.bfloat16)
    former = absmean_operands(-w_EOI, groups, dim, torch.int8, True)[1]
    scale_G, operands = absmean_operands(w_EOI, groups, dim, torch.int8, True, former)
    wanted_G = absmean_scale(absmean_sums(w_EOI, groups, dim), 96 // groups)
    assert_same_bits(
        [scale_G, *operands], [wanted_G, *ternary_operands(w_EOI, wanted_G, dim, torch.int8, True, former)]
    )


def test_codes_need_not_be_counted(kernels, triton_device):
    """The former codes' memory is taken all the same."""
    old, new = (gaussian(4, 20, 12, seed=seed) for seed in (1, 2))
    scale_E1 = torch.full((4, 1), 0.8)
    wanted = *ternary_operands_reference(new, scale_E1, -2, torch.int8, True, None)[:2], None
    former = ternary_operands(old, scale_E1)
    assert_same_bits(ternary_operands(new, scale_E1, 0, torch.int8, True, former, is_counted=False), wanted)
    old, new, scale_E1 = (x.to(triton_device) for x in (old, new, scale_E1))
    for run in (
        lambda w, *memory: kernels.ternary_operands_triton(w, scale_E1, -2, torch.int8, True, *memory),
        lambda w, *memory: kernels.absmean_operands_triton(w, 1, torch.int8, True, *memory)[1:],
    ):
        former = run(old)[:2]
        expected = run(new)[:2]
        got = run(new, former, False)
        assert_same_bits(got, (*expected, None))
        assert [x.data_ptr() for x in got[:2]] == [x.data_ptr() for x in former]


def test_two_runs_are_equal(kernels, triton_device):
    w_OI, ids_O = gaussian(70, 50).to(triton_device), (torch.arange(70) % 3).to(triton_device)
    runs = []
    for _ in range(2):
        sums, counts = kernels.absmean_sums_by_id_triton(w_OI, ids_O, 3)
        scale_O = kernels.absmean_scale_triton(sums, counts, ids_O)
        runs.append((sums, scale_O, *kernels.ternary_operands_triton(w_OI, scale_O, -2, E4M3, True)))
    assert_same_bits(*runs)


def test_a_nan_scale_or_weight_has_code_0(kernels, triton_device):
    w_OI = gaussian(20, 12)
    w_OI[0, 0], w_OI[1, 1], w_OI[2, 2] = float("nan"), float("inf"), -float("inf")
    scale_O = torch.ones(20)
    scale_O[1] = scale_O[7] = float("nan")
    wanted = ternary_operands_reference(w_OI, scale_O, -2, torch.int8, True, None)
    got = kernels.ternary_operands_triton(w_OI.to(triton_device), scale_O.to(triton_device), -2, torch.int8, True)
    assert_same_bits(got, wanted)
    assert wanted[0][0, 0] == 0
    assert not wanted[0][[1, 7]].any()
    assert wanted[0][2, 2] == -1


def test_weights_that_no_word_holds(kernels, triton_device):
    """Rows of even length at an odd place are not read in pairs, which a GPU could not (the interpreter can)."""
    w_OI = gaussian(1 + 18 * 20, dtype=torch.bfloat16)[1:].view(18, 20)
    device_w = gaussian(1 + 18 * 20, dtype=torch.bfloat16).to(triton_device)[1:].view(18, 20)
    for weights, is_paired in ((device_w, False), (device_w.clone(), True), (device_w[:, 1:], False)):
        memory = kernels.operand_memory(weights, E4M3, False, None, False, kernels.OPERANDS_TILE)
        assert memory.constants(weights)["IS_PAIRED"] == is_paired
    scale = torch.full((1,), 0.8)
    wanted = ternary_operands_reference(w_OI, scale, -2, E4M3, True, None)
    assert_same_bits(kernels.ternary_operands_triton(device_w, scale.to(triton_device), -2, E4M3, True), wanted)


def test_strided_weights_and_no_expert(kernels, triton_device):
    w_OI, scale = gaussian(18, 20), torch.ones(2)
    strided = w_OI.t().contiguous().t().to(triton_device)
    wanted = ternary_operands_reference(w_OI, scale, -1, torch.int8, True, None)
    assert_same_bits(kernels.ternary_operands_triton(strided, scale.to(triton_device), -1, torch.int8, True), wanted)
    empty, no_scale = torch.zeros(0, 6, 8, device=triton_device), torch.zeros(0, 2, device=triton_device)
    rows, columns, counts = kernels.ternary_operands_triton(empty, no_scale, -1, torch.int8, True)
    assert (rows.shape, columns.shape, counts.tolist()) == ((0, 6, 8), (0, 8, 16), [0, 0, 0])


@each_dtype
@pytest.mark.parametrize("shape", [(9, 33), (3, 9, 33), (2, 2, 9, 5)], ids=str)
def test_sums_by_id_equal_reference(kernels, triton_device, dtype, shape):
    """Rows of a scale lie anyhow, in unequal numbers; each of a batch of matrices has sums of its own."""
    w_OI = gaussian(*shape, dtype=dtype)
    ids_O = torch.randint(4, shape[-2:-1], generator=torch.Generator().manual_seed(1))
    ids_O[:4] = torch.tensor([2, 0, 3, 1])
    wanted_sums, wanted_counts = absmean_sums_by_id_reference(w_OI, ids_O, 4)
    for number in range(4):
        rows = w_OI[..., ids_O == number, :]
        torch.testing.assert_close(wanted_sums[..., number], rows.double().abs().sum((-2, -1)), rtol=1e-14, atol=0)
        assert wanted_counts[number] == rows.shape[-2] * rows.shape[-1]
    sums, counts = kernels.absmean_sums_by_id_triton(w_OI.to(triton_device), ids_O.to(triton_device), 4)
    torch.testing.assert_close(sums.cpu(), wanted_sums, rtol=1e-14, atol=0)
    assert torch.equal(counts.cpu(), wanted_counts)
    scale_S = kernels.absmean_scale_triton(sums, counts, None)
    scale_O = kernels.absmean_scale_triton(sums, counts, ids_O.to(triton_device))
    assert torch.equal(scale_S.cpu(), absmean_scale_reference(wanted_sums, wanted_counts))
    assert torch.equal(scale_O.cpu(), scale_S.cpu()[..., ids_O])


def test_sums_by_id_of_more_rows_than_a_program_adds_at_once(kernels, triton_device):
    parts_1O, ids_O = gaussian(1, 2049, dtype=torch.float64).abs(), torch.arange(2049) % 2
    sums, counts = kernels._added_parts(parts_1O.to(triton_device), 2, ids_O.to(triton_device), 3)
    torch.testing.assert_close(sums[0].cpu(), torch.stack([parts_1O[0, n::2].sum() for n in range(2)]))
    assert counts.tolist() == [3 * 1025, 3 * 1024]


@each_dtype
def test_sums_of_every_exponent(kernels, triton_device, dtype):
    """From the smallest denormal to the largest number, alone and together: bits moved into fp64 are the number."""
    info = torch.finfo(dtype)
    values = [0.0, info.smallest_normal / 2, info.smallest_normal, 1.5, info.max, info.smallest_normal * 2**-5]
    w_OI = torch.tensor(values, dtype=torch.float64).to(dtype).unsqueeze(1)
    w_OI = torch.cat([w_OI, -w_OI, torch.zeros_like(w_OI)], dim=1)
    assert w_OI[5, 0] != 0
    sums = kernels.absmean_sums_triton(w_OI.to(triton_device), len(w_OI), -2).cpu()
    assert torch.equal(sums, 2 * w_OI[:, 0].double())
    together = kernels.absmean_sums_triton(w_OI.to(triton_device), 1, -1).cpu()
    torch.testing.assert_close(together, w_OI.double().abs().sum().view(1), rtol=1e-14, atol=0)
    denormals = kernels.absmean_sums_triton(w_OI[[1, 5]].to(triton_device), 1, -2).cpu()
    assert torch.equal(denormals, w_OI[[1, 5]].double().abs().sum().view(1))


@pytest.mark.parametrize("mean", [0.0, 1e-6, 1e-5, 3.0, 1e300, float("inf"), float("nan")])
def test_scale_equals_reference(kernels, triton_device, mean):
    sums = torch.tensor([mean * 3, 1.0], dtype=torch.float64)
    wanted = absmean_scale_reference(sums, 3)
    assert wanted[1] == torch.tensor(1 / 3, dtype=torch.float64).float()
    got = kernels.absmean_scale_triton(sums.to(triton_device), 3, None).cpu()
    assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1))


def test_sums_by_id_are_those_of_equal_groups():
    """On the device of the tensors: the public functions together."""
    w_EOI, ids_O = gaussian(2, 6, 4), torch.arange(3).repeat_interleave(2)
    sums, counts = absmean_sums_by_id(w_EOI, ids_O, 3)
    torch.testing.assert_close(sums, absmean_sums(w_EOI, 3, 0), rtol=1e-14, atol=0)
    assert counts.tolist() == [8, 8, 8]
    assert torch.equal(absmean_scale(sums, counts), absmean_scale(sums, 8))
    assert torch.equal(absmean_scale(sums, counts, ids_O), absmean_scale(sums, 8).repeat_interleave(2, -1))


def test_bad_arguments():
    w_OI, scale = torch.ones(4, 6), torch.ones(1)
    former = ternary_operands(torch.ones(4, 5), scale)
    with pytest.raises(TypeError, match=r"row_dtype must be int8 or float8_e4m3fn, got torch\.bfloat16"):
        ternary_operands(w_OI, scale, row_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"former codes \[4, 5\]"):
        ternary_operands(w_OI, scale, former=former)
    with pytest.raises(ValueError, match="3 scale_ids do not fit 4 output rows"):
        absmean_sums_by_id(w_OI, torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match=r"int64 \[O\], got torch\.int32"):
        absmean_sums_by_id(w_OI, torch.zeros(4, dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="count=0"):
        absmean_scale(torch.ones(2, dtype=torch.float64), torch.tensor([3, 0]))


@pytest.mark.gpu
@each_row_dtype
def test_operands_on_a_gpu_equal_cpu(row_dtype):
    """Weights of real models, aligned and not, over two values of the weights; rows by id, columns by group."""
    for shape in ((4096, 4096), (2048, 5460), (4, 1408, 2048)):
        ids_O = torch.randint(6, shape[-2:-1], generator=torch.Generator().manual_seed(2))
        former = gpu_former = None
        for seed in (1, 2):
            w_OI = gaussian(*shape, seed=seed, dtype=torch.bfloat16)
            scale_O = absmean_scale(*absmean_sums_by_id(w_OI, ids_O, 6), ids_O)
            gpu_scale_O = absmean_scale(*absmean_sums_by_id(w_OI.cuda(), ids_O.cuda(), 6), ids_O.cuda())
            assert torch.equal(gpu_scale_O.cpu(), scale_O)
            former = ternary_operands(w_OI, scale_O, 0, row_dtype, True, former)
            gpu_former = ternary_operands(w_OI.cuda(), gpu_scale_O, 0, row_dtype, True, gpu_former)
            assert isinstance(gpu_former, TernaryOperands)
            assert_same_bits(gpu_former, former)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "groups"), [((64, 2048, 1408), 1), ((64, 2816, 2048), 2), ((8, 100, 5460), 1)])
def test_one_launch_on_a_gpu_equals_its_steps(shape, groups):
    """Experts of real models, over two values of the weights, ten times: programs wait for each other."""
    from bitmoe_kernels.weight_quant import triton_one_launch

    former = wanted_former = None
    for seed in range(10):
        generator = torch.Generator("cuda").manual_seed(seed)
        w_OI = torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        assert triton_one_launch.takes_one_launch(w_OI, groups, -2)
        wanted_G = absmean_scale(absmean_sums(w_OI, groups), shape[-1] * shape[-2] // groups)
        wanted_former = ternary_operands(w_OI, wanted_G, 0, E4M3, True, wanted_former)
        scale_G, former = absmean_operands(w_OI, groups, 0, E4M3, True, former)
        assert_same_bits([scale_G, *former], [wanted_G, *wanted_former])

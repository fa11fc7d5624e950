"""Packed 4-bit codes: every code comes back bit for bit, by the reference and by Triton, and bad input is refused."""

# Shapes: T = tokens, D = features, B = bytes of a row.

import pytest
import torch

from bitmoe_kernels.act_pack import pack_codes, unpack_codes
from bitmoe_kernels.act_pack.reference import pack_codes_reference, unpack_codes_reference
from bitmoe_kernels.act_quant import quantize_fp4, quantize_int4

CODES = {"int4": list(range(-8, 8)), "fp4": [c * sign for sign in (1, -1) for c in (0, 1, 2, 3, 4, 6, 8, 12)]}
CODE_DTYPES = [torch.int8, torch.float8_e4m3fn]
SHAPES = [(1, 1), (3, 7), (5, 100), (2, 3, 33), (600, 8), (2, 5460), (1, 10001), (0, 8)]

each_format = pytest.mark.parametrize("num_format", CODES)
each_dtype = pytest.mark.parametrize("code_dtype", CODE_DTYPES, ids=str)


@pytest.fixture
def kernels(triton_device, poison):
    """The functions under test, imported when the interpreter has been chosen; new memory holds garbage."""
    from bitmoe_kernels.act_pack import triton_kernels

    return triton_kernels


def random_codes(num_format: str, *shape: int, code_dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """The same random codes on every call."""
    places = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(1))
    return torch.tensor(CODES[num_format], dtype=torch.int8)[places].to(code_dtype)


def assert_exact(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Every bit, the sign of zero too."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert torch.equal(result.cpu().view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_int4_by_hand():
    """Two's complement; low codes first, the last high field of five codes empty."""
    packed = pack_codes(torch.tensor([[1, -1, 7, -8, 0]], dtype=torch.int8), "int4")
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0x81, 0x0F, 0x07]]


def test_fp4_by_hand():
    """Bits of E2M1: sign, exponent, mantissa."""
    packed = pack_codes(torch.tensor([[1, 2, 3, 4, -6, 8, 12, -12]], dtype=torch.int8), "fp4")
    assert packed.tolist() == [[0xD1, 0x62, 0x73, 0xF4]]


@each_format
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_come_back(num_format, code_dtype, shape):
    codes_TD = random_codes(num_format, *shape, code_dtype=code_dtype)
    packed_TB = pack_codes(codes_TD, num_format)
    assert packed_TB.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert_exact(unpack_codes(packed_TB, shape[-1], num_format, code_dtype), codes_TD)
    # The bytes do not depend on the type of the codes.
    assert_exact(packed_TB, pack_codes(codes_TD.to(torch.int8), num_format))


@each_dtype
def test_codes_of_the_quantizers_come_back(code_dtype):
    x_TD = torch.randn(20, 33, generator=torch.Generator().manual_seed(0))
    x_TD[3] *= 100
    for num_format, quantize in (("int4", quantize_int4), ("fp4", quantize_fp4)):
        codes_TD, _ = quantize(x_TD, code_dtype)
        assert_exact(unpack_codes(pack_codes(codes_TD, num_format), 33, num_format, code_dtype), codes_TD)


@each_format
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_reference(kernels, triton_device, num_format, code_dtype, shape):
    """Odd sizes, several programs and part-filled tiles."""
    codes_TD = random_codes(num_format, *shape, code_dtype=code_dtype)
    packed_TB = pack_codes_reference(codes_TD, num_format)
    assert_exact(kernels.pack_codes_triton(codes_TD.to(triton_device), num_format), packed_TB)
    unpacked = kernels.unpack_codes_triton(packed_TB.to(triton_device), shape[-1], num_format, code_dtype)
    assert_exact(unpacked, unpack_codes_reference(packed_TB, shape[-1], num_format, code_dtype))
    assert_exact(unpacked, codes_TD)


@each_format
@each_dtype
def test_triton_takes_all_pairs_of_codes(kernels, triton_device, num_format, code_dtype):
    pairs = torch.cartesian_prod(*[torch.tensor(CODES[num_format], dtype=torch.int8)] * 2).to(code_dtype)
    packed = kernels.pack_codes_triton(pairs.to(triton_device), num_format)
    assert_exact(packed, pack_codes_reference(pairs, num_format))
    assert_exact(kernels.unpack_codes_triton(packed, 2, num_format, code_dtype), pairs)


@each_format
@each_dtype
def test_triton_takes_strided_rows(kernels, triton_device, num_format, code_dtype):
    codes_TD = random_codes(num_format, 6, 20)
    strided = codes_TD.t().contiguous().to(code_dtype).to(triton_device).t()
    packed = kernels.pack_codes_triton(strided, num_format)
    assert_exact(packed, pack_codes_reference(codes_TD, num_format))
    strided = packed.t().contiguous().t()
    assert_exact(kernels.unpack_codes_triton(strided, 20, num_format, code_dtype), codes_TD.to(code_dtype))


@pytest.mark.gpu
@each_format
@each_dtype
def test_public_functions_on_a_gpu_equal_cpu(num_format, code_dtype):
    for shape in ((64, 4096), (33, 2049), (0, 16)):
        codes_TD = random_codes(num_format, *shape, code_dtype=code_dtype)
        packed = pack_codes(codes_TD.cuda(), num_format)
        assert_exact(packed, pack_codes(codes_TD, num_format))
        assert_exact(unpack_codes(packed, shape[-1], num_format, code_dtype), codes_TD)


@pytest.mark.gpu
def test_more_than_2_to_31_elements(kernels):
    """Offsets beyond int32: the last rows, in the same call, equal those rows alone."""
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    codes_TD = torch.zeros(2**31 // 4096 + 8, 4096, dtype=torch.int8, device="cuda")
    codes_TD[-9:] = random_codes("int4", 9, 4096).cuda()
    packed_TB = kernels.pack_codes_triton(codes_TD, "int4")
    assert_exact(packed_TB[-9:], pack_codes_reference(codes_TD[-9:].cpu(), "int4"))
    assert torch.equal(kernels.unpack_codes_triton(packed_TB, 4096, "int4", torch.int8)[-9:], codes_TD[-9:])


@pytest.mark.parametrize(("num_format", "bad"), [("int4", 8), ("int4", -9), ("fp4", 5), ("fp4", 9), ("fp4", 127)])
@each_dtype
def test_refuses_what_is_no_code(num_format, bad, code_dtype):
    codes = torch.tensor([[0, bad, 1]], dtype=torch.int8).to(code_dtype)
    with pytest.raises(ValueError, match=f"1 numbers that are no codes of {num_format}"):
        pack_codes(codes, num_format)


def test_refuses_types_formats_and_shapes():
    codes, packed = torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(TypeError, match="int8 or float8_e4m3fn tensor, got torch.int32"):
        pack_codes(codes.int(), "int4")
    with pytest.raises(TypeError, match="uint8 tensor, got torch.int8"):
        unpack_codes(codes, 4, "int4")
    for call in (lambda: pack_codes(codes, "int8"), lambda: unpack_codes(packed, 4, "int8")):
        with pytest.raises(ValueError, match="num_format='int8': use one of int4, fp4"):
            call()
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="at least one feature"):
            pack_codes(torch.zeros(shape, dtype=torch.int8), "int4")
    for num_features in (2, 5, 0):
        with pytest.raises(ValueError, match=f"a row of num_features={num_features} takes"):
            unpack_codes(packed, num_features, "int4")
    with pytest.raises(ValueError, match="code_dtype=torch.int16"):
        unpack_codes(packed, 4, "int4", torch.int16)

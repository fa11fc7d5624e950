"""Packed ternary codes: bytes by hand, round trips, the AND of the kernels and damaged bytes."""

# Shapes: O = output rows, I = input features, B = bytes of a row.

import itertools

import pytest
import torch

from bitmoe_kernels.ternary_pack import pack, packed_width, unpack
from bitmoe_kernels.ternary_pack.reference import pack_2bit_reference, unpack_2bit_reference

LAYOUTS = ["2bit", "1.6bit"]
SIZES = [1, 3, 4, 5, 255, 256, 257, 300, 512, 1024 + 12]

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_size = pytest.mark.parametrize("num_features", SIZES)


def random_codes(*shape: int) -> torch.Tensor:
    """The same ternary codes on every call."""
    return torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(5))


def test_2bit_hand_values():
    """Six features take m = 2 bytes: features 0, 2, 4 and the end in one, 1, 3, 5 and the end in the other."""
    codes_OI = torch.tensor([[1, -1, 0, 1, -1, 0], [0, 0, 0, 0, 0, -1]], dtype=torch.int8)
    packed = pack(codes_OI)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0b01_00_11_00, 0b11_01_00_00], [0, 0b00_00_11_00]]


def test_2bit_hand_values_of_two_blocks():
    """260 features: 64 bytes of a whole block with features 64 apart, and one byte with the other four."""
    codes_I = torch.zeros(260, dtype=torch.int8)
    codes_I[[0, 63, 64, 129, 255]] = torch.tensor([1, -1, 1, -1, 1], dtype=torch.int8)
    codes_I[256:] = torch.tensor([-1, 1, 0, 1])
    expected = [0] * 65
    expected[0], expected[1] = 0b01_01_00_00, 0b00_00_11_00
    expected[63], expected[64] = 0b11_00_00_01, 0b11_01_00_01
    assert pack(codes_I).tolist() == expected


def test_base3_hand_values():
    """Digits 2 0 1 1 0 make 2 + 9 + 27 = 38; a lone +1 is followed by four digits 1: 2 + 3 + 9 + 27 + 81 = 122."""
    codes_I = torch.tensor([1, -1, 0, 0, -1, 1], dtype=torch.int8)
    assert pack(codes_I, "1.6bit").tolist() == [38, 122]


@each_layout
@each_size
def test_round_trip(num_features, layout):
    for leading in [(7,), (2, 3), (), (0,), (3, 0)]:
        codes = random_codes(*leading, num_features)
        packed = pack(codes, layout)
        assert packed.shape == (*leading, packed_width(num_features, layout))
        for check in (True, False):
            unpacked = unpack(packed, num_features, layout, check=check)
            assert unpacked.dtype == torch.int8
            assert torch.equal(unpacked, codes)


@each_size
def test_2bit_equals_the_reference(num_features):
    codes_OI = random_codes(6, num_features)
    packed_OB = pack(codes_OI)
    assert torch.equal(packed_OB, pack_2bit_reference(codes_OI))
    assert torch.equal(unpack_2bit_reference(packed_OB, num_features), codes_OI)


@each_layout
def test_strided_rows(layout):
    codes_OI = random_codes(9, 300)
    packed_OB = pack(codes_OI, layout)
    assert torch.equal(pack(codes_OI.t().contiguous().t(), layout), packed_OB)
    assert torch.equal(unpack(packed_OB.t().contiguous().t(), 300, layout), codes_OI)


def test_packed_width():
    assert [packed_width(size) for size in SIZES] == [1, 1, 1, 2, 64, 64, 65, 75, 128, 259]
    assert [packed_width(size, "1.6bit") for size in SIZES] == [1, 1, 1, 1, 51, 52, 52, 60, 103, 208]


def test_2bit_planes_by_one_and():
    """(byte << 2 p) & 0xC0 as int8 is 64 times plane p of a block; as fp16 and fp8 bits it is 2.0 times the code."""
    codes_OI = random_codes(8, 512)
    planes_OBpb = codes_OI.unflatten(-1, (2, 4, 64))
    blocks_OBb = pack(codes_OI).unflatten(-1, (2, 64))
    for plane in range(4):
        top_OBb = (blocks_OBb << (2 * plane)) & 0xC0
        assert torch.equal(top_OBb.view(torch.int8), 64 * planes_OBpb[..., plane, :])
        twice_OBb = 2.0 * planes_OBpb[..., plane, :]
        assert torch.equal(top_OBb.view(torch.float8_e4m3fn).float(), twice_OBb)
        assert torch.equal((top_OBb.view(torch.int8).short() << 8).view(torch.float16).float(), twice_OBb)


def test_2bit_blocks_of_256_stand_alone():
    """A row cut at multiples of 256 features needs no repacking."""
    codes_OI = random_codes(4, 700)
    parts = [pack(part) for part in codes_OI.split(256, dim=-1)]
    assert torch.equal(pack(codes_OI), torch.cat(parts, dim=-1))


def test_base3_every_byte():
    """All 243 words of five codes make all bytes up to 242; every other byte is refused."""
    words_O5 = torch.tensor([word[::-1] for word in itertools.product((-1, 0, 1), repeat=5)], dtype=torch.int8)
    assert pack(words_O5, "1.6bit").flatten().tolist() == list(range(243))
    bytes_OB = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(unpack(bytes_OB[:243], 5, "1.6bit"), words_O5)
    for damaged in range(243, 256):
        with pytest.raises(ValueError, match="holds 1 bytes that are no ternary codes"):
            unpack(bytes_OB[damaged], 5, "1.6bit")


def test_2bit_every_byte():
    """The 81 bytes without a field `10` unpack, and pack again to themselves; the others are refused."""
    allowed = 0
    for byte in range(256):
        packed_B = torch.tensor([byte], dtype=torch.uint8)
        if any(byte >> shift & 3 == 0b10 for shift in (0, 2, 4, 6)):
            with pytest.raises(ValueError, match="holds 1 bytes that are no ternary codes"):
                unpack(packed_B, 4)
        else:
            allowed += 1
            assert torch.equal(pack(unpack(packed_B, 4)), packed_B)
    assert allowed == 81


@pytest.mark.parametrize("byte", [0, 63, 64, 74])
def test_2bit_damage_anywhere_raises(byte):
    packed_OB = pack(torch.zeros(3, 300, dtype=torch.int8))
    packed_OB[1, byte] |= 0b10_00_00_00
    with pytest.raises(ValueError, match=r"packed of shape \[3, 75\] in layout 2bit holds 1 bytes"):
        unpack(packed_OB, 300)


@pytest.mark.parametrize(
    ("num_features", "layout", "byte", "value"),
    [
        (3, "2bit", 0, 0b00_00_00_01),
        (257, "2bit", 64, 0b00_11_00_00),
        (258, "2bit", 64, 0b00_00_01_00),
        (261, "2bit", 65, 0b00_00_00_11),
        (262, "2bit", 65, 0b00_00_00_01),
        (4, "1.6bit", 0, 121 + 81),
        (6, "1.6bit", 1, 121 - 3),
    ],
)
def test_codes_beyond_the_end_raise(num_features, layout, byte, value):
    packed_OB = pack(torch.zeros(2, num_features, dtype=torch.int8), layout)
    packed_OB[1, byte] = value
    with pytest.raises(ValueError, match=f"holds codes beyond feature {num_features}"):
        unpack(packed_OB, num_features, layout)


@pytest.mark.parametrize("bad", [-128, -2, 2, 127])
@each_layout
def test_codes_that_are_not_ternary_raise(layout, bad):
    codes_OI = random_codes(3, 10)
    codes_OI[2, 9] = bad
    with pytest.raises(ValueError, match=rf"codes of shape \[3, 10\] reach from .*{bad}"):
        pack(codes_OI, layout)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unpack(torch.zeros(2, 64, dtype=torch.uint8), 257), r"shape \[2, 64\]: .* 257 codes takes 65 bytes"),
        (lambda: unpack(torch.zeros(2, 64, dtype=torch.uint8), 252), "252 codes takes 63 bytes"),
        (lambda: unpack(torch.zeros(2, 64, dtype=torch.uint8), 256, "1.6bit"), "takes 52 bytes in 1.6bit"),
        (lambda: unpack(torch.tensor(0, dtype=torch.uint8), 1), r"packed has shape \[\]"),
        (lambda: unpack(torch.zeros(2, 0, dtype=torch.uint8), 0), "num_features=0"),
        (lambda: pack(torch.zeros(2, 0, dtype=torch.int8)), "num_features=0"),
        (lambda: pack(torch.tensor(0, dtype=torch.int8)), "num_features=0"),
        (lambda: pack(random_codes(2, 4), "3bit"), "layout='3bit': use one of 2bit, 1.6bit"),
        (lambda: packed_width(-3), "num_features=-3"),
    ],
)
def test_bad_values_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_types_raise():
    with pytest.raises(TypeError, match=r"codes must be a torch\.int8 tensor, got torch\.float32"):
        pack(torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"packed must be a torch\.uint8 tensor, got torch\.int8"):
        unpack(random_codes(2, 1), 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_layout
@each_size
def test_cuda_equals_cpu(num_features, layout):
    codes_OI = random_codes(5, num_features)
    packed_OB = pack(codes_OI.cuda(), layout)
    assert torch.equal(packed_OB.cpu(), pack(codes_OI, layout))
    assert torch.equal(unpack(packed_OB, num_features, layout).cpu(), codes_OI)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_layout
def test_unchecked_unpack_in_a_cuda_graph(layout):
    """Replayed on other bytes, the graph gives their codes: nothing in it waited for the device or kept a value."""
    packed_OB = torch.zeros(5, packed_width(300, layout), dtype=torch.uint8, device="cuda")
    unpack(packed_OB, 300, layout, check=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unpacked_OI = unpack(packed_OB, 300, layout, check=False)
    packed_OB.copy_(pack(random_codes(5, 300), layout))
    graph.replay()
    assert torch.equal(unpacked_OI.cpu(), random_codes(5, 300))

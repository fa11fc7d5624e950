"""Packing of four codes a byte against a known vector and against transformers' own packer."""

import pytest
import torch
from transformers.integrations.bitnet import pack_weights

from bitmoe.convert.hf_packing import pack_rows, unpack_rows


def random_codes(*shape):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(5)).to(torch.int8)


def test_known_vector():
    numbers = torch.arange(48)
    codes = (((7 * numbers + numbers // 5) % 3) - 1).to(torch.int8).view(8, 6)
    packed = pack_rows(codes)
    assert packed.shape == (2, 6)
    assert packed.numpy().tobytes().hex() == "588116600558811660055881"
    assert torch.equal(unpack_rows(packed), codes)


@pytest.mark.parametrize("shape", [(4, 1), (8, 6), (64, 33), (100, 7)])
def test_packs_as_transformers_does_and_back(shape):
    codes = random_codes(*shape)
    packed = pack_rows(codes)
    # transformers changes its argument.
    assert torch.equal(packed, pack_weights(codes.clone()))
    assert torch.equal(unpack_rows(packed), codes)


def test_one_row_of_a_byte_is_a_quarter_of_the_matrix_away():
    codes = torch.zeros(8, 1, dtype=torch.int8)
    codes[5] = 1
    # Row 5 is row 1 of the third quarter: bits 4 and 5 of byte 1.
    assert pack_rows(codes).flatten().tolist() == [0b01010101, 0b01100101]


@pytest.mark.parametrize("rows", [1, 6, 7])
def test_rows_that_do_not_fill_bytes_are_refused(rows):
    with pytest.raises(ValueError, match=f"{rows} rows"):
        pack_rows(random_codes(rows, 3))


@pytest.mark.parametrize("value", [2, -2])
def test_codes_that_are_not_ternary_are_refused(value):
    codes = random_codes(8, 3)
    codes[2, 1] = value
    with pytest.raises(ValueError, match=str(value)):
        pack_rows(codes)


@pytest.mark.parametrize("quarter", range(4))
def test_bytes_that_no_codes_make_are_refused(quarter):
    packed = pack_rows(random_codes(16, 5))
    packed[1, 3] |= 3 << 2 * quarter
    with pytest.raises(ValueError, match="1 of 20 bytes"):
        unpack_rows(packed)

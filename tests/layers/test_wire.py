"""Codes on the wire: as few bytes as promised, back bit for bit, alone and through the sequence-parallel gather."""

# Shapes: S = sequence, B = batch, H = hidden.

import pytest
import torch
import torch.distributed as dist

from bitmoe.config.choices import ActFormat, Wire
from bitmoe.config.schema import ParallelConfig
from bitmoe.layers.bit_linear import gathered_tokens
from bitmoe.layers.wire import CodeWire
from bitmoe.parallel.process_groups import make_groups, start

FEATURES = 34
CODES = {
    ActFormat.int8: range(-128, 128),
    ActFormat.int4: range(-8, 8),
    ActFormat.fp4: (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12),
}
CASES = [
    (ActFormat.int8, torch.int8, FEATURES),
    (ActFormat.int4, torch.int8, FEATURES // 2),
    (ActFormat.int4, torch.float8_e4m3fn, FEATURES // 2),
    (ActFormat.fp4, torch.int8, FEATURES // 2),
    (ActFormat.fp4, torch.float8_e4m3fn, FEATURES // 2),
]

each_case = pytest.mark.parametrize(("act_format", "dtype", "num_bytes"), CASES, ids=str)
each_wire = pytest.mark.parametrize("wire", Wire, ids=lambda wire: wire.value)


def random_codes(act_format, dtype, seed=0):
    codes = torch.tensor(CODES[act_format], dtype=torch.int8)
    places = torch.randint(0, len(codes), (6, 2, FEATURES), generator=torch.Generator().manual_seed(seed))
    return codes[places].to(dtype)


def same_bits(x, y):
    return x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@each_wire
@each_case
def test_codes_come_back(act_format, dtype, num_bytes, wire):
    codes_SBH, code_wire = random_codes(act_format, dtype), CodeWire(wire, act_format)
    sent = code_wire.sent(codes_SBH)
    assert sent[0, 0].nbytes == (num_bytes if wire is Wire.codes else 2 * FEATURES)
    assert same_bits(code_wire.received(sent, codes_SBH), codes_SBH)


@each_wire
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_travel_as_they_are(wire, dtype):
    x_TH = torch.randn(3, 5, dtype=torch.float64).to(dtype)
    code_wire = CodeWire(wire, ActFormat.none)
    assert same_bits(code_wire.sent(x_TH), x_TH)
    assert same_bits(code_wire.received(code_wire.sent(x_TH), x_TH), x_TH)


def gather(act_format, dtype, wire):
    """What a rank has of all ranks' codes and scales."""
    start()
    group = make_groups(ParallelConfig(tensor=2, sequence=True)).tp
    codes_SBH = random_codes(act_format, dtype, seed=dist.get_rank())
    scale_SB1 = torch.full((6, 2, 1), float(dist.get_rank()))
    codes_TH, scale_T1 = gathered_tokens(codes_SBH, scale_SB1, group, CodeWire(wire, act_format))
    return codes_TH.view(torch.int8), codes_TH.dtype, scale_T1


@each_wire
@each_case
def test_gathered(act_format, dtype, num_bytes, wire, ranks):
    wanted = torch.cat([random_codes(act_format, dtype, seed).view(torch.int8) for seed in range(2)])
    for codes_TH, got_dtype, scale_T1 in ranks(2).run(gather, act_format, dtype, wire):
        assert got_dtype == dtype
        assert torch.equal(codes_TH, wanted.flatten(0, 1))
        assert scale_T1[:, 0].tolist() == [0.0] * 12 + [1.0] * 12

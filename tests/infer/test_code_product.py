"""Every way of multiplying codes with packed weights gives the exact integer sums."""

import pytest
import torch

from bitmoe.infer import code_product as module
from bitmoe.infer.code_product import code_product
from bitmoe_kernels.ternary_pack import pack


def codes(*shape, low, high, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("chunk_bytes", [2**20, 1000])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize(
    ("groups", "width", "outputs"), [(1, 1, 1), (1, 256, 7), (1, 600, 64), (2, 128, 33), (4, 83, 96), (8, 256, 10)]
)
def test_exact(groups, width, outputs, num_tokens, chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    x = codes(num_tokens, groups, width, low=-128, high=128)
    w = codes(outputs, groups * width, low=-1, high=2)
    wanted = torch.einsum("tgi,ogi->gto", x.double(), w.view(outputs, groups, width).double())
    got = code_product(x, pack(w))
    assert got.dtype == torch.float32
    assert torch.equal(got.double(), wanted)


def test_largest_sums():
    """All codes at their bounds: nothing overflows on the way."""
    w = torch.ones(2, 11008, dtype=torch.int8)
    w[1] = -1
    for value in (-128, 127):
        x = torch.full((1, 1, 11008), value, dtype=torch.int8)
        assert code_product(x, pack(w)).flatten().tolist() == [value * 11008, -value * 11008]


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_batch_of_matrices(num_tokens):
    x = codes(3, num_tokens, 2, 100, low=-8, high=8)
    w = codes(3, 20, 200, low=-1, high=2)
    wanted = torch.einsum("btgi,bogi->bgto", x.double(), w.view(3, 20, 2, 100).double())
    assert torch.equal(code_product(x, pack(w)).double(), wanted)
    assert torch.equal(module._unpacked_product(x, pack(w)).double(), wanted)

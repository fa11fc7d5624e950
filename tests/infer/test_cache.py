"""The low-bit cache: what it holds, what it takes, and how the order of calls does not matter."""

import pytest
import torch

from bitmoe.config.errors import InputError
from bitmoe.infer import LowBitCache
from bitmoe.infer.cache import LowBitLayer
from bitmoe_kernels.kv_quant import dequantize_kv, quantize_kv


def states(batch=2, heads=3, length=40, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, length, width, generator=generator) for _ in "kv")


def stored(x, bits):
    return dequantize_kv(*quantize_kv(x, bits), bits, x.shape[-1], x.dtype)


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("pieces", [[40], [1] * 40, [5, 1, 1, 30, 1, 2]], ids=["at once", "one by one", "in pieces"])
def test_holds_what_was_quantized(bits, pieces):
    k, v = states()
    layer = LowBitLayer(bits)
    for k_part, v_part in zip(k.split(pieces, 2), v.split(pieces, 2), strict=True):
        got = layer.update(k_part, v_part)
    for x, kept in zip((k, v), got, strict=True):
        assert torch.equal(kept[:, :, 1:], stored(x, bits)[:, :, 1:])
        assert torch.equal(kept[:, :, :1], stored(x[:, :, :1], 4))
    assert layer.get_seq_length() == 40


def test_beginning_of_padded_rows():
    """Rows begin where position 0 stands last; padding in front may say 0 or 1."""
    k, v = states(length=6)
    position_ids = torch.tensor([[0, 0, 0, 1, 2, 3], [1, 1, 1, 1, 0, 1]])
    got, _ = LowBitLayer(3).update(k, v, position_ids=position_ids)
    wanted = stored(k, 3)
    wanted[0, :, 2], wanted[1, :, 4] = stored(k[0, :, 2], 4), stored(k[1, :, 4], 4)
    assert torch.equal(got, wanted)


def test_beginning_in_a_later_piece():
    k, v = states(length=6)
    layer, positions = LowBitLayer(3), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]])
    layer.update(k[:, :, :2], v[:, :, :2], position_ids=positions[:, :2])
    got, _ = layer.update(k[:, :, 2:], v[:, :, 2:], position_ids=positions[:, 2:])
    wanted = stored(k, 3)
    wanted[0, :, 0], wanted[1, :, 3] = stored(k[0, :, 0], 4), stored(k[1, :, 3], 4)
    assert torch.equal(got, wanted)


def test_bytes():
    """3 bits of 128 features and a scale, with all there is beside them."""
    cache = LowBitCache(num_layers=2, bits=3)
    assert cache.nbytes == 0
    k, v = states(batch=1, heads=8, length=512, width=128)
    for layer in range(2):
        cache.update(k.bfloat16(), v.bfloat16(), layer)
    as_bf16 = 2 * 2 * k.numel() * 2
    assert as_bf16 / 5.2 < cache.nbytes <= as_bf16 / 4.9


def test_little_room_is_idle():
    k, v = states(length=1, width=64)
    layer = LowBitLayer(4)
    capacities = []
    for _ in range(2000):
        layer.update(k, v)
        capacities.append(layer.capacity)
    assert len(set(capacities)) < 20
    assert all(capacity <= max(64, length * 1.25 + 64) for length, capacity in enumerate(capacities, 1))


@pytest.mark.parametrize("bits", [4, 3])
def test_batch_changes(bits):
    k, v = states(batch=3)
    layer = LowBitLayer(bits)
    layer.update(k, v, position_ids=torch.arange(40) - torch.tensor([[0], [2], [4]]))
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    new_k, new_v = states(batch=2, length=1, seed=1)
    got, _ = layer.update(new_k, new_v)
    fresh = LowBitLayer(bits)
    fresh.update(k[[2, 0]], v[[2, 0]], position_ids=torch.arange(40) - torch.tensor([[4], [0]]))
    wanted, _ = fresh.update(new_k, new_v)
    assert torch.equal(got, wanted)


def test_crop_and_reset():
    k, v = states()
    layer = LowBitLayer(3)
    layer.update(k, v)
    layer.crop(-10)
    assert layer.get_seq_length() == 30
    got, _ = layer.update(k[:, :, 30:], v[:, :, 30:])
    assert torch.equal(got, LowBitLayer(3).update(k, v)[0])
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes) == (0, 0)
    assert torch.equal(layer.update(v, k)[0], LowBitLayer(3).update(v, k)[0])


def test_other_bits_are_refused():
    with pytest.raises(InputError, match="8 bits"):
        LowBitCache(2, bits=8)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.2), (3, 0.4)])
def test_logits_stay_close(bits, tolerance, configs, make_pair):
    """Relative error of the logits of a random model, whose attention is as flat as can be."""
    model = make_pair(configs["unquantized"]).model
    ids = torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(0))
    wanted = model(ids).logits
    cache = LowBitCache(model.config.num_hidden_layers, bits)
    got = model(ids, past_key_values=cache).logits
    assert (got - wanted).norm() / wanted.norm() < tolerance
    assert not torch.equal(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 3])
def test_token_by_token_is_at_once(bits, configs, make_pair):
    model = make_pair(configs["unquantized"], kv_bits=bits).model
    ids = torch.randint(100, (1, 20), generator=torch.Generator().manual_seed(0))
    cache, steps = None, []
    for position in range(20):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, [*steps, out.logits]
    wanted = model(ids, use_cache=True).logits
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-4, atol=1e-4)

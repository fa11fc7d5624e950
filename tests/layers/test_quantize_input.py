"""What feeds a linear: values against plain torch, straight-through gradients, memory of the carrier, statistics."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitmoe.config.choices import ActFormat
from bitmoe.config.schema import BitStage, QuantConfig
from bitmoe.layers.quantize_input import (
    flat_tokens,
    normalize_groups,
    normalize_rows,
    normalize_rows_for_router,
    quantize_groups,
    quantize_rows,
)
from bitmoe.quant.policy import QuantPolicy
from bitmoe_kernels.act_quant import quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.sparsify import topk_mask

# Shapes: S = sequence, B = batch, F = features, G = groups, E = experts, R = rows sorted by expert.

SEQUENCE, BATCH, FEATURES, KEEP, EPS = 7, 3, 24, 0.5, 1e-3
QUANTIZERS = {ActFormat.int8: quantize_int8, ActFormat.int4: quantize_int4, ActFormat.fp4: quantize_fp4}
FORMATS = pytest.mark.parametrize("act_format", QUANTIZERS, ids=lambda act_format: act_format.name)
GROUPS = pytest.mark.parametrize("groups", [1, 4])
# Experts 1 and 3 of four get no row; their gain's gradient is zero.
EXPERT_R = torch.tensor([0] * 8 + [2] * 13, dtype=torch.int32)


def make_policy(act_format=ActFormat.int8, keep=KEEP):
    stage = BitStage(qkv=act_format, o=act_format, o_keep=keep, gate_up=act_format, down=act_format)
    return QuantPolicy(QuantConfig(stages=[stage]))


def randn(*shape, dtype=torch.float64, seed=0):
    """Random numbers that are bf16 numbers, so that every dtype starts from the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().to(dtype)


def leaves(*tensors):
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def straight_through(x, act_format, groups=1, keep=1.0):
    """Dequantized codes of each group, whose gradient is that of x."""
    x_Gd = x.detach().unflatten(-1, (groups, -1))
    codes, scale = QUANTIZERS[act_format](x_Gd)
    mask = topk_mask(x_Gd, keep) if keep < 1 else torch.ones_like(codes)
    return x + ((codes * mask * scale).flatten(-2) - x).detach()


def rms_norm(x, gain, groups=1):
    x_Gd = x.unflatten(-1, (groups, -1))
    return (x_Gd / (x_Gd.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2) * gain


def relu2_glu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return gate.relu().square() * up


def values(quantized):
    """codes * scale, group by group."""
    codes, scale = quantized.codes_TD.double(), quantized.scale_TG.double()
    return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


class Norm(torch.nn.Module):
    """What is asked of RMSNorm, which itself needs megatron-core's device: eps, weight, and the weight by a call."""

    eps = EPS

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self):
        return self.weight


def make_norm(gain, dtype=torch.float64):
    return Norm(gain.to(dtype, copy=True))


def assert_agrees(quantized, wanted, got_leaves, wanted_leaves):
    """Same values, and same gradients of the leaves."""
    torch.testing.assert_close(values(quantized), wanted.detach())
    grad = randn(*wanted.shape, seed=9)
    torch.testing.assert_close(
        torch.autograd.grad(quantized.carrier_TD, got_leaves, grad), torch.autograd.grad(wanted, wanted_leaves, grad)
    )


@FORMATS
def test_quantize_rows(act_format):
    got, wanted = leaves(*[randn(SEQUENCE, BATCH, FEATURES)] * 2)
    quantized = quantize_rows(got, "qkv", make_policy(act_format))
    assert_agrees(quantized, straight_through(wanted, act_format), got, wanted)
    assert quantized.scale_TG.shape == (SEQUENCE, BATCH, 1)


@GROUPS
@FORMATS
def test_quantize_groups(act_format, groups):
    got, wanted = leaves(*[randn(SEQUENCE, BATCH, FEATURES)] * 2)
    quantized = quantize_groups(got, "o", make_policy(act_format), groups, None)
    assert_agrees(quantized, straight_through(wanted, act_format, groups, KEEP), got, wanted)
    assert quantized.scale_TG.shape == (SEQUENCE, BATCH, groups)


@FORMATS
def test_normalize_rows(act_format):
    x, gain = randn(SEQUENCE, BATCH, FEATURES), 1 + 0.2 * randn(FEATURES, seed=1)
    (got,), (wanted, wanted_gain) = leaves(x), leaves(x, gain)
    norm = make_norm(gain)
    residual, quantized = normalize_rows(got, norm, "qkv", make_policy(act_format))
    assert torch.equal(residual, x)
    wanted_hat = straight_through(rms_norm(wanted, wanted_gain), act_format)
    assert_agrees(quantized, wanted_hat, (got, norm.weight), (wanted, wanted_gain))


def test_normalize_rows_adds_the_gradient_of_the_residual_stream():
    x, gain = randn(SEQUENCE, BATCH, FEATURES), 1 + 0.2 * randn(FEATURES, seed=1)
    (got,), (wanted, wanted_gain) = leaves(x), leaves(x, gain)
    norm = make_norm(gain)
    residual, quantized = normalize_rows(got, norm, "qkv", make_policy())
    grads = [randn(*x.shape, seed=seed) for seed in (2, 3)]
    torch.autograd.backward([residual * 3, quantized.carrier_TD], grads)
    torch.autograd.backward([wanted * 3, straight_through(rms_norm(wanted, wanted_gain), ActFormat.int8)], grads)
    torch.testing.assert_close((got.grad, norm.weight.grad), (wanted.grad, wanted_gain.grad))


def test_normalize_rows_for_router_adds_all_three_gradients():
    x, gain = randn(SEQUENCE, BATCH, FEATURES), 1 + 0.2 * randn(FEATURES, seed=1)
    (got,), (wanted, wanted_gain) = leaves(x), leaves(x, gain)
    norm = make_norm(gain)
    residual, y, quantized = normalize_rows_for_router(got, norm, "gate_up", make_policy(ActFormat.int4))
    wanted_y = rms_norm(wanted, wanted_gain)
    torch.testing.assert_close(y, wanted_y)
    grads = [randn(*x.shape, seed=seed) for seed in (2, 3, 4)]
    torch.autograd.backward([residual, y, quantized.carrier_TD], grads)
    torch.autograd.backward([wanted, wanted_y, straight_through(wanted_y, ActFormat.int4)], grads)
    torch.testing.assert_close((got.grad, norm.weight.grad), (wanted.grad, wanted_gain.grad))


def test_normalize_rows_of_which_only_the_residual_is_used():
    (x,), grad = leaves(randn(SEQUENCE, BATCH, FEATURES)), randn(SEQUENCE, BATCH, FEATURES, seed=2)
    residual, _ = normalize_rows(x, make_norm(torch.ones(FEATURES)), "qkv", make_policy())
    residual.backward(grad)
    assert torch.equal(x.grad, grad)


@GROUPS
@FORMATS
def test_normalize_groups(act_format, groups):
    x, gain = randn(SEQUENCE, BATCH, FEATURES), 1 + 0.2 * randn(FEATURES, seed=1)
    got, wanted = leaves(x, gain), leaves(x, gain)
    quantized = normalize_groups(*got, EPS, "o", make_policy(act_format), groups)
    assert_agrees(quantized, straight_through(rms_norm(*wanted, groups), act_format, groups, KEEP), got, wanted)


# Every producer: of input and gain, with the width of its input.
PRODUCERS = {
    "quantize_rows": (lambda x, gain, policy: quantize_rows(x, "qkv", policy), 1),
    "quantize_groups": (lambda x, gain, policy: quantize_groups(x, "o", policy, 4, None), 1),
    "normalize_rows": (lambda x, gain, policy: normalize_rows(x, gain, "qkv", policy)[1], 1),
    "normalize_groups": (lambda x, gain, policy: normalize_groups(x, gain.weight, EPS, "o", policy, 4), 1),
}
EACH_PRODUCER = pytest.mark.parametrize("name", PRODUCERS)


def produce(name, dtype, policy):
    """The quantized input, and the leaves that have gradients."""
    make, width = PRODUCERS[name]
    (x,) = leaves(randn(SEQUENCE, BATCH, width * FEATURES, dtype=dtype))
    norm = make_norm(1 + 0.25 * randn(FEATURES, seed=1).sign(), dtype)
    has_gain = not name.startswith("quantize")
    return make(x, norm, policy), (x, norm.weight) if has_gain else (x,)


@EACH_PRODUCER
def test_dtypes(name):
    """bf16 and fp32 give their own dtypes and the numbers of fp64, to their precision."""
    # Without top-K, which takes another of two numbers that are equal in bf16.
    policy = make_policy(keep=1.0)
    quantized, inputs = produce(name, torch.float64, policy)
    grad = randn(*quantized.carrier_TD.shape, seed=2)
    wanted = torch.autograd.grad(quantized.carrier_TD, inputs, grad)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        other, inputs = produce(name, dtype, policy)
        assert other.carrier_TD.dtype == dtype
        assert other.scale_TG.dtype == torch.float32
        assert other.codes_TD.shape == other.carrier_TD.shape == quantized.codes_TD.shape
        # An int8 step is 1/127 of the largest value of its group.
        error = (values(other) - values(quantized)).abs().unflatten(-1, (other.scale_TG.shape[-1], -1))
        assert (error <= (1.01 + 127 * tolerance) * other.scale_TG.unsqueeze(-1)).all()
        grads = torch.autograd.grad(other.carrier_TD, inputs, grad.to(dtype))
        for got, leaf, exact in zip(grads, inputs, wanted, strict=True):
            assert (got.dtype, got.shape) == (dtype, leaf.shape)
            assert (got.double() - exact).norm() < tolerance * exact.norm()


@EACH_PRODUCER
def test_carrier_takes_no_memory(name):
    quantized, _ = produce(name, torch.bfloat16, make_policy())
    assert quantized.carrier_TD.untyped_storage().nbytes() == 2
    flat = flat_tokens(quantized)
    assert flat.carrier_TD.shape == flat.codes_TD.shape == (SEQUENCE * BATCH, FEATURES)
    assert flat.carrier_TD.untyped_storage().nbytes() == 2
    assert torch.equal(flat.scale_TG, quantized.scale_TG.flatten(0, 1))


class _CodesMade(TorchDispatchMode):
    """Counts the int8 tensors that operations return."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += isinstance(result, torch.Tensor) and result.dtype == torch.int8
        return result


@EACH_PRODUCER
def test_backward_makes_no_gradients_of_codes(name):
    """By default autograd would fill a tensor of their size with zeros."""
    policy = make_policy()
    with _CodesMade() as forward:
        quantized, inputs = produce(name, torch.float32, policy)
    grad = torch.ones(quantized.carrier_TD.shape)
    with _CodesMade() as backward:
        torch.autograd.grad(quantized.carrier_TD, inputs, grad)
    assert forward.count > 0
    assert backward.count == 0


@EACH_PRODUCER
def test_statistics(name):
    policy = make_policy()
    produce(name, torch.float32, policy)
    assert policy.statistics.collect(torch.device("cpu")) == {}
    policy.statistics.recording = True
    quantized, _ = produce(name, torch.float32, policy)
    role = {"quantize_rows": "qkv", "normalize_rows": "qkv"}.get(name, "o")
    shares = policy.statistics.collect(torch.device("cpu"))
    assert set(shares) == {f"sparsity/{role}", f"clipped/{role}"}
    zeros = (quantized.codes_TD == 0).double().mean().item()
    assert shares[f"sparsity/{role}"] == pytest.approx(zeros, rel=1e-12)
    if role == "o":
        assert zeros >= 1 - KEEP


@pytest.mark.gpu
@pytest.mark.parametrize("act_format", [ActFormat.int4, ActFormat.fp4], ids=lambda act_format: act_format.name)
def test_four_bit_rows_are_float8_on_gpus(act_format):
    x = randn(SEQUENCE, BATCH, FEATURES, dtype=torch.bfloat16)
    on_cpu, on_gpu = (quantize_rows(t, "qkv", make_policy(act_format)) for t in (x, x.cuda()))
    assert on_cpu.codes_TD.dtype == torch.int8
    assert on_gpu.codes_TD.dtype == torch.float8_e4m3fn
    assert torch.equal(on_gpu.codes_TD.cpu().float(), on_cpu.codes_TD.float())
    assert torch.equal(on_gpu.scale_TG.cpu(), on_cpu.scale_TG)
    assert quantize_rows(x.cuda().float(), "qkv", make_policy(act_format)).codes_TD.dtype == torch.int8

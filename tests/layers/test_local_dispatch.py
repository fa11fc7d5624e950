"""The trip to experts on the same rank: the numbers of megatron-core's dispatcher, and gradients against formulas."""

import pytest
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from bitmoe.config.choices import ActFormat, Precision, Score, Wire
from bitmoe.config.schema import Config, ModelConfig, MoEConfig, ParallelConfig, RunConfig
from bitmoe.layers.dispatch import Dispatch
from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.layers.wire import CodeWire
from bitmoe.model.transformer_config import make_transformer_config
from bitmoe.parallel.process_groups import make_groups, start

# Shapes: T = tokens, E = experts, R = rows, H = hidden.

EXPERTS, HIDDEN = 5, 20


def make_map(num_tokens, topk, generator):
    """Random experts; the one in the middle gets no token."""
    scores_TE = torch.rand(num_tokens, EXPERTS, generator=generator)
    scores_TE[:, 2] = -1.0
    return torch.zeros(num_tokens, EXPERTS).scatter(1, scores_TE.topk(topk).indices, 1).bool()


def make_dispatch(routing_map_TE, topk):
    start()
    config = make_transformer_config(
        Config(
            model=ModelConfig(hidden_size=HIDDEN, num_attention_heads=2, vocab_size=10),
            moe=MoEConfig(num_experts=EXPERTS, ffn_hidden_size=8, router_topk=topk, score=Score.sigmoid),
            run=RunConfig(precision=Precision.fp32),
        )
    )
    groups = make_groups(ParallelConfig())
    dispatcher = MoEAlltoAllTokenDispatcher(EXPERTS, list(range(EXPERTS)), config=config, pg_collection=groups.mcore)
    return Dispatch(dispatcher, routing_map_TE, CodeWire(Wire.codes, ActFormat.none))


def trip(dispatch, x_TH, scale_T1, probs_TE, grad_TH):
    """All that comes out of one forward and backward, with experts that return the square of what they got."""
    rows_RH, scale_R1, probs_R1 = dispatch.send(x_TH, scale_T1, probs_TE)
    bytes_RH, *_ = dispatch.send((x_TH * 50).to(torch.float8_e4m3fn), scale_T1, probs_TE)
    y_RH = rows_RH.square().requires_grad_()
    out_TH = dispatch.combine(y_RH)
    out_TH.backward(grad_TH)
    dx_TH, dprobs_TE = dispatch.send_back(y_RH.grad, scale_R1 * probs_R1)
    return {
        "rows": rows_RH,
        "scales": scale_R1,
        "probs": probs_R1,
        "bytes": bytes_RH.view(torch.int8),
        "ends": dispatch.ends_E,
        "experts": dispatch.expert_R,
        "out": out_TH.detach(),
        "dy": y_RH.grad,
        "dx": dx_TH,
        "dprobs": dprobs_TE,
    }


def both_trips(num_tokens, topk, dtype):
    generator = torch.Generator().manual_seed(num_tokens + topk)
    routing_map_TE = make_map(num_tokens, topk, generator)
    x_TH, grad_TH = torch.randn(2, num_tokens, HIDDEN, generator=generator, dtype=dtype)
    scale_T1 = torch.rand(num_tokens, 1, generator=generator)
    probs_TE = routing_map_TE * torch.rand(num_tokens, EXPERTS, generator=generator, dtype=dtype)
    dispatches = make_dispatch(routing_map_TE, topk), LocalDispatch(routing_map_TE, topk)
    return [trip(dispatch, x_TH, scale_T1, probs_TE, grad_TH) for dispatch in dispatches]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_equals_dispatch(num_tokens, topk, dtype, ranks):
    [(wanted, result)] = ranks(1).run(both_trips, num_tokens, topk, dtype)
    for name, tensor in wanted.items():
        assert result[name].dtype == tensor.dtype, name
        assert torch.equal(result[name], tensor), name


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_gradients_of_a_bf16_model(topk):
    """Against autograd in fp64 of a sum over dense experts' outputs; gradients have the dtypes of their tensors."""
    generator = torch.Generator().manual_seed(topk)
    routing_map_TE = make_map(9, topk, generator)
    dispatch = LocalDispatch(routing_map_TE, topk)
    y_RH = torch.randn(9 * topk, HIDDEN, generator=generator).bfloat16().requires_grad_()
    grad_TH = torch.randn(9, HIDDEN, generator=generator).bfloat16()
    out_TH = dispatch.combine(y_RH)
    out_TH.backward(grad_TH)
    y64_RH = y_RH.detach().double().requires_grad_()
    dense_ETH = torch.zeros(EXPERTS, 9, HIDDEN, dtype=torch.float64).index_put(
        routing_map_TE.T.nonzero(as_tuple=True), y64_RH
    )
    wanted_TH = dense_ETH.sum(0)
    wanted_TH.backward(grad_TH.double())
    for result, wanted in ((out_TH, wanted_TH), (y_RH.grad, y64_RH.grad)):
        torch.testing.assert_close(result, wanted.to(result.dtype))
    assert out_TH.dtype == y_RH.grad.dtype == torch.bfloat16


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    dispatch = LocalDispatch(make_map(4, 2, generator), 2)
    y_RH = torch.randn(8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dispatch.combine, (y_RH,))


def test_send_back_is_the_adjoint_of_send():
    generator = torch.Generator().manual_seed(0)
    dispatch = LocalDispatch(make_map(12, 3, generator), 3)
    x_TH = torch.randn(12, HIDDEN, generator=generator, dtype=torch.float64)
    probs_TE = torch.rand(12, EXPERTS, generator=generator, dtype=torch.float64)
    rows_RH, _, probs_R1 = dispatch.send(x_TH, torch.ones(12, 1), probs_TE)
    y_RH = torch.randn(rows_RH.shape, generator=generator, dtype=torch.float64)
    dx_TH, dprobs_TE = dispatch.send_back(y_RH, y_RH[:, :1])
    torch.testing.assert_close((rows_RH * y_RH).sum(), (x_TH * dx_TH).sum())
    torch.testing.assert_close((probs_R1 * y_RH[:, :1]).sum(), (probs_TE * dprobs_TE).sum())


def test_no_token():
    dispatch = LocalDispatch(torch.zeros(0, EXPERTS).bool(), 2)
    rows_RH, scale_R1, probs_R1 = dispatch.send(torch.zeros(0, HIDDEN), torch.zeros(0, 1), torch.zeros(0, EXPERTS))
    assert rows_RH.shape == (0, HIDDEN)
    assert scale_R1.shape == probs_R1.shape == (0, 1)
    assert dispatch.ends_E.tolist() == [0] * EXPERTS
    assert dispatch.combine(rows_RH).shape == (0, HIDDEN)
    assert [x.shape for x in dispatch.send_back(rows_RH, probs_R1)] == [(0, HIDDEN), (0, EXPERTS)]


@pytest.mark.gpu
def test_a_gpu_equals_cpu_and_never_waits():
    """bf16 model with fp32 probabilities: forward and backward; the host is not held up."""
    generator = torch.Generator().manual_seed(0)
    routing_map_TE = make_map(50, 3, generator)
    x_TH, grad_TH = torch.randn(2, 50, HIDDEN, generator=generator).bfloat16()
    probs_TE = routing_map_TE * torch.rand(50, EXPERTS, generator=generator)
    inputs = routing_map_TE, x_TH, torch.rand(50, 1, generator=generator), probs_TE, grad_TH
    wanted = trip(LocalDispatch(inputs[0], 3), *inputs[1:])
    on_gpu = [tensor.cuda() for tensor in inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = trip(LocalDispatch(on_gpu[0], 3), *on_gpu[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, tensor in wanted.items():
        assert torch.equal(result[name].cpu(), tensor), name

"""The trip of tokens to their experts: nothing is lost on it, and the way back is its adjoint."""

import itertools

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from bitmoe.config.choices import ActFormat, Precision, Wire
from bitmoe.config.schema import Config, ModelConfig, MoEConfig, ParallelConfig, RunConfig
from bitmoe.layers.dispatch import Dispatch, make_dispatch
from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.layers.wire import CodeWire
from bitmoe.model.transformer_config import make_transformer_config
from bitmoe.parallel.process_groups import make_groups, start

# Shapes: T = tokens of this rank, E = experts, R = rows on this rank, H = hidden.

TOKENS, EXPERTS, HIDDEN = 6, 4, 8
VALUES = CodeWire(Wire.codes, ActFormat.none)
LAYOUTS = {"EP2": ParallelConfig(expert=2), "ETP2": ParallelConfig(expert_tensor=2), "EP1": ParallelConfig()}


def make_dispatcher(parallel, capacity_factor=None):
    start()
    config = make_transformer_config(
        Config(
            model=ModelConfig(hidden_size=HIDDEN, num_attention_heads=2, vocab_size=10),
            moe=MoEConfig(num_experts=EXPERTS, ffn_hidden_size=8, capacity_factor=capacity_factor),
            parallel=parallel,
            run=RunConfig(precision=Precision.fp32),
        )
    )
    groups = make_groups(parallel)
    num_local = EXPERTS // parallel.expert
    first = groups.ep.rank() * num_local
    return MoEAlltoAllTokenDispatcher(
        num_local, list(range(first, first + num_local)), config=config, pg_collection=groups.mcore
    )


def random_dispatch(parallel, generator):
    # Expert 2 gets no token at all.
    scores_TE = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores_TE[:, 2] = -1.0
    routing_map_TE = torch.zeros(TOKENS, EXPERTS).scatter(1, scores_TE.topk(2).indices, 1).bool()
    return Dispatch(make_dispatcher(parallel), routing_map_TE, VALUES), routing_map_TE


def round_trip(parallel, wire, act_format, dtype):
    """Inner products of both sides, and the trip of codes beside that of the same numbers in fp32."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    values, routing_map_TE = random_dispatch(parallel, generator)
    dispatch = Dispatch(values._dispatcher, routing_map_TE, CodeWire(wire, act_format))
    x_TH = torch.randint(-8, 8, (TOKENS, HIDDEN), generator=generator, dtype=torch.int8)
    scale_T1 = torch.rand(TOKENS, 1, generator=generator)
    probs_TE = routing_map_TE.float() * torch.rand(TOKENS, EXPERTS, generator=generator)
    codes_RH, scale_R1, probs_R1 = dispatch.send(x_TH.to(dtype), scale_T1, probs_TE)
    values_RH, *_ = values.send(x_TH.float(), scale_T1, probs_TE)
    y_RH = torch.randn(codes_RH.shape, generator=generator, dtype=torch.float64)
    home_TH, home_TE = dispatch.send_back(y_RH, y_RH[:, :1])
    # <send(x), y> = <x, send_back(y)>, added over ranks; probabilities likewise.
    products = [(values_RH * y_RH).sum(), (x_TH * home_TH).sum()]
    products = torch.stack([*products, (probs_R1 * y_RH[:, :1]).sum(), (probs_TE * home_TE).sum()])
    dist.all_reduce(products)
    scaled_RH = (values_RH * scale_R1 * probs_R1 / parallel.expert_tensor).requires_grad_()
    combined_TH = dispatch.combine(scaled_RH)
    combined_TH.backward(x_TH.float())
    return {
        "products": products.tolist(),
        "gradient": torch.equal(scaled_RH.grad, values_RH),
        "no expert, no gradient": not home_TE[~routing_map_TE].any(),
        "counts": dispatch.ends_E.diff(prepend=dispatch.ends_E.new_zeros(1)).tolist(),
        "ends": dispatch.ends_E,
        "experts": dispatch.expert_R,
        "same codes": codes_RH.dtype == dtype and torch.equal(codes_RH.float(), values_RH),
        "combined": combined_TH.detach(),
        "wanted": x_TH * scale_T1 * probs_TE.sum(1, keepdim=True),
    }


@pytest.mark.parametrize("wire", Wire, ids=lambda wire: wire.value)
@pytest.mark.parametrize(
    ("act_format", "dtype"),
    [(ActFormat.int8, torch.int8), (ActFormat.int4, torch.int8), (ActFormat.int4, torch.float8_e4m3fn)],
    ids=["int8", "int4", "int4-e4m3"],
)
@pytest.mark.parametrize(("name", "world_size"), [("EP1", 1), ("EP2", 2), ("ETP2", 2), ("EP1", 2)])
def test_round_trip(name, world_size, act_format, dtype, wire, ranks):
    results = ranks(world_size).run(round_trip, LAYOUTS[name], wire, act_format, dtype)
    for result in results:
        rows_sent, rows_returned, probs_sent, probs_returned = result["products"]
        assert rows_sent == pytest.approx(rows_returned, rel=1e-12)
        assert probs_sent == pytest.approx(probs_returned, rel=1e-12)
        assert result["gradient"]
        assert result["no expert, no gradient"]
        assert result["same codes"]
        assert result["ends"].dtype == result["experts"].dtype == torch.int32
        assert result["ends"].tolist() == list(itertools.accumulate(result["counts"]))
        assert result["experts"].tolist() == [e for e, count in enumerate(result["counts"]) for _ in range(count)]
        # Experts that return what they got: every token comes home, with its own scale, times its probabilities.
        torch.testing.assert_close(result["combined"], result["wanted"])
    parallel = LAYOUTS[name]
    received = sum(sum(result["counts"]) for result in results)
    assert received == 2 * TOKENS * world_size * parallel.expert_tensor
    local_experts = EXPERTS // parallel.expert
    assert all(len(result["counts"]) == local_experts for result in results)
    assert results[-1]["counts"][2 % local_experts] == 0


def two_in_flight():
    """Two forwards before either goes back, as pipelines do: each takes the way of its own routing."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    first, routing_map_TE = random_dispatch(LAYOUTS["EP2"], generator)
    second = Dispatch(first._dispatcher, routing_map_TE.roll(1, 0), VALUES)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    ones_T1, ones_TE = torch.ones(TOKENS, 1), torch.ones(TOKENS, EXPERTS)
    first_rows, second_rows = (dispatch.send(x_TH, ones_T1, ones_TE)[0] for dispatch in (first, second))
    return x_TH, *(d.send_back(rows, rows[:, :1])[0] for d, rows in ((first, first_rows), (second, second_rows)))


def test_two_trips_do_not_mix(ranks):
    for x_TH, back_first, back_second in ranks(2).run(two_in_flight):
        torch.testing.assert_close(back_first, 2 * x_TH)
        torch.testing.assert_close(back_second, 2 * x_TH)


def chosen_class(parallel, capacity_factor):
    routing_map_TE = torch.tensor([[True, False, False, True]]).expand(TOKENS, EXPERTS)
    return type(make_dispatch(make_dispatcher(parallel, capacity_factor), routing_map_TE, VALUES))


@pytest.mark.parametrize(
    ("name", "capacity_factor", "wanted"),
    [("EP1", None, LocalDispatch), ("EP1", 1.0, Dispatch), ("EP2", None, Dispatch), ("ETP2", None, Dispatch)],
)
def test_whole_dropless_experts_stay_local(name, capacity_factor, wanted, ranks):
    assert ranks(2).run(chosen_class, LAYOUTS[name], capacity_factor) == [wanted, wanted]

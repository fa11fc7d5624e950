"""Memory against what the engine really allocates, and against the bytes that autograd really saves."""

import dataclasses
import weakref
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitmoe.config.choices import Recompute
from bitmoe.config.compose import compose
from bitmoe.layers.code_product import gradients
from bitmoe.layers.dispatch import Dispatch
from bitmoe.layers.local_dispatch import LocalDispatch
from bitmoe.model.activations import Activations
from bitmoe.model.memory import checkpoint_bytes, layers_in_flight, packed_bytes, rank_memory
from bitmoe.model.sizes import with_vocab_size
from bitmoe.quant.ternary_codes import CodeCache, WeightOperands
from bitmoe.testing.parity import make_engine, random_batches

# All sizes of these models are multiples of what megatron-core pads its buffers to.
SHORT = ["model.num_layers=4", "context.seq_length=128", "run.micro_batch_size=2"]
LAYOUTS = {
    "single": (1, ["parallel=single"]),
    "dense bf16": (1, ["parallel=single", "moe=none", "quant.groups=1", "run.precision=bf16"]),
    "8bit": (1, ["parallel=single", "quant.backward=8bit"]),
    # Output rows of gate and up are padded to a multiple of 16; without sub-norms, whose gains have odd sizes here.
    "8bit padded": (
        1,
        ["parallel=single", "quant.backward=8bit", "moe=none", "model.ffn_hidden_size=516", "model.sub_norm=false"],
    ),
    "tp2 ep2 bf16": (2, ["parallel=tp2_ep2", "run.precision=bf16"]),
    "tp2 ep2 8bit": (2, ["parallel=tp2_ep2", "quant.backward=8bit"]),
    "dp2 bf16": (2, ["parallel=single", "run.precision=bf16", "run.micro_batch_size=1"]),
    "pp2 tied": (2, ["parallel=pp2", "moe=none", "model.tie_embeddings=true"]),
}


def storages(tensors):
    """Bytes of different storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def code_tensors(engine):
    modules = [module for model in engine.models for module in model.modules()]
    caches = [value for module in modules for value in vars(module).values() if isinstance(value, CodeCache)]
    if not engine.policy.is_ternary:
        return []
    operands = [cache.operands(torch.int8, engine.policy.is_backward_8bit) for cache in caches]
    return [tensor for parts in operands for tensor in parts if tensor is not None]


def allocated(config):
    """Bytes of what a training step leaves behind."""
    engine = make_engine(config)
    engine.train_step(1, random_batches(config, 1))
    parameters = [parameter for model in engine.models for parameter in model.parameters()]
    optimizers = [part.optimizer for part in engine.optimizer.chained_optimizers]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    mains = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    copies = [main for main in mains if main.untyped_storage().data_ptr() not in known]
    return {
        "weights": storages(parameters),
        "gradients": storages([parameter.main_grad for parameter in parameters]),
        "optimizer": storages([*moments, *copies]),
        "ternary_codes": storages(code_tensors(engine)),
    }


@pytest.mark.parametrize(("world_size", "overrides"), LAYOUTS.values(), ids=LAYOUTS)
def test_what_stays_is_what_the_engine_allocates(ranks, world_size, overrides):
    config = with_vocab_size(compose([*SHORT, *overrides]))
    for rank, actual in enumerate(ranks(world_size).run(allocated, config)):
        stage = rank if config.parallel.pipeline > 1 else 0
        memory = dataclasses.asdict(rank_memory(config, world_size, stage))
        assert {name: memory[name] for name in actual} == actual


def saved_bytes(config):
    """Bytes that one micro-batch keeps for its backward pass, parameters and their codes aside."""
    engine = make_engine(config)
    (model,) = engine.models
    batch = random_batches(config, 1)(range(config.run.micro_batch_size))
    positions = torch.arange(config.context.seq_length).expand_as(batch["tokens"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = model(batch["tokens"], positions, None, labels=batch["labels"])
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *code_tensors(engine)]}
    saved += kept_by_dispatch(loss.grad_fn)
    return storages([tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own])


def kept_by_dispatch(last):
    """Tensors in the trips that experts' autograd functions keep, of all nodes in front of the last."""
    nodes, ahead = set(), [last]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            ahead += [before for before, _ in node.next_functions]
    return tensors_in([getattr(node, "dispatch", None) for node in nodes])


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (Dispatch, LocalDispatch, MoEAlltoAllTokenDispatcher)):
        value = list(vars(value).values())
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ["parallel=single", "moe=none"]),
        (1, ["parallel=single", "moe=none", "run.precision=bf16", "run.recompute=selective"]),
        (1, ["parallel=single", "moe=none", "run.precision=bf16", "run.recompute=ffn"]),
        (1, ["parallel=single", "run.precision=bf16", "run.recompute=ffn"]),
        (1, ["parallel=single", "moe=none", "model.activation=swiglu", "model.sub_norm=false"]),
        (1, ["parallel=single"]),
        (1, ["parallel=single", "run.precision=bf16"]),
        (1, ["parallel=single", "quant=none", "run.precision=bf16"]),
        (2, ["parallel=tp2_ep2", "run.precision=bf16"]),
        (2, ["parallel=tp2_ep2", "parallel.expert=1", "parallel.expert_tensor=2"]),
        (2, ["parallel=tp2_ep2", "parallel.expert=1", "parallel.expert_tensor=2", "quant.groups=1"]),
        (1, ["parallel=single", "model.activation=swiglu", "moe.score=sigmoid", "moe.balancing=seq_aux_loss"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"{value} ranks",
)
def test_activations_are_what_autograd_saves(ranks, world_size, overrides):
    """Within 1 %, on the mean of the ranks: routing is not quite even."""
    config = with_vocab_size(compose([*SHORT, *overrides]))
    actual = ranks(world_size).run(saved_bytes, config)
    predicted = rank_memory(config, world_size, 0).activations + Activations(config).logits()
    assert predicted == pytest.approx(sum(actual) / world_size, rel=0.01)


def test_recomputed_layers_keep_their_input(ranks):
    """Within 2 %: checkpoints also keep the rotation angles, which are little in a model less tiny."""
    config = with_vocab_size(compose([*SHORT, "parallel=single", "run.recompute=full"]))
    (actual,) = ranks(1).run(saved_bytes, config)
    activations = Activations(config)
    predicted = rank_memory(config, 1, 0).activations - activations.saved_by_layer() + activations.logits()
    assert predicted == pytest.approx(actual, rel=0.02)


class PeakBytes(TorchDispatchMode):
    """The most bytes of new tensors that are there at the same time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(out)):
            key = storage._cdata
            if key not in self.alive and key not in given:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize(("hidden_size", "width"), [(256, 512), (512, 128)])
@pytest.mark.parametrize(("num_tokens", "groups"), [(64, 1), (512, 1), (512, 2)])
def test_temporaries_are_what_the_backward_pass_allocates(precision, dtype, hidden_size, width, num_tokens, groups):
    """Within 1 %, for the largest of the four products."""
    model = [f"model.hidden_size={hidden_size}", f"model.ffn_hidden_size={width}", f"quant.groups={groups}"]
    run = [f"run.precision={precision}", f"context.seq_length={num_tokens}", "run.micro_batch_size=1"]
    config = with_vocab_size(compose(["moe=none", "parallel=single", *model, *run]))
    columns = [(hidden_size, 2 * hidden_size), (hidden_size, 2 * width)]
    rows = [(hidden_size, hidden_size), (width, hidden_size)]
    peak = max(
        *(backward_peak(num_tokens, *sizes, 1, dtype, is_column=True) for sizes in columns),
        *(backward_peak(num_tokens, *sizes, groups, dtype, is_column=False) for sizes in rows),
    )
    assert Activations(config).temporaries() == pytest.approx(peak, rel=0.01)


def test_gate_and_up_that_are_multiplied_again_are_temporary():
    config = with_vocab_size(compose(["moe=none", "parallel=single", "run.precision=bf16"]))
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, recompute=Recompute.ffn))
    gate_and_up = 2 * Activations(config).tokens * 2 * config.model.ffn_hidden_size
    assert Activations(again).temporaries() - Activations(config).temporaries() == gate_and_up
    assert Activations(config).saved_by_layer() - Activations(again).saved_by_layer() == gate_and_up


def backward_peak(num_tokens, num_inputs, num_outputs, groups, dtype, *, is_column):
    """Bytes of a product's backward pass on a GPU, where nothing lies between codes and dequantized numbers."""
    dy = torch.ones(num_tokens, num_outputs, dtype=dtype)
    codes = torch.ones(num_tokens, num_inputs, dtype=torch.int8)
    rows = torch.ones(num_outputs, num_inputs, dtype=torch.int8)
    weight = WeightOperands(rows, None, torch.ones(num_outputs if is_column else groups))
    kernel = mock.patch("bitmoe.layers.code_product.dequantize", lambda codes, scale, dtype: codes.to(dtype))
    with kernel, PeakBytes() as measured:
        gradients(dy, codes, torch.ones(num_tokens, groups), weight, is_column)
    return measured.peak + dy.nbytes


@pytest.mark.parametrize(
    ("overrides", "in_flight"),
    [
        (["parallel.pipeline=4"], [4 * 2, 3 * 2, 2 * 2, 1 * 2]),
        (["parallel.pipeline=4", "run.global_batch_size=8"], [2 * 2, 2 * 2, 2 * 2, 1 * 2]),
        # 11, 9, 7 and 5 chunks of one layer each.
        (["parallel.pipeline=4", "parallel.virtual_pipeline=2"], [11, 9, 7, 5]),
        (["parallel.pipeline=1"], [8]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_layers_in_flight_by_hand(overrides, in_flight):
    config = compose(
        [
            "moe=none",
            "parallel=single",
            "model.num_layers=8",
            "run.micro_batch_size=4",
            "run.global_batch_size=64",
            *overrides,
        ]
    )
    stages = config.parallel.pipeline
    assert [layers_in_flight(config, stages, stage) for stage in range(stages)] == in_flight


def test_more_data_parallel_ranks_divide_the_optimizer():
    config = compose(["experiment=moe_e64k6"])
    small, large = (rank_memory(config, world_size, 0) for world_size in (8, 64))
    assert small.optimizer == 8 * large.optimizer
    assert (small.weights, small.activations) == (large.weights, large.activations)


def state_bytes(config):
    """Bytes of the weights and optimizer state that a checkpoint of one rank holds."""
    engine = make_engine(config)
    engine.train_step(1, random_batches(config, 1))
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    weights = {key: shard for key, shard in engine.sharded_state().items() if isinstance(shard, ShardedTensor)}
    state = engine.optimizer.sharded_state_dict(engine.sharded_state(), metadata=metadata)
    kept = [shard.data for shard in weights.values() if isinstance(shard.data, torch.nn.Parameter)]
    return storages(kept), state_tensors(state)


def state_tensors(node):
    """Bytes of matrices and gains in nested optimizer state."""
    if isinstance(node, ShardedTensor):
        return node.data.nbytes if node.data.dim() else 0
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else []
    return sum(state_tensors(part) for part in parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpoint_is_as_large_as_its_state(ranks, precision):
    config = with_vocab_size(compose([*SHORT, "parallel=single", "model.num_layers=1", f"run.precision={precision}"]))
    ((weights, optimizer),) = ranks(1).run(state_bytes, config)
    assert weights + optimizer == checkpoint_bytes(config)


def test_packed_model_by_hand():
    config = compose(["experiment=bitnet_2b4t"])
    linears = 30 * (2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 2560 * 6912)
    rest = 128256 * 2560 + 30 * (3 * 2560 + 6912) + 2560
    assert packed_bytes(config, 4) == linears // 4 + 2 * rest
    assert packed_bytes(config, 5) == linears // 5 + 2 * rest
    assert packed_bytes(compose(["experiment=bitnet_2b4t", "quant=none"]), 4) == 2 * (linears + rest)

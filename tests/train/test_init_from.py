"""A new run from the weights of another model: any layout, and dense models that become mixtures of experts."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch

from bitmoe.config.choices import ActFormat, Activation, Precision, Score, WeightFormat
from bitmoe.config.errors import InputError
from bitmoe.config.schema import (
    BitStage,
    Config,
    ContextConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    RunConfig,
)
from bitmoe.model.export_names import slots, split
from bitmoe.parallel.process_groups import make_groups, start
from bitmoe.testing.parity import gather_global, make_engine, random_batches
from bitmoe.train.engine import MegatronEngine
from bitmoe.train.fingerprint import fingerprints
from bitmoe.train.init_from import check_source, init_from

A48 = BitStage(qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)
EXPERTS = MoEConfig(num_experts=4, ffn_hidden_size=64, shared_expert_size=32, score=Score.sigmoid, expert_bias=True)
UPCYCLED = MoEConfig(num_experts=4, ffn_hidden_size=64)


def tiny(moe=None, groups=2, precision=Precision.fp32, **model):
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 100, "num_query_groups": 2}
    return Config(
        model=ModelConfig(**shape | model),
        quant=QuantConfig(groups=groups, stages=[A48]),
        moe=moe or MoEConfig(),
        context=ContextConfig(seq_length=16),
        optim=OptimConfig(lr=1e-3, lr_second=None, warmup_steps=0, weight_decay=0.0),
        run=RunConfig(steps=20, micro_batch_size=2, global_batch_size=8, precision=precision),
    )


def new_run(config, **layout):
    """The same model in another layout, from other initial values."""
    return replace(config, parallel=ParallelConfig(**layout), run=replace(config.run, seed=99))


@dataclass
class WholeModel:
    """A ``WeightSource`` over a file of global tensors, which have the axis of layers in front."""

    config: Config
    file: Path

    @cached_property
    def tensors(self):
        return torch.load(self.file, weights_only=True)

    def read_slot(self, slot, expert=None):
        tensor = self.tensors[slot.key] if slot.layer is None else self.tensors[slot.key][slot.layer]
        return tensor if expert is None else tensor[expert]

    def read(self, name, expert=None):
        slot = next(slot for slot in slots(self.config) if name in slot.names)
        return split(slot, self.read_slot(slot, expert), self.config)[name]


def observe(engine):
    """Fingerprint of every tensor, and the first loss."""
    prints = fingerprints(engine.sharded_state())
    engine.set_stage(1)
    return prints, engine.evaluate(random_batches(engine.config, 1))


def gather(engine):
    """The whole model on rank 0, in the dtypes of the parameters; elsewhere nothing."""
    shards = list(engine.sharded_state().values())
    dtypes = [shard.data.dtype for shard in shards if shard.key.endswith("weight")]
    tensors = gather_global([(shard, shard.data) for shard in shards])
    return {name: tensor.float() if "bias" in name else tensor.to(dtypes[0]) for name, tensor in tensors.items()}


def export(config, file):
    """Write the model's tensors to a file: arguments of ranks must be small."""
    engine = make_engine(config)
    if tensors := gather(engine):
        torch.save(tensors, file)
    return observe(engine)


def started(config, source):
    """A new engine with the source's weights, after other weights were in use."""
    check_source(source.config, config)
    start()
    engine = MegatronEngine(config, make_groups(config.parallel))
    engine.set_stage(1)
    engine.evaluate(random_batches(config, 2))
    init_from(engine, source)
    return engine


def start_and_observe(config, source):
    return observe(started(config, source))


@pytest.fixture(scope="module")
def exported(ranks, tmp_path_factory):
    """``exported(config, world_size)``: a source of that model, its fingerprints and its first loss."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def of(config, world_size=1):
        if repr(config) not in done:
            file = folder / f"{len(done)}.pt"
            done[repr(config)] = WholeModel(config, file), *ranks(world_size).run(export, config, file)[0]
        return done[repr(config)]

    return of


LAYOUTS = {
    "TP2 SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "EP2": (2, {"expert": 2}),
    "ETP2": (2, {"expert_tensor": 2}),
    "TP2 SP EP2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
}


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        pytest.param(tiny(EXPERTS), list(LAYOUTS), id="moe"),
        pytest.param(tiny(tie_embeddings=True), ["TP2 SP", "PP2"], id="dense-tied"),
        pytest.param(tiny(groups=1, precision=Precision.bf16), ["TP2 SP"], id="dense-bf16"),
    ],
)
def test_init_from_in_other_layouts(ranks, exported, config, layouts):
    source, prints, loss = exported(config)
    for name in layouts:
        world_size, layout = LAYOUTS[name]
        found_prints, found_loss = ranks(world_size).run(start_and_observe, new_run(config, **layout), source)[0]
        assert found_prints == prints
        assert found_loss == pytest.approx(loss, rel=1e-3 if config.run.precision is Precision.bf16 else 1e-6)


def test_init_from_a_model_of_another_layout(ranks, exported):
    config = tiny(EXPERTS)
    _, prints, loss = exported(config)
    source, *_ = exported(replace(config, parallel=ParallelConfig(pipeline=2)), world_size=2)
    found_prints, found_loss = ranks(1).run(start_and_observe, new_run(config), source)[0]
    assert found_prints == prints
    assert found_loss == pytest.approx(loss, rel=1e-6)


def test_init_from_continues_with_other_activations(ranks, exported):
    """A model trained with 8-bit activations goes on as a4.8: the weights are the same, the function is not."""
    eight_bits = tiny()
    eight_bits.quant.stages = [BitStage()]
    source, prints, loss = exported(eight_bits)
    found_prints, found_loss = ranks(1).run(start_and_observe, new_run(tiny()), source)[0]
    assert found_prints == prints
    assert found_loss != pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("moe", "groups", "layout"),
    [
        pytest.param(UPCYCLED, 1, {}, id="softmax-G1"),
        pytest.param(UPCYCLED, 2, {}, id="softmax-G2"),
        pytest.param(replace(UPCYCLED, score=Score.sigmoid, expert_bias=True), 2, {}, id="sigmoid-bias"),
        pytest.param(replace(UPCYCLED, shared_expert_size=64), 1, {}, id="shared-G1"),
        pytest.param(replace(UPCYCLED, scaling_factor=2.5), 2, {}, id="scaled"),
        pytest.param(replace(UPCYCLED, shared_expert_size=64, scaling_factor=2.5), 2, {}, id="shared-scaled"),
        pytest.param(replace(UPCYCLED, shared_expert_size=64), 2, LAYOUTS["TP2 SP EP2"][1], id="shared-TP2-EP2"),
        pytest.param(replace(UPCYCLED, score=Score.sigmoid), 1, LAYOUTS["TP2 SP EP2"][1], id="sigmoid-G1-TP2-EP2"),
        pytest.param(UPCYCLED, 2, LAYOUTS["ETP2"][1], id="ETP2"),
    ],
)
def test_upcycled_model_computes_the_dense_function(ranks, exported, moe, groups, layout):
    dense = tiny(groups=groups)
    source, _, loss = exported(dense)
    _, found = ranks(2 if layout else 1).run(start_and_observe, new_run(replace(dense, moe=moe), **layout), source)[0]
    assert found == pytest.approx(loss, rel=1e-5)


def upcycle_and_gather(config, source):
    return gather(started(config, source))


@pytest.mark.parametrize("precision", Precision)
def test_upcycling_halves_down_beside_a_shared_expert(ranks, exported, precision):
    """To the bit, in any precision: halving a weight halves its scale and keeps its codes."""
    dense = tiny(precision=precision)
    source = exported(dense)[0]
    config = new_run(replace(dense, moe=replace(UPCYCLED, shared_expert_size=64, scaling_factor=2.0)))
    tensors = ranks(1).run(upcycle_and_gather, config, source)[0]
    down = source.tensors["decoder.layers.mlp.linear_fc2.weight"]
    assert torch.equal(tensors["decoder.layers.mlp.shared_experts.linear_fc2.weight"] * 2, down)
    for expert in tensors["decoder.layers.mlp.experts.fc2_weight"].unbind(1):
        assert torch.equal(expert * 4, down)
    router = tensors["decoder.layers.mlp.router.weight"]
    assert 0.5 < router.float().std() / config.model.init_std < 2
    assert router.flatten().unique().numel() > 100


def take_a_step(config, source):
    """How far one step takes the matrices, in learning rates: the mean, and the largest distance."""
    engine = started(config, source)
    result = engine.train_step(1, random_batches(config, 1))
    engine.gather_parameters()
    after = gather(engine)
    if not after:
        return None
    matrices = [name for name in after if "norm" not in name]
    moved = torch.cat([(after[name].float() - source.tensors[name].float()).flatten() for name in matrices]).abs()
    return moved.mean().item() / result.lr, moved.max().item() / result.lr


@pytest.mark.parametrize("precision", Precision)
def test_first_step_moves_from_the_source(ranks, exported, precision):
    """Adam's first step is one learning rate long, whatever the gradient; other initial values are 20 away."""
    config = tiny(precision=precision)
    source = exported(config)[0]
    mean, largest = ranks(2).run(take_a_step, new_run(config), source)[0]
    assert 0.5 < mean < 1.1
    assert largest < 1.5


@pytest.mark.parametrize(
    ("source", "config", "words"),
    [
        (tiny(), tiny(num_layers=4), ["model.num_layers is 2 there, 4 here", "fix: model.num_layers=2"]),
        (tiny(), tiny(hidden_size=64), ["hidden_size is 32 there, 64", "head_dim is 8 there, 16"]),
        (tiny(), tiny(num_query_groups=None), ["num_query_groups is 2 there, 4 here"]),
        (tiny(), tiny(activation=Activation.swiglu), ["model.activation is relu2_glu there, swiglu here"]),
        (tiny(), tiny(sub_norm=False), ["fix: model.sub_norm=true"]),
        (tiny(), tiny(norm_eps=1e-6), ["model.norm_eps is 1e-05 there"]),
        (tiny(), tiny(rope_theta=5e5), ["model.rope_theta is 10000.0 there"]),
        (tiny(), tiny(tie_embeddings=True), ["model.tie_embeddings"]),
        (tiny(), tiny(vocab_size=128), ["model.vocab_size is 100 there, 128 here", "the tokenizer must be that"]),
        (tiny(), tiny(ffn_hidden_size=96), ["model.ffn_hidden_size is 64 there, 96"]),
        (tiny(), replace(tiny(), quant=QuantConfig(weights=WeightFormat.none)), ["quant.weights is ternary there"]),
        (tiny(EXPERTS), tiny(), ["mixture of 4 experts, the run is of a dense model", "fix: moe.num_experts=4"]),
        (tiny(EXPERTS), tiny(replace(EXPERTS, num_experts=8)), ["moe.num_experts is 4 there, 8 here"]),
        (tiny(EXPERTS), tiny(replace(EXPERTS, shared_expert_size=0)), ["moe.shared_expert_size is 32 there"]),
        (tiny(EXPERTS), tiny(replace(EXPERTS, router_topk=1)), ["moe.router_topk is 2 there"]),
        (tiny(EXPERTS), tiny(replace(EXPERTS, scaling_factor=2.0)), ["moe.scaling_factor is 1.0 there"]),
        (tiny(), tiny(UPCYCLED, num_layers=4), ["model.num_layers is 2 there"]),
        (tiny(), tiny(replace(UPCYCLED, ffn_hidden_size=32)), ["moe.ffn_hidden_size: 32", "fix: 64"]),
        (tiny(), tiny(replace(UPCYCLED, shared_expert_size=32)), ["moe.shared_expert_size: 32", "fix: 64, or 0"]),
        (tiny(), tiny(replace(UPCYCLED, score=Score.sigmoid, router_topk=1)), ["moe.router_topk: 1"]),
        (tiny(), tiny(replace(UPCYCLED, capacity_factor=1.0)), ["moe.capacity_factor: 1.0"]),
    ],
)
def test_check_source_refuses(source, config, words):
    with pytest.raises(InputError) as refusal:
        check_source(source, config)
    assert [word for word in words if word not in str(refusal.value)] == []


def test_check_source_accepts():
    assert check_source(tiny(), tiny()) == []
    assert check_source(tiny(), tiny(head_dim=8, vocab_size=None)) == []
    # The FFN's width of a mixture of experts is that of its experts.
    assert check_source(tiny(EXPERTS), tiny(EXPERTS, ffn_hidden_size=96)) == []
    assert check_source(tiny(), tiny(UPCYCLED, ffn_hidden_size=96)) == []
    [warning] = check_source(tiny(groups=1), tiny(groups=2))
    assert "quant.groups=2" in warning
    scaled = tiny(replace(UPCYCLED, scaling_factor=2.5), precision=Precision.bf16)
    [warning] = check_source(tiny(), scaled)
    assert "moe.scaling_factor=2.5 is no power of two" in warning
    assert check_source(tiny(), replace(scaled, moe=replace(scaled.moe, scaling_factor=4.0))) == []


@dataclass
class Damaged(WholeModel):
    """One tensor of the model is not what its config says."""

    key: str = "decoder.layers.mlp.experts.fc2_weight"
    is_transposed: bool = False

    def read_slot(self, slot, expert=None):
        value = super().read_slot(slot, expert).clone()
        if slot.key == self.key and self.is_transposed:
            return value.mT
        if slot.key == self.key:
            value.view(-1)[-1] = torch.nan
        return value


def refusal_of(config, source):
    try:
        started(config, source)
    except InputError as refused:
        return str(refused)
    return "accepted"


@pytest.mark.parametrize(
    ("is_transposed", "problem"), [(False, "holds NaN"), (True, "has the shape [64, 32], not [32, 64]")]
)
def test_init_from_refuses_damaged_tensors(ranks, exported, is_transposed, problem):
    config = tiny(EXPERTS)
    source = Damaged(config, exported(config)[0].file, is_transposed=is_transposed)
    refusal = ranks(1).run(refusal_of, config, source)[0]
    assert f"run.init_from: decoder.layers.mlp.experts.fc2_weight[0] of the weights {problem}" in refusal

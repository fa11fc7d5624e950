"""The check of an export: it agrees with the training engine, and whatever is wrong with the export is named."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmoe.config.choices import ActFormat, Activation, Precision, Score, WeightFormat
from bitmoe.config.convert_schema import Packing
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, Config, MoEConfig, QuantConfig
from bitmoe.convert.check_export import check_export
from bitmoe.convert.packed_format import write_packed
from bitmoe.convert.parity import EXACT, Limits, TensorComparison, compare_logits, refuse_different
from bitmoe.convert.training_forward import TrainingForward
from bitmoe.convert.written_exports import PackedExport
from bitmoe.data.tokenizer import ByteTokenizer
from bitmoe.parallel.alone import alone
from bitmoe.testing.saved_model import load_logits, save_model
from bitmoe.train.sharded_weights import ShardedWeights
from bitmoe_kernels.ternary_pack import pack, unpack

A48 = BitStage(0.5, qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)
EXPERTS = MoEConfig(num_experts=4, ffn_hidden_size=32, shared_expert_size=32, score=Score.sigmoid, expert_bias=True)
TOKENS_BS = torch.randint(0, 259, (3, 16), generator=torch.Generator().manual_seed(3))
NO_FORMATS = BitStage(**dict.fromkeys(("qkv", "o", "gate_up", "down"), ActFormat.none))


def tiny(moe=EXPERTS, precision=Precision.fp32, groups=2, stages=None, weights=WeightFormat.ternary, **model):
    config = Config(moe=moe, quant=QuantConfig(weights=weights, groups=groups, stages=stages or [BitStage(), A48]))
    shape = {"vocab_size": 259, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4, "num_query_groups": 2}
    config.model = replace(config.model, init_std=0.3, **shape | model)
    config.context.seq_length, config.run.precision = 16, precision
    config.run.micro_batch_size, config.run.global_batch_size, config.run.steps = 2, 4, 20
    return config


MODELS = {
    "a4.8 experts": tiny(),
    "fp4 softmax experts": tiny(
        moe=replace(EXPERTS, score=Score.softmax, expert_bias=False, shared_expert_size=0, scaling_factor=1.5),
        stages=[BitStage(qkv=ActFormat.fp4, gate_up=ActFormat.fp4)],
        num_query_groups=4,
    ),
    "bf16 dense": tiny(moe=MoEConfig(), precision=Precision.bf16, groups=4, tie_embeddings=True),
    "swiglu without sub-norms": tiny(
        moe=MoEConfig(), groups=1, stages=[BitStage()], activation=Activation.swiglu, sub_norm=False, head_dim=16
    ),
    "no quantization": tiny(groups=1, stages=[NO_FORMATS], weights=WeightFormat.none),
}


def save_and_check(config, run):
    """A saved model, its packed form, the report, and how far the streamed forward is from the engine's."""
    path = save_model(config, run)
    whole = (
        load_logits(path, replace(config, run=replace(config.run, precision=Precision.fp32)), TOKENS_BS)
        if (config.run.precision is Precision.fp32)
        else None
    )
    source, folder = ShardedWeights(path), run / "model"
    folder.mkdir()
    write_packed(source, ByteTokenizer(), folder, Packing["2bit"])
    with alone() as groups:
        streamed = TrainingForward(source, groups).logits(TOKENS_BS, lambda matrix: None)
    report = check_export(source, PackedExport(folder, config), TOKENS_BS, lambda name: None)
    return path, report, None if whole is None else (whole - streamed).abs().max().item()


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_export_agrees_with_training(ranks, tmp_path, config):
    _, report, difference = ranks(1).run(save_and_check, config, tmp_path)[0]
    assert report["top1_agreement"] == 1
    assert report["mean_kl"] <= 1e-6
    assert (report["codes_different"], report["largest_difference"], report["wrong"]) == (0, 0.0, [])
    assert report["worst_tensor"] is None
    is_ternary = config.quant.weights is WeightFormat.ternary
    assert (report["codes"] > 0) == is_ternary
    # The streamed forward is the engine's, bit by bit.
    assert difference in (0.0, None)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """The folder of a run with a checkpoint and a packed model that no test changes."""
    return ranks(1).run(save_and_check, tiny(), tmp_path_factory.mktemp("run"))[0][0].parents[1]


UP = "model.layers.1.mlp.experts.up_proj.weight"
OUT = "model.layers.1.self_attn.o_proj.weight"
DOWN_SCALE = "model.layers.1.mlp.experts.down_proj.weight_scale"


def swap_experts(tensors):
    tensors[UP] = tensors[UP][[1, 0, 2, 3]]
    return UP


def repeat_experts(tensors):
    tensors[UP] = tensors[UP][[0, 1, 0, 1]]
    return UP


def swap_scales_of_experts(tensors):
    tensors[DOWN_SCALE] = tensors[DOWN_SCALE][[1, 0, 2, 3]]
    return "down_proj"


def transpose(tensors):
    tensors[OUT] = pack(unpack(tensors[OUT], 32).T.contiguous())
    return OUT


def flip_a_code(tensors):
    codes = unpack(tensors[OUT], 32)
    codes[3, 5] = 1 - codes[3, 5].abs()
    tensors[OUT] = pack(codes)
    return OUT


def flip_a_bit(tensors):
    # The upper bit of a field whose lower one is 0: no ternary code.
    tensors[OUT] = tensors[OUT] | 0b10
    tensors[OUT] = tensors[OUT] & ~1
    return f"{OUT}: packed of shape [32, 8]"


def invert_scale(tensors):
    tensors[f"{OUT}_scale"] = 1 / tensors[f"{OUT}_scale"]
    return OUT


def regroup_scales(tensors):
    tensors[f"{OUT}_scale"] = tensors[f"{OUT}_scale"].flip(0)
    return OUT


def nan_in_a_norm(tensors):
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    return "model.layers.1.input_layernorm.weight holds NaN"


def nan_scale(tensors):
    tensors[DOWN_SCALE][0] = float("nan")
    return f"{DOWN_SCALE} holds NaN"


def exchange_norms(tensors):
    first, second = "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]
    return first


def nudge_a_router(tensors):
    tensors["model.layers.1.mlp.router.expert_bias"][2] += 1e-6
    return "model.layers.1.mlp.router.expert_bias"


MUTATIONS = [
    swap_experts,
    repeat_experts,
    swap_scales_of_experts,
    transpose,
    flip_a_code,
    flip_a_bit,
    invert_scale,
    regroup_scales,
    nan_in_a_norm,
    nan_scale,
    exchange_norms,
    nudge_a_router,
]


def refusals(run, scratch):
    """Of every mutation what the refusal must name, and what the check said."""
    source = ShardedWeights(run / "checkpoints" / "step_00000002")
    found = {}
    for mutate in MUTATIONS:
        folder = scratch / mutate.__name__
        folder.mkdir()
        for path in (run / "model").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / "model-00003-of-00005.safetensors")
        named = mutate(tensors)
        save_file(tensors, folder / "model-00003-of-00005.safetensors", metadata={"format": "pt"})
        try:
            check_export(source, PackedExport(folder, source.config), TOKENS_BS, lambda name: None)
            found[mutate.__name__] = named, "accepted"
        except InputError as error:
            found[mutate.__name__] = named, str(error)
    return found


@pytest.fixture(scope="module")
def refused(ranks, saved, tmp_path_factory):
    """What was said to each mutation."""
    return ranks(1).run(refusals, saved, tmp_path_factory.mktemp("mutated"))[0]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_what_is_wrong_is_named(refused, mutation):
    named, said = refused[mutation.__name__]
    assert named in said


def test_compare_logits_measures_what_it_says():
    expected = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    found = torch.tensor([[[2.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    measured = compare_logits(expected, found)
    p, q = expected.softmax(-1), found.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert measured["top1_agreement"] == 0.5
    assert measured["mean_kl"] == pytest.approx(kl.mean().item(), rel=1e-6)
    assert measured["max_kl"] == pytest.approx(kl.max().item(), rel=1e-6)
    assert (measured["mean_cosine"], measured["min_cosine"]) == pytest.approx((0.5, 0.0))
    with pytest.raises(InputError, match="another function: top-1 agreement 50.00%"):
        refuse_different(measured, EXACT)
    refuse_different(measured, Limits(top1_agreement=0.5, mean_kl=1.0))


def test_compare_logits_refuses_nan():
    expected = torch.zeros(1, 2, 3)
    with pytest.raises(InputError, match="not finite"):
        compare_logits(expected, torch.full_like(expected, float("nan")))


def test_comparison_names_the_worst_tensor():
    comparison = TensorComparison(limit=1e-3)
    comparison.add_numbers("near", torch.ones(2), torch.tensor([1.0, 1.0005]))
    assert (comparison.wrong, comparison.worst_tensor) == ([], "near")
    comparison.add_numbers("other shape", torch.ones(2), torch.ones(3))
    codes, scale = torch.ones(2, 2, dtype=torch.int8), torch.ones(1)
    comparison.add_ternary("codes", (codes, scale), (codes * torch.tensor([1, 0], dtype=torch.int8), scale))
    assert comparison.wrong == ["other shape", "codes"]
    assert (comparison.worst_tensor, comparison.codes, comparison.codes_different) == ("codes", 4, 2)
    with pytest.raises(InputError, match="other shape is not what .* 2 codes; the worst is codes"):
        comparison.refuse_wrong()

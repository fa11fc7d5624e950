"""Random models in the packed format and, of the same weights, the reference model."""

from typing import NamedTuple

import pytest
import torch

from bitmoe.config.choices import ActFormat, Activation, Score, WeightFormat
from bitmoe.config.schema import BitStage, Config, ModelConfig, MoEConfig, QuantConfig
from bitmoe.infer import BitmoeConfig, BitmoeForCausalLM
from bitmoe.model.export_names import slots, split
from bitmoe.testing.reference_model import ReferenceModel
from bitmoe_kernels.ternary_pack import pack
from bitmoe_kernels.weight_quant import ternarize

A8 = BitStage()
A48 = BitStage(qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)
FP4 = BitStage(qkv=ActFormat.fp4, o=ActFormat.fp4, gate_up=ActFormat.fp4)
UNQUANTIZED = BitStage(*[0.0, ActFormat.none, ActFormat.none, 1.0, ActFormat.none, ActFormat.none])
SOFTMAX = MoEConfig(num_experts=8, ffn_hidden_size=48, router_topk=2)
SIGMOID = MoEConfig(
    num_experts=4,
    ffn_hidden_size=64,
    shared_expert_size=128,
    score=Score.sigmoid,
    expert_bias=True,
    scaling_factor=2.5,
)


def make_config(groups=1, stage=A48, moe=None, **model):
    weights = WeightFormat.none if stage is UNQUANTIZED else WeightFormat.ternary
    shape = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 100} | model
    return Config(
        model=ModelConfig(**shape),
        quant=QuantConfig(weights=weights, groups=groups, stages=[stage]),
        moe=moe or MoEConfig(),
    )


CONFIGS = {
    "a4.8": make_config(),
    "a4.8 in 2 groups": make_config(groups=2),
    "a8": make_config(stage=A8),
    "fp4 in 4 groups": make_config(stage=FP4, groups=4),
    "swiglu without sub-norm": make_config(stage=A8, activation=Activation.swiglu, sub_norm=False),
    "unquantized": make_config(stage=UNQUANTIZED),
    "grouped queries in 2 groups": make_config(num_query_groups=2, groups=2, num_attention_heads=8),
    "wider than a block": make_config(hidden_size=320, ffn_hidden_size=600, head_dim=72, groups=2),
    "tied": make_config(tie_embeddings=True),
    "softmax experts": make_config(moe=SOFTMAX),
    "softmax experts in 2 groups": make_config(moe=SOFTMAX, groups=2),
    "sigmoid experts": make_config(moe=SIGMOID),
    "sigmoid experts in 4 groups": make_config(moe=SIGMOID, groups=4),
    "unquantized experts": make_config(moe=SOFTMAX, stage=UNQUANTIZED),
}


class Pair(NamedTuple):
    """One function, twice."""

    model: BitmoeForCausalLM
    reference: ReferenceModel


def bitmoe_config(config, **changes):
    """The packed format's config of a training config."""
    model, moe, stage = config.model, config.moe, config.quant.stages[0]
    roles = ("qkv", "o", "gate_up", "down")
    return BitmoeConfig(
        **{
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "head_dim": model.head_dim,
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.rope_theta,
            "tie_word_embeddings": model.tie_embeddings,
            "hidden_act": model.activation.value,
            "sub_norm": model.sub_norm,
            "weights": config.quant.weights.value,
            "quant_groups": config.quant.groups,
            "input_formats": {role: getattr(stage, role).value for role in roles},
            "o_keep": stage.o_keep,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.router_topk if moe.num_experts else 0,
            "moe_intermediate_size": moe.ffn_hidden_size if moe.num_experts else 0,
            "shared_expert_intermediate_size": moe.shared_expert_size,
            "router_score": moe.score.value,
            "router_bias": moe.expert_bias,
            "routed_scaling_factor": moe.scaling_factor or 1.0,
            **changes,
        }
    )


def random_weights(config, seed):
    """Tensors of a checkpoint by name, layers stacked in front."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for slot in slots(config):
        value = torch.randn(slot.shape, generator=generator) * 0.1
        layers.setdefault(slot.key, []).append(value + 1 if "norm" in slot.key else value)
    weights = {key: torch.stack(values) for key, values in layers.items()}
    whole = {slot.key for slot in slots(config) if slot.layer is None}
    return {key: value[0] if key in whole else value for key, value in weights.items()}


def exported(config, weights, packing):
    """The tensors of a packed model."""
    tensors = {}
    for slot in slots(config):
        value = weights[slot.key] if slot.layer is None else weights[slot.key][slot.layer]
        for name, part in split(slot, value, config).items():
            if "_proj." in name and config.quant.weights is WeightFormat.ternary:
                dim = 1 if "o_proj" in name or "down_proj" in name else 0
                codes, scale = ternarize(part, config.quant.groups, dim)
                tensors |= {name: pack(codes, packing), f"{name}_scale": scale}
            else:
                tensors[name] = part.contiguous()
    return tensors


@pytest.fixture(scope="session", params=CONFIGS)
def any_config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="session")
def configs():
    return CONFIGS


@pytest.fixture(scope="session")
def make_pair():
    """``make_pair(config, seed, **changes)``: model and reference; changes are keys of the packed config."""

    def make(config, seed=0, **changes):
        weights = random_weights(config, seed)
        model = BitmoeForCausalLM(bitmoe_config(config, **changes)).eval()
        tensors = exported(config, weights, model.config.packing)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        return Pair(model, ReferenceModel(config, weights))

    return make

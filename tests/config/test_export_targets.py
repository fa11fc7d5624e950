"""What each target accepts, a reason for each change that it does not, and transformers as the reasons describe it."""

import pytest

from bitmoe.config.compose import compose
from bitmoe.config.export_targets import TARGETS, gguf_architecture, hf_architecture, refusals

DENSE = [
    *("moe=none", "quant=a8", "quant.groups=1", "parallel=single", "model.activation=swiglu", "model.sub_norm=false"),
    *("model.hidden_size=256", "model.num_attention_heads=4", "model.ffn_hidden_size=512"),
]
EXPERTS = [*DENSE, "moe.num_experts=8", "moe.ffn_hidden_size=512", "moe.shared_expert_size=0"]
SUB_NORMS = [*DENSE, "model.sub_norm=true", "model.tie_embeddings=true"]
RELU2 = [*SUB_NORMS, "model.activation=relu2_glu"]
STAGE = "quant.stages=[{start:0},{start:0.5,%s}]"


@pytest.mark.parametrize(
    ("overrides", "target"),
    [
        (DENSE, "hf"),
        (SUB_NORMS, "hf"),
        ([*SUB_NORMS, "model.tie_embeddings=false", "model.activation=relu2_glu"], "hf"),
        ([*DENSE, "model.activation=relu2_glu", "model.head_dim=96", "model.ffn_hidden_size=300"], "hf"),
        (DENSE, "gguf"),
        ([*DENSE, "model.head_dim=128", "model.tie_embeddings=true"], "gguf"),
        ([*DENSE, "model.head_dim=128", "quant.groups=2"], "gguf"),
        (SUB_NORMS, "gguf"),
        (EXPERTS, "gguf"),
        (RELU2, "gguf i2_s"),
        ([*RELU2, "model.ffn_hidden_size=640", "model.num_query_groups=1"], "gguf i2_s"),
        ([*EXPERTS, "moe.scaling_factor=1"], "gguf"),
        ([], "bitmoe"),
        ([], "checkpoint"),
    ],
)
def test_accepted(overrides, target):
    assert refusals(compose(overrides), target) == []


@pytest.mark.parametrize(
    ("base", "override", "target", "start"),
    [
        (DENSE, "quant.weights=none", "hf", "quant.weights=none"),
        (DENSE, "quant.groups=2", "hf", "quant.groups=2"),
        (DENSE, "model.ffn_hidden_size=514", "hf", "model.ffn_hidden_size=514 makes 514"),
        (DENSE, "model.hidden_size=250 model.head_dim=64 model.num_attention_heads=5", "hf", "model.hidden_size=250"),
        (DENSE, "model.num_attention_heads=3 model.head_dim=64", "hf", "model.num_attention_heads=3"),
        (DENSE, "model.num_query_groups=1 model.head_dim=2", "hf", "model.num_query_groups=1 makes 2"),
        (SUB_NORMS, "model.head_dim=32", "hf", "model.head_dim=32 of 4 heads"),
        (DENSE, "moe.num_experts=8", "hf", "moe.num_experts=8"),
        (DENSE, STAGE % "qkv:int4,o_keep:0.5", "hf", "quant.stages[1] has qkv=int4, o_keep=0.5"),
        (DENSE, "quant.weights=none", "gguf", "quant.weights=none"),
        (DENSE, "model.activation=relu2_glu", "gguf", "model.activation=relu2_glu"),
        (DENSE, "model.hidden_size=128 model.head_dim=64", "gguf", "model.hidden_size=128"),
        (DENSE, "model.head_dim=32", "gguf", "model.head_dim=32 of 4 heads"),
        (DENSE, "model.ffn_hidden_size=600", "gguf", "model.ffn_hidden_size=600"),
        (DENSE, "quant.groups=2", "gguf", "quant.groups=2 cuts rows of 256 (model.head_dim=64 of 4 heads)"),
        (DENSE, STAGE % "down:none", "gguf", "quant.stages[1] has down=none"),
        (SUB_NORMS, "model.tie_embeddings=false", "gguf", "model.tie_embeddings=false"),
        (SUB_NORMS, "model.head_dim=128", "gguf", "model.head_dim=128 of 4 heads"),
        (SUB_NORMS, "quant.groups=2 model.num_attention_heads=8", "gguf", "quant.groups=2"),
        (EXPERTS, "moe.score=sigmoid", "gguf", "moe.score=sigmoid"),
        (EXPERTS, "moe.score=sigmoid moe.expert_bias=true", "gguf", "moe.expert_bias=true"),
        (EXPERTS, "moe.scaling_factor=2.5", "gguf", "moe.scaling_factor=2.5"),
        (EXPERTS, "moe.shared_expert_size=256", "gguf", "moe.shared_expert_size=256"),
        (EXPERTS, "moe.ffn_hidden_size=384", "gguf", "moe.ffn_hidden_size=384"),
        (EXPERTS, "model.sub_norm=true model.tie_embeddings=true", "gguf", "model.sub_norm=true"),
        (RELU2, "quant.weights=none", "gguf i2_s", "quant.weights=none"),
        (RELU2, "moe.num_experts=8 moe.ffn_hidden_size=512", "gguf i2_s", "moe.num_experts=8"),
        (RELU2, "model.activation=swiglu", "gguf i2_s", "model.activation=swiglu"),
        (RELU2, "model.sub_norm=false", "gguf i2_s", "model.sub_norm=false"),
        (RELU2, "model.tie_embeddings=false", "gguf i2_s", "model.tie_embeddings=false"),
        (RELU2, "quant.groups=2", "gguf i2_s", "quant.groups=2"),
        (RELU2, "model.hidden_size=192", "gguf i2_s", "model.hidden_size=192 makes rows of 192"),
        (RELU2, "model.ffn_hidden_size=192", "gguf i2_s", "model.ffn_hidden_size=192 makes rows of 192"),
        (RELU2, "model.head_dim=128", "gguf i2_s", "model.head_dim=128 of 4 heads"),
        (RELU2, STAGE % "qkv:int4", "gguf i2_s", "quant.stages[1] has qkv=int4"),
    ],
)
def test_refused_with_its_reason(base, override, target, start):
    reasons = refusals(compose([*base, *override.split()]), target)
    assert any(reason.startswith(start) for reason in reasons), reasons
    # One reason for each key that was changed, and no other.
    assert len(reasons) <= len(override.split())


def test_inputs_can_be_taken_as_int8():
    stage = STAGE % "qkv:int4,gate_up:fp4,o_keep:0.5"
    for model, target in ((DENSE, "hf"), (DENSE, "gguf"), (RELU2, "gguf i2_s")):
        config = compose([*model, stage])
        (reason,) = refusals(config, target)
        assert "qkv=int4, gate_up=fp4, o_keep=0.5" in reason
        assert "as_int8=true" in reason
        assert refusals(config, target, as_int8=True) == []


def test_only_the_last_stage_counts():
    assert refusals(compose([*DENSE, "quant.stages=[{start:0,qkv:none,o:int4},{start:0.5}]"]), "hf") == []


def test_unknown_target():
    with pytest.raises(ValueError, match="bitmoe, checkpoint, hf, gguf, gguf i2_s"):
        refusals(compose([]), "onnx")
    assert set(TARGETS) == {"bitmoe", "checkpoint", "hf", "gguf", "gguf i2_s"}


def test_architectures():
    assert (hf_architecture(compose(DENSE)), gguf_architecture(compose(EXPERTS))) == ("LlamaForCausalLM", "llama")
    sub_norms = compose(SUB_NORMS)
    assert (hf_architecture(sub_norms), gguf_architecture(sub_norms)) == ("BitNetForCausalLM", "bitnet")


def hf_model(architecture, **sizes):
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    common = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 32}
    return model_class(model_class.config_class(**common | sizes)).to(torch.float32)


def test_transformers_wants_these_widths_of_attention():
    import torch

    tokens = torch.zeros(1, 2, dtype=torch.long)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    hf_model("LlamaForCausalLM", **heads, head_dim=32)(tokens)
    hf_model("BitNetForCausalLM", **heads, head_dim=16)(tokens)
    with pytest.raises(RuntimeError, match="size"):
        hf_model("BitNetForCausalLM", **heads, head_dim=32)(tokens)
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        hf_model("LlamaForCausalLM", num_attention_heads=6, num_key_value_heads=2, head_dim=16)


def test_transformers_leaves_experts_unquantized():
    import torch
    from transformers import BitNetQuantConfig
    from transformers.integrations.bitnet import BitLinear, replace_with_bitnet_linear

    model = hf_model("MixtralForCausalLM", num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig())
    layer = model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, BitLinear)
    experts = [tensor for name, tensor in layer.mlp.named_parameters() if "experts" in name]
    assert experts
    assert all(tensor.dtype == torch.float32 and tensor.dim() == 3 for tensor in experts)

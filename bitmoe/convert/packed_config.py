"""``config.json`` and ``generation_config.json`` of the packed format, from a training config.

docs/packed-format.md says what the keys mean. Inference has the number formats of the last bit stage.
"""

from typing import Any

from bitmoe.config.choices import Precision
from bitmoe.config.convert_schema import Packing
from bitmoe.config.schema import Config
from bitmoe.convert.tokenizer_files import SpecialIds
from bitmoe.model.sizes import head_dim, num_query_groups

_DTYPES = {Precision.bf16: "bfloat16", Precision.fp32: "float32"}


def packed_config(config: Config, packing: Packing, special: SpecialIds) -> dict[str, Any]:
    """What ``config.json`` holds."""
    model, moe, stage = config.model, config.moe, config.quant.stages[-1]
    has_experts = moe.num_experts > 0
    return {
        "model_type": "bitmoe",
        "architectures": ["BitmoeForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(model),
        "head_dim": head_dim(model),
        "max_position_embeddings": config.context.seq_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        **special.as_keys(),
        "dtype": _DTYPES[config.run.precision],
        "hidden_act": model.activation.value,
        "sub_norm": model.sub_norm,
        "weights": config.quant.weights.value,
        "packing": packing.value,
        "quant_groups": config.quant.groups,
        "input_formats": {role: getattr(stage, role).value for role in ("qkv", "o", "gate_up", "down")},
        "o_keep": stage.o_keep,
        "kv_bits": config.context.kv_bits,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router_topk if has_experts else 0,
        "moe_intermediate_size": moe.ffn_hidden_size if has_experts else 0,
        "shared_expert_intermediate_size": moe.shared_expert_size if has_experts else 0,
        "router_score": moe.score.value,
        "router_bias": has_experts and moe.expert_bias,
        "routed_scaling_factor": 1.0 if moe.scaling_factor is None else moe.scaling_factor,
    }

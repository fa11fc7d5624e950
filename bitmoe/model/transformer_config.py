"""The one place that writes megatron-core's TransformerConfig.

Everything megatron-core needs to know of a bitmoe model is translated here, so a new release is checked against one
file. What our own layers need they read from our own configuration.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bitmoe.config.choices import Balancing, Precision, Recompute
from bitmoe.config.schema import Config
from bitmoe.model.sizes import head_dim, num_query_groups

_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


def model_dtype(config: Config) -> torch.dtype:
    """Dtype of parameters and activations."""
    return _DTYPES[config.run.precision]


def make_transformer_config(config: Config, dtype: torch.dtype | None = None) -> TransformerConfig:
    """Translate a validated configuration whose model.vocab_size is known.

    Args:
        config: the whole configuration.
        dtype: parameters' dtype if not that of run.precision (fp64 in parity tests).
    """
    dtype = dtype or model_dtype(config)
    return TransformerConfig(
        num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size,
        ffn_hidden_size=config.model.ffn_hidden_size,
        num_attention_heads=config.model.num_attention_heads,
        num_query_groups=num_query_groups(config.model),
        kv_channels=head_dim(config.model),
        normalization="RMSNorm",
        layernorm_epsilon=config.model.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Initial values come from model/initialize.py, which does not depend on rank or layout.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        deterministic_mode=config.run.deterministic,
        variable_seq_lengths=False,
        **_parallel_arguments(config),
        **_recompute_arguments(config.run.recompute),
        **_moe_arguments(config),
    )


def _parallel_arguments(config: Config) -> dict:
    parallel = config.parallel
    arguments = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "sequence_parallel": parallel.sequence,
        "expert_model_parallel_size": parallel.expert,
        # Left unset it defaults to the tensor parallel size.
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }
    if parallel.virtual_pipeline:
        arguments["virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline
        arguments["overlap_p2p_comm"] = False
    arguments["batch_p2p_comm"] = torch.cuda.is_available()
    return arguments


def _recompute_arguments(recompute: Recompute) -> dict:
    if recompute is Recompute.full:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def _moe_arguments(config: Config) -> dict:
    moe = config.moe
    if not moe.num_experts:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.router_topk,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_expert_size or None,
        "moe_router_score_function": moe.score.value,
        "moe_router_load_balancing_type": moe.balancing.value,
        "moe_aux_loss_coeff": 0.0 if moe.balancing is Balancing.none else moe.aux_loss_coeff,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_rate,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_router_topk_scaling_factor": moe.scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_permute_fusion": False,
        "moe_grouped_gemm": False,
    }

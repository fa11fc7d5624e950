"""megatron-core as it comes, without Transformer Engine and apex: local layer spec, RMSNorm, RoPE, its own DDP and
distributed optimizer (bf16 parameters, fp32 gradients and master weights).

What the local spec offers of fusions is on: activation, bias and dropout, cross-entropy, each by ``torch.compile``. Its
own attention materializes the scores, so the core attention is replaced by torch's, with cuDNN first.

``build`` is the bf16 baseline, with SwiGLU. ``build_fake_quant`` is BitNet in this same trainer, the way it is usually
written: see ``fake_quant.py``.
"""

from dataclasses import replace

import torch
from fake_quant import FakeQuantLinear
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn.functional import scaled_dot_product_attention, silu
from trainer import Batch, Layer, Trainer, prefer_cudnn

from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config
from bitmoe.model.sizes import padded_vocab_size
from bitmoe.model.transformer_config import make_transformer_config, model_dtype
from bitmoe.parallel.process_groups import Groups, local_device

# Shapes: S = sequence, B = batch, N = query heads, K = key/value heads, D = width of a head.


class CoreAttention(torch.nn.Module):
    """torch's causal attention behind the interface of megatron-core's."""

    def __init__(self, config, **unused):
        super().__init__()

    def forward(self, query, key, value, attention_mask=None, **unused) -> torch.Tensor:
        """[S, B, N, D], [S, B, K, D], [S, B, K, D] to [S, B, N*D]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out_BNSD = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


def build(config: Config, groups: Groups) -> Trainer:
    """The bf16 baseline of this shape; dense or a mixture of experts."""
    settings = {"activation_func": silu, "bias_activation_fusion": True}
    return _build(config, groups, _layer_spec(config), settings)


def build_fake_quant(config: Config, groups: Groups) -> Trainer:
    """BitNet with ReLU2-GLU, sub-norms and fake quantization in the formats of the last bit stage.

    Raises:
        InputError: experts, or several quantization groups.
    """
    if config.moe.num_experts or config.quant.groups != 1:
        raise InputError("the fake-quantized baseline is dense and has one group", fix="moe=none quant.groups=1")
    spec = _layer_spec(config)
    linear = ModuleSpec(module=FakeQuantLinear, params={"stage": config.quant.stages[-1]})
    attention = spec.submodules.self_attention.submodules
    attention.linear_qkv = attention.linear_proj = linear
    spec.submodules.mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=linear, linear_fc2=linear))
    return _build(config, groups, spec, {"activation_func": _squared_relu, "bias_activation_fusion": False})


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


def _layer_spec(config: Config) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(num_experts=config.moe.num_experts or None, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec


def _build(config: Config, groups: Groups, layer_spec: ModuleSpec, settings: dict) -> Trainer:
    transformer_config = replace(
        make_transformer_config(config),
        perform_initialization=True,
        bias_dropout_fusion=True,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native",
        **settings,
    )
    model = GPTModel(
        config=transformer_config,
        transformer_layer_spec=layer_spec,
        vocab_size=padded_vocab_size(config.model),
        max_sequence_length=config.context.seq_length,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        pg_collection=groups.mcore,
    )
    # Norms come in fp32.
    model = model.to(local_device(), model_dtype(config))
    first, angles = model.decoder.layers[0], model.rotary_pos_emb(config.context.seq_length)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = DistributedDataParallel(transformer_config, ddp_config, model)
    optimizer = get_megatron_optimizer(_optimizer_config(config), [model])

    def forward(batch: Batch) -> torch.Tensor:
        positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device).expand_as(batch["tokens"])
        with prefer_cudnn():
            return model(batch["tokens"], positions, None, labels=batch["labels"]).mean()

    def step(batch: Batch) -> torch.Tensor:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = forward(batch)
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        return loss.detach()

    def layer(x_SBH: torch.Tensor) -> torch.Tensor:
        with prefer_cudnn():
            return first(hidden_states=x_SBH, attention_mask=None, rotary_pos_emb=angles)[0]

    return Trainer(step, forward, Layer(first, layer))


def _optimizer_config(config: Config) -> OptimizerConfig:
    optim, dtype = config.optim, model_dtype(config)
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )

"""The fastest bf16 training that is easy to have: transformers' Llama, its layers compiled, and torch's fused AdamW.

No DDP and no buffers of fp32 gradients: parameters, gradients and Adam's moments are all bf16. ``build_with_masters``
keeps fp32 master weights and moments beside the bf16 parameters, as training at this precision does.
"""

from collections.abc import Callable

import torch
from torch.nn.utils import clip_grad_norm_
from trainer import Batch, Layer, Trainer, prefer_cudnn
from transformers import AutoModelForCausalLM, LlamaConfig

from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config, OptimConfig
from bitmoe.model.sizes import head_dim, num_query_groups, padded_vocab_size
from bitmoe.model.transformer_config import model_dtype
from bitmoe.parallel.process_groups import Groups, local_device


def build(config: Config, groups: Groups) -> Trainer:
    """AdamW over the parameters themselves."""
    return _build(config, _plain_update)


def build_with_masters(config: Config, groups: Groups) -> Trainer:
    """AdamW over fp32 copies of the parameters."""
    return _build(config, _master_update)


def _build(config: Config, make_update: Callable) -> Trainer:
    model = _compiled_llama(config)
    update = make_update(list(model.parameters()), config.optim)

    def forward(batch: Batch) -> torch.Tensor:
        with prefer_cudnn():
            return model(input_ids=batch["tokens"], labels=batch["labels"], shift_labels=batch["labels"]).loss

    def step(batch: Batch) -> torch.Tensor:
        loss = forward(batch)
        loss.backward()
        update()
        return loss.detach()

    first, positions_1S = model.model.layers[0], torch.arange(config.context.seq_length, device=local_device())[None]

    def layer(x_BSH: torch.Tensor) -> torch.Tensor:
        angles = model.model.rotary_emb(x_BSH, position_ids=positions_1S)
        with prefer_cudnn():
            return first(x_BSH, attention_mask=None, position_ids=positions_1S, position_embeddings=angles)

    return Trainer(step, forward, Layer(first, layer, is_batch_first=True))


def _compiled_llama(config: Config) -> torch.nn.Module:
    """Llama of this shape with random weights.

    Raises:
        InputError: a mixture of experts.
    """
    if config.moe.num_experts:
        raise InputError("Llama is dense", fix="moe=none")
    shape = config.model
    llama_config = LlamaConfig(
        vocab_size=padded_vocab_size(shape),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=num_query_groups(shape),
        head_dim=head_dim(shape),
        max_position_embeddings=config.context.seq_length,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
        use_cache=False,
    )
    with torch.device(local_device()):
        model = AutoModelForCausalLM.from_config(
            llama_config, dtype=model_dtype(config), attn_implementation="sdpa"
        ).train()
    for layer in model.model.layers:
        layer.compile()
    return model


def _plain_update(parameters: list[torch.nn.Parameter], optim: OptimConfig) -> Callable[[], None]:
    optimizer = _fused_adamw(parameters, optim)

    def update() -> None:
        clip_grad_norm_(parameters, optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return update


def _master_update(parameters: list[torch.nn.Parameter], optim: OptimConfig) -> Callable[[], None]:
    masters = [parameter.detach().float() for parameter in parameters]
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = _fused_adamw(masters, optim)

    @torch.no_grad()
    def update() -> None:
        torch._foreach_copy_([master.grad for master in masters], [parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
        clip_grad_norm_(masters, optim.clip_grad)
        optimizer.step()
        torch._foreach_copy_(parameters, masters)

    return update


def _fused_adamw(tensors: list[torch.Tensor], optim: OptimConfig) -> torch.optim.AdamW:
    betas = (optim.beta1, optim.beta2)
    return torch.optim.AdamW(
        tensors, lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )

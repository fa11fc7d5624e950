"""The language model for transformers: ``AutoModelForCausalLM`` over packed ternary weights.

``import bitmoe.infer`` makes it known; a model folder holds no code, and megatron-core is not needed. Weights stay
packed in memory, at two bits each. The function is that of the training forward; this is for inference alone, nothing
here has a gradient.
"""

# Shapes: B = batch, S = positions of this call, H = hidden, V = vocabulary.

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from bitmoe.config.errors import InputError
from bitmoe.infer.attention import BitmoeAttention, rotary_angles
from bitmoe.infer.cache import new_cache
from bitmoe.infer.configuration import BitmoeConfig
from bitmoe.infer.feed_forward import BitmoeFeedForward
from bitmoe.infer.moe import BitmoeMoE, BitmoeRouter
from bitmoe.infer.norm import BitmoeRMSNorm, BitmoeSubNorm
from bitmoe.infer.packed_linear import PackedLinear


class BitmoeDecoderLayer(nn.Module):
    """Attention and feed-forward, each normalized before and added to the residual stream."""

    def __init__(self, config: BitmoeConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = BitmoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = BitmoeAttention(config, layer_idx)
        self.post_attention_layernorm = BitmoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = BitmoeMoE(config) if config.num_experts else BitmoeFeedForward(config, config.intermediate_size)

    def forward(self, x_BSH: torch.Tensor, **attention_inputs) -> torch.Tensor:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), **attention_inputs)[0]
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))


class BitmoePreTrainedModel(PreTrainedModel):
    """What transformers must know of every bitmoe model."""

    config_class = BitmoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["BitmoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["weight_scale", "expert_bias"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": BitmoeDecoderLayer, "attentions": BitmoeAttention}

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but tensors that are missing or of no use are an error, not a warning.

        Codes that a file stores at 1.6 bits are unpacked to two. Only safetensors are read.

        Raises:
            InputError: the folder's tensors are not those of its config.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs | {"use_safetensors": True})
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info[what]:
                names = ", ".join(sorted(map(str, info[what]))[:5])
                raise InputError(
                    f"{what.replace('_', ' ')} ({len(info[what])}) in the model's files: {names}",
                    fix="convert or download the model again",
                )
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.repack()
        model.config.packing = "2bit"
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A model without a file: plain weights are random, packed ones zero."""
        super()._init_weights(module)
        if isinstance(module, BitmoeSubNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, BitmoeRouter) or (
            isinstance(module, PackedLinear) and module.weight.is_floating_point()
        ):
            initialization.normal_(module.weight, std=0.02)
        elif isinstance(module, PackedLinear):
            initialization.zeros_(module.weight)
            initialization.ones_(module.weight_scale)
        if isinstance(module, BitmoeRouter) and self.config.router_bias:
            initialization.zeros_(module.expert_bias)


class BitmoeModel(BitmoePreTrainedModel):
    """Embedding, layers and the last norm."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: BitmoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BitmoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = BitmoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, S, H] of tokens [B, S]; arguments and output as transformers' decoders have them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        if position_ids is None:
            position_ids = _positions(x_BSH, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BSH,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        angles_BSh = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        rotation = (angles_BSh.cos().to(x_BSH.dtype), angles_BSh.sin().to(x_BSH.dtype))
        for layer in self.layers:
            x_BSH = layer(
                x_BSH,
                rotation=rotation,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BSH), past_key_values=past_key_values)


class BitmoeForCausalLM(BitmoePreTrainedModel, GenerationMixin):
    """The language model: next-token logits, and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BitmoeConfig):
        super().__init__(config)
        self.model = BitmoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V], of the last ``logits_to_keep`` positions only (0: all); with ``labels`` also the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args, kv_bits: int | None = None, **kwargs):
        """As in transformers; ``kv_bits`` (16, 4 or 3) takes the place of the config's, unless a cache is given."""
        if kv_bits is not None and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = new_cache(self.config, kv_bits)
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Give generation a low-bit cache where the config asks for one and the caller for nothing else."""
        says_nothing = generation_config.cache_implementation is None and generation_config.use_cache is not False
        if self.config.kv_bits < 16 and says_nothing:
            model_kwargs.setdefault("past_key_values", new_cache(self.config))
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _positions(x_BSH: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
    """Positions [B, S], or [1, S]: padding on the left does not count."""
    length = x_BSH.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
    past = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=x_BSH.device) + past).unsqueeze(0)

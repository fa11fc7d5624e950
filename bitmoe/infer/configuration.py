"""The configuration of a packed model: its shape and its number formats, as ``config.json`` holds them.

docs/packed-format.md says what every key means. Values that no model can have are refused here, where the file is
read, and not by a product of mismatched shapes later. ``rope_theta`` stays the plain number that is written: this
model has one kind of rotary embedding, so transformers' ``rope_parameters`` would say nothing more.
"""

from transformers import PreTrainedConfig

from bitmoe.config.errors import InputError

INPUT_ROLES = ("qkv", "o", "gate_up", "down")

_CHOICES = {
    "hidden_act": ("relu2_glu", "swiglu"),
    "weights": ("ternary", "none"),
    "packing": ("2bit", "1.6bit"),
    "kv_bits": (16, 4, 3),
    "router_score": ("softmax", "sigmoid"),
}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "quant_groups",
)
_INPUT_FORMATS = ("int8", "int4", "fp4")


class BitmoeConfig(PreTrainedConfig):
    """Shape and number formats of a ``BitmoeForCausalLM``.

    Raises:
        InputError: (a ValueError) a value that no model can have, with its key.
    """

    model_type = "bitmoe"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    hidden_act: str = "relu2_glu"
    sub_norm: bool = True
    weights: str = "ternary"
    packing: str = "2bit"
    quant_groups: int = 1
    input_formats: dict[str, str] | None = None
    o_keep: float = 1.0
    kv_bits: int = 16

    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    router_score: str = "softmax"
    router_bias: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self, **kwargs):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.input_formats = self.input_formats or dict.fromkeys(
            INPUT_ROLES, "none" if self.weights == "none" else "int8"
        )
        super().__post_init__(**kwargs)
        for key, choices in _CHOICES.items():
            _require(getattr(self, key) in choices, self, key, f"use one of {', '.join(map(str, choices))}")
        for key in _POSITIVE:
            _require(_is_count(getattr(self, key)), self, key, "use a whole number of at least 1")
        self._check_attention()
        self._check_inputs()
        self._check_experts()

    def to_diff_dict(self) -> dict:
        """What is saved: every key of the packed format, defaults too, so that the file alone says what it holds."""
        return super().to_diff_dict() | {key: getattr(self, key) for key in BitmoeConfig.__annotations__}

    def _check_attention(self) -> None:
        fits = self.num_attention_heads % self.num_key_value_heads == 0
        _require(fits, self, "num_key_value_heads", f"use a divisor of num_attention_heads={self.num_attention_heads}")
        _require(self.head_dim % 2 == 0, self, "head_dim", "rotary embedding turns pairs: use an even number")
        _require(self.rope_theta > 0, self, "rope_theta", "use a number above 0, such as 10000")

    def _check_inputs(self) -> None:
        _require(set(self.input_formats) == set(INPUT_ROLES), self, "input_formats", f"give {', '.join(INPUT_ROLES)}")
        formats = ("none",) if self.weights == "none" else _INPUT_FORMATS
        fits = set(self.input_formats.values()) <= set(formats)
        _require(fits, self, "input_formats", f"with weights={self.weights} each is one of {', '.join(formats)}")
        _require(0 < self.o_keep <= 1, self, "o_keep", "use a share above 0 and at most 1")
        # What groups cut: output rows of q, k, v, gate and up, input columns of o and down.
        inner = (
            ("moe_intermediate_size", "shared_expert_intermediate_size") if self.num_experts else ("intermediate_size",)
        )
        sizes = {"num_key_value_heads * head_dim": self.num_key_value_heads * self.head_dim}
        for name, size in (sizes | {key: getattr(self, key) for key in inner}).items():
            _require(size % self.quant_groups == 0, self, "quant_groups", f"use a divisor of {name}={size}")

    def _check_experts(self) -> None:
        for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"):
            _require(getattr(self, key) == 0 or _is_count(getattr(self, key)), self, key, "use a whole number")
        if self.num_experts:
            fits = 1 <= self.num_experts_per_tok <= self.num_experts
            _require(fits, self, "num_experts_per_tok", f"use 1 to num_experts={self.num_experts}")
            _require(self.moe_intermediate_size > 0, self, "moe_intermediate_size", "give the experts an inner size")
        needs_sigmoid = self.router_bias and self.router_score != "sigmoid"
        _require(not needs_sigmoid, self, "router_bias", "a bias needs router_score=sigmoid")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(fits: bool, config: BitmoeConfig, key: str, fix: str) -> None:
    if not fits:
        raise InputError(f"{key}={getattr(config, key)!r} is impossible", fix=fix, key=key)

"""``config.json`` of transformers for BitNet models, both ways.

With its ``bitnet`` quantization transformers computes two kinds of model: ``BitNetForCausalLM``, which has sub-norms,
and ``LlamaForCausalLM``, which has none. ``linear_class`` decides what a ``weight_scale`` means, and its default is the
inverse of what this project and Microsoft store, so it is always written.

What comes in is read as data: names of classes and of code in it are compared, and never looked up.
"""

import json
import math
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from bitmoe.config.choices import Activation, Precision, TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import hf_architecture
from bitmoe.config.schema import Config, ContextConfig, ModelConfig, RunConfig, TokenizerConfig
from bitmoe.config.validate import problems
from bitmoe.model.sizes import head_dim, num_query_groups

CONFIG_FILE = "config.json"
_MODEL_TYPES = {"BitNetForCausalLM": "bitnet", "LlamaForCausalLM": "llama"}
_ACTIVATIONS = {Activation.relu2_glu: "relu2", Activation.swiglu: "silu"}
# What the classes of transformers take where config.json is silent.
_DEFAULTS = {
    "BitNetForCausalLM": {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    "LlamaForCausalLM": {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
}
_MAX_INTEGER = 1 << 30
_UNSUPPORTED = "give a dense BitNet as transformers computes it: BitNetForCausalLM, or LlamaForCausalLM without biases"


class WeightScale(Enum):
    """What ``weight_scale`` is to the codes of a matrix."""

    absent = "absent"
    """There are no codes: weights are latent, and made ternary in every forward (online)."""
    factor = "factor"
    """The mean of |w|: outputs are multiplied by it (``autobitlinear``)."""
    divisor = "divisor"
    """Its inverse: outputs are divided by it (``bitlinear``)."""


def hf_config(config: Config, dtype: torch.dtype, *, packed: bool, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of ``config.json`` for a model that transformers can hold.

    Args:
        config: of the model; ``model.vocab_size`` is known.
        dtype: of its tensors.
        packed: whether matrices are codes and scales.
        token_ids: any of ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
    """
    model, architecture = config.model, hf_architecture(config)
    content = {
        "architectures": [architecture],
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(model),
        "head_dim": head_dim(model),
        "hidden_act": _ACTIVATIONS[model.activation],
        "max_position_embeddings": config.context.seq_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": model.init_std,
        "dtype": str(dtype).removeprefix("torch."),
    }
    # transformers' own defaults are ids of other vocabularies.
    content |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | token_ids
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline" if packed else "online",
        "modules_to_not_convert": ["lm_head"],
    }
    return content | {"quantization_config": quantization}


def read_hf_config(folder: Path, precision: Precision) -> tuple[Config, WeightScale]:
    """The model in a Hugging Face folder, and how its matrices are stored.

    Args:
        folder: holds ``config.json`` and, where there is one, ``tokenizer.json``.
        precision: for ``run.precision``.

    Raises:
        InputError: no such file, or a model that this project does not compute; the reason names the key.
    """
    fields = _Fields(folder / CONFIG_FILE)
    architectures = fields.content.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else architectures
    if not isinstance(architecture, str) or architecture not in _MODEL_TYPES:
        raise fields.refusal("architectures", f"is {architectures!r}", _UNSUPPORTED)
    for key in ("attention_bias", "mlp_bias"):
        if fields.flag(key, default=False):
            raise fields.refusal(key, "is true, and a bitmoe model has no biases", _UNSUPPORTED)
    weight_scale = _weight_scale(fields.inner("quantization_config"))
    config = Config(
        model=_model(fields, architecture),
        context=ContextConfig(seq_length=fields.integer("max_position_embeddings")),
        tokenizer=_tokenizer(folder),
        run=RunConfig(precision=precision),
    )
    for problem in problems(config, world_size=None):
        raise InputError(f"{fields.path}: {problem.key}: {problem.what}", fix="give another model")
    return config, weight_scale


def _model(fields: "_Fields", architecture: str) -> ModelConfig:
    defaults = _DEFAULTS[architecture]
    activations = {name: activation for activation, name in _ACTIVATIONS.items()}
    hidden_act = fields.content.get("hidden_act", defaults["hidden_act"])
    if not isinstance(hidden_act, str) or hidden_act not in activations:
        raise fields.refusal("hidden_act", f"is {hidden_act!r}", f"a model with {' or '.join(activations)}")
    hidden, heads, vocab = (fields.integer(k) for k in ("hidden_size", "num_attention_heads", "vocab_size"))
    return ModelConfig(
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=fields.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=fields.integer("num_key_value_heads", default=heads),
        head_dim=fields.integer("head_dim", default=hidden // heads),
        vocab_size=vocab,
        # No rows of padding, and as many ways to cut the rows as there can be.
        vocab_multiple=math.gcd(vocab, 64),
        activation=activations[hidden_act],
        sub_norm=architecture == "BitNetForCausalLM",
        norm_eps=fields.number("rms_norm_eps", default=defaults["rms_norm_eps"]),
        rope_theta=_rope_theta(fields, defaults["rope_theta"]),
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
    )


def _rope_theta(fields: "_Fields", default: float) -> float:
    """The base of rotary positions: at the top, or as newer versions write it in ``rope_parameters``."""
    theta = fields.number("rope_theta", default=default)
    for key in ("rope_parameters", "rope_scaling"):
        inner = fields.inner(key)
        kind = inner.content.get("rope_type", inner.content.get("type", "default"))
        if kind != "default":
            raise inner.refusal("rope_type", f"is {kind!r}", "give a model whose positions are not rescaled")
        theta = inner.number("rope_theta", default=theta)
    return theta


def _weight_scale(quantization: "_Fields") -> WeightScale:
    content = quantization.content
    if content.get("quant_method") != "bitnet":
        raise quantization.refusal(
            "quant_method",
            f"is {content.get('quant_method')!r}: without bitnet quantization this is no BitNet model",
            'a folder whose config.json has quantization_config with quant_method "bitnet"',
        )
    if quantization.flag("use_rms_norm", default=False):
        reason = "is true: the norm it puts in front of every linear is no part of a bitmoe model"
        raise quantization.refusal("use_rms_norm", reason, _UNSUPPORTED)
    skipped = content.get("modules_to_not_convert")
    # transformers leaves the head as it is where nothing is said.
    if skipped is not None and skipped != ["lm_head"]:
        reason = f"is {skipped!r}; in a bitmoe model exactly the head (and no linear of a layer) is left as it is"
        raise quantization.refusal("modules_to_not_convert", reason, 'a model with ["lm_head"]')
    linear_class = quantization.choice("linear_class", ("bitlinear", "autobitlinear"))
    mode = quantization.choice("quantization_mode", ("offline", "online"))
    if linear_class == "bitlinear":
        return WeightScale.divisor
    return WeightScale.factor if mode == "offline" else WeightScale.absent


def _tokenizer(folder: Path) -> TokenizerConfig:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return TokenizerConfig()
    settings = folder / "tokenizer_config.json"
    eod_token = _Fields(settings).content.get("eos_token") if settings.is_file() else None
    if isinstance(eod_token, dict):
        eod_token = eod_token.get("content")
    name = eod_token if isinstance(eod_token, str) else None
    return TokenizerConfig(kind=TokenizerKind.file, path=str(path), eod_token=name)


class _Fields:
    """A JSON object whose values are checked as they are read; null counts as left out.

    Args:
        path: its file.
        content: the object; read from the file where it is left out.
        prefix: in front of its keys, in messages.
    """

    def __init__(self, path: Path, content: dict[str, Any] | None = None, prefix: str = ""):
        self.path, self._prefix = path, prefix
        self.content = self._read() if content is None else content

    def refusal(self, key: str, problem: str, fix: str) -> InputError:
        return InputError(f"{self.path}: {self._prefix}{key} {problem}", fix=fix)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 0 < value <= _MAX_INTEGER:
            raise self.refusal(key, f"is {value!r}", f"a whole number from 1 to {_MAX_INTEGER}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.refusal(key, f"is {value!r}", "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.refusal(key, f"is {value!r}", "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of ``choices``, of which the first is the default."""
        value = self._get(key, choices[0])
        if value not in choices:
            raise self.refusal(key, f"is {value!r}", f"one of {', '.join(choices)}")
        return value

    def inner(self, key: str) -> "_Fields":
        """An object in this one, empty where it is left out."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.refusal(key, f"is {value!r}", "an object")
        return _Fields(self.path, value, f"{self._prefix}{key}.")

    def _get(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None else value

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_bytes())
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}", fix="give the folder of a Hugging Face model") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path} is no JSON ({error})", fix="download the file again") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.path} is no JSON object", fix="download the file again")
        return content

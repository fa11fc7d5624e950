"""Which formats of other projects can hold a model, and why not: asked by ``convert``, and before training by ``plan``.

``bitmoe`` and ``checkpoint`` are this project's own and hold everything. ``hf`` is a model class of transformers with
its ``bitnet`` quantization, ``gguf`` a file for llama.cpp, ``gguf i2_s`` one for bitnet.cpp. A model fits a target
if a runtime of that target computes the same function, up to the precision of its INT8 inputs: what loads and then
answers wrongly is refused here.

The rules were read in transformers 5.23 (``models/bitnet``, ``models/llama``, ``integrations/bitnet.py``) and in the
llama.cpp of llama-cpp-python 0.3.36 (``src/models/{llama,bitnet}.cpp``, ``build_moe_ffn`` of ``src/llama-graph.cpp``).
Those of bitnet.cpp are of builds whose ``bitnet-b1.58`` graph gates with ReLU2 (``build_bitnet_158``); the one of July
2026 gates with SiLU (microsoft/BitNet#588), which is wrong for its own model as well.
"""

from collections.abc import Iterator

from bitmoe.config.choices import ActFormat, Activation, Score, WeightFormat
from bitmoe.config.layout import query_groups
from bitmoe.config.schema import Config

TARGETS = ("bitmoe", "checkpoint", "hf", "gguf", "gguf i2_s")
HF_ROWS_PER_BYTE = 4
GGUF_BLOCK = 256
I2S_BLOCK = 128
BITNET_CPP_ARCHITECTURE = "bitnet-b1.58"
_RUNTIMES = {"hf": "transformers", "gguf": "llama.cpp", "gguf i2_s": "bitnet.cpp"}


def refusals(config: Config, target: str, as_int8: bool = False) -> list[str]:
    """Every reason why a target cannot hold a model, each a sentence that names a key and its value.

    Args:
        config: a valid config; the formats of the last bit stage are those that inference has.
        target: one of ``TARGETS``.
        as_int8: accept that the runtime computes every linear's whole input in INT8.

    Raises:
        ValueError: an unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is none of {', '.join(TARGETS)}")
    if target not in _RUNTIMES:
        return []
    runtime = _RUNTIMES[target]
    of_target = {"hf": _hf, "gguf": _gguf, "gguf i2_s": _i2s}[target]
    reasons = [*_weights(config, runtime), *of_target(config)]
    return reasons if as_int8 else [*reasons, *_inputs(config, runtime)]


def hf_architecture(config: Config) -> str:
    """The class of transformers that computes a dense model: only BitNet's has sub-norms."""
    return "BitNetForCausalLM" if config.model.sub_norm else "LlamaForCausalLM"


def gguf_architecture(config: Config) -> str:
    """The architecture of llama.cpp: only ``bitnet`` has sub-norms, only ``llama`` experts and a head of its own."""
    return "bitnet" if config.model.sub_norm else "llama"


def _weights(config: Config, runtime: str) -> Iterator[str]:
    if config.quant.weights is WeightFormat.none:
        yield f"quant.weights=none: this conversion writes ternary weights for {runtime}, and the model has none"


def _inputs(config: Config, runtime: str) -> Iterator[str]:
    number, stage = len(config.quant.stages) - 1, config.quant.stages[-1]
    formats = {role: getattr(stage, role) for role in ("qkv", "o", "gate_up", "down")}
    other = [f"{role}={value.value}" for role, value in formats.items() if value is not ActFormat.int8]
    other += [f"o_keep={stage.o_keep:g}"] if stage.o_keep < 1 else []
    if other:
        yield (
            f"quant.stages[{number}] has {', '.join(other)}: "
            f"{runtime} computes every whole input in INT8 (as_int8=true accepts that)"
        )


def _hf(config: Config) -> Iterator[str]:
    model, moe = config.model, config.moe
    if moe.num_experts:
        yield (
            f"moe.num_experts={moe.num_experts}: transformers makes nn.Linear modules ternary, "
            "and its experts are fused tensors that would stay unquantized"
        )
    if config.quant.groups > 1:
        yield f"quant.groups={config.quant.groups}: transformers has one weight_scale a matrix"
    key_rows = query_groups(config) * _head_dim(config)
    for size, rows in [_hidden(config), (f"model.num_query_groups={query_groups(config)}", key_rows), _ffn(config)]:
        if rows % HF_ROWS_PER_BYTE:
            yield f"{size} makes {rows} output rows: transformers packs {HF_ROWS_PER_BYTE} of them into a byte"
    if model.sub_norm:
        yield from _square_attention(config, "BitNetForCausalLM")
    elif model.hidden_size % model.num_attention_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads}: "
            f"LlamaForCausalLM takes only divisors of the hidden size, {model.hidden_size}"
        )


def _gguf(config: Config) -> Iterator[str]:
    model, groups = config.model, config.quant.groups
    if model.activation is Activation.relu2_glu:
        yield "model.activation=relu2_glu: the graphs of llama.cpp that fit the rest gate with SiLU"
    if model.sub_norm:
        yield from _gguf_sub_norms(config)
    for size, inputs in [_hidden(config), _attention(config), _ffn(config)]:
        if inputs % GGUF_BLOCK:
            yield f"{size} makes rows of {inputs}: the ternary types of GGUF take rows in blocks of {GGUF_BLOCK}"
    for size, inputs in [_attention(config), _ffn(config)] if groups > 1 else []:
        if inputs % (GGUF_BLOCK * groups):
            yield f"quant.groups={groups} cuts rows of {inputs} ({size}) inside the blocks of {GGUF_BLOCK} of GGUF"
    if config.moe.num_experts:
        yield from _gguf_experts(config)


def _gguf_sub_norms(config: Config) -> Iterator[str]:
    if config.moe.num_experts:
        yield "model.sub_norm=true: llama.cpp has no norm in front of the down projection of experts"
    if not config.model.tie_embeddings:
        yield "model.tie_embeddings=false: the graph of llama.cpp with sub-norms, bitnet, has no head of its own"
    if config.quant.groups > 1:
        yield f"quant.groups={config.quant.groups}: llama.cpp takes the statistics of a sub-norm over its whole input"
    yield from _square_attention(config, "the bitnet graph of llama.cpp")


def _gguf_experts(config: Config) -> Iterator[str]:
    """What llama.cpp's ``llama`` graph computes is Mixtral: softmax over the chosen experts, and nothing else."""
    moe = config.moe
    if moe.score is not Score.softmax:
        yield f"moe.score={moe.score.value}: the llama graph of llama.cpp takes the softmax of router logits"
    if moe.expert_bias:
        yield "moe.expert_bias=true: the llama graph of llama.cpp has no bias on router scores"
    if moe.scaling_factor not in (None, 1):
        yield f"moe.scaling_factor={moe.scaling_factor:g}: the llama graph of llama.cpp does not scale probabilities"
    if moe.shared_expert_size:
        yield f"moe.shared_expert_size={moe.shared_expert_size}: the llama graph of llama.cpp has no shared expert"


def _i2s(config: Config) -> Iterator[str]:
    """What the ``bitnet-b1.58`` graph of bitnet.cpp computes is BitNet b1.58 2B4T, and nothing else."""
    model = config.model
    if config.moe.num_experts:
        yield f"moe.num_experts={config.moe.num_experts}: bitnet.cpp has no MoE"
    if model.activation is not Activation.relu2_glu:
        yield f"model.activation={model.activation.value}: bitnet.cpp gates with ReLU2"
    if not model.sub_norm:
        yield "model.sub_norm=false: bitnet.cpp has sub-norms"
    if not model.tie_embeddings:
        yield "model.tie_embeddings=false: bitnet.cpp has no head of its own"
    if config.quant.groups > 1:
        yield f"quant.groups={config.quant.groups}: I2_S has one scale a matrix"
    for size, inputs in [_hidden(config), _ffn(config)]:
        if inputs % I2S_BLOCK:
            yield f"{size} makes rows of {inputs}: I2_S takes rows in blocks of {I2S_BLOCK}"
    yield from _square_attention(config, "bitnet.cpp")


def _square_attention(config: Config, holder: str) -> Iterator[str]:
    (size, width), hidden = _attention(config), config.model.hidden_size
    if width != hidden:
        yield f"{size} makes attention {width} wide: {holder} needs it as wide as the hidden size, {hidden}"


def _head_dim(config: Config) -> int:
    return config.model.head_dim or config.model.hidden_size // config.model.num_attention_heads


def _hidden(config: Config) -> tuple[str, int]:
    return f"model.hidden_size={config.model.hidden_size}", config.model.hidden_size


def _attention(config: Config) -> tuple[str, int]:
    heads, width = config.model.num_attention_heads, _head_dim(config)
    return f"model.head_dim={width} of {heads} heads", heads * width


def _ffn(config: Config) -> tuple[str, int]:
    if config.moe.num_experts:
        return f"moe.ffn_hidden_size={config.moe.ffn_hidden_size}", config.moe.ffn_hidden_size
    return f"model.ffn_hidden_size={config.model.ffn_hidden_size}", config.model.ffn_hidden_size

"""compressed-tensors' ``pack-quantized`` with 2-bit weights and INT8 inputs, a dense Llama in it, and back.

A word holds sixteen codes of a row, the first in its lowest bits, each plus 2: the format's 2-bit integers go from -2
to 1, and -2 never occurs here. A matrix has one scale, which is written once per row, for vLLM takes 2-bit weights with
scales of rows or of groups, not of matrices. Its kernels (Humming) quantize the input of every linear per token by the
largest |x| over 127, as training does in INT8; compressed-tensors 0.20, which transformers calls, takes it over 127.5.

vLLM has ``LlamaForCausalLM`` with SwiGLU only; transformers has it with both activations.
"""

# Shapes: O = output rows, I = input columns, W = words of a row = I / 16.

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import refusals
from bitmoe.config.schema import Config
from bitmoe.convert.codes import check_finite, is_ternary, ternary_matrix
from bitmoe.convert.hf_config import CONFIG_FILE, hf_config
from bitmoe.convert.hf_export import plan_shards
from bitmoe.model.export_names import export_shapes
from bitmoe.train.run_dir import replace_file
from bitmoe.train.safetensors_shards import Shards, write_shards
from bitmoe.train.weight_source import WeightSource

_CODES_PER_WORD, _CODES_PER_BYTE = 16, 4
_OFFSET = 2
_INTEGER = {"type": "int", "symmetric": True}
_QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {**_INTEGER, "num_bits": 2, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INTEGER, "num_bits": 8, "strategy": "token", "dynamic": True},
        }
    },
}


def write_compressed(
    source: WeightSource, folder: Path, progress: Callable[[str], None], token_ids: Mapping[str, int | None]
) -> None:
    """Write a model in the memory of one of its layers.

    Args:
        source: the model.
        folder: an existing, empty folder, which the caller gives its final name.
        progress: called with the name of each tensor.
        token_ids: any of ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, for ``config.json``.

    Raises:
        InputError: the format cannot hold the model, or its weights are NaN or infinite.
    """
    if reasons := [*refusals(source.config, "hf", as_int8=True), *_refusals(source.config)]:
        raise InputError("; ".join(reasons), fix="to=bitmoe holds every model")
    write_shards(folder, [_stored(source, names) for names in plan_shards(source.config)], progress)
    dtype = source.read("model.norm.weight").dtype
    content = hf_config(source.config, dtype, packed=True, token_ids=dict(token_ids))
    content["quantization_config"] = _QUANTIZATION
    replace_file(folder / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_compressed(shards: Shards, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [O, I] and scale fp32 [1] of a matrix that ``write_compressed`` wrote.

    Args:
        shards: the folder.
        name: exported name of the matrix.

    Raises:
        InputError: words that no ternary codes make, another shape than is written beside them, or several scales.
    """
    words_OW, scale_O1 = shards.read(f"{name}_packed"), shards.read(f"{name}_scale")
    try:
        codes_OI = unpack_int2(words_OW)
    except ValueError as error:
        raise InputError(f"{shards.describe(f'{name}_packed')}: {error}", fix="convert it again") from error
    if shards.read(f"{name}_shape").tolist() != list(codes_OI.shape):
        raise InputError(f"{shards.describe(f'{name}_shape')} is not {list(codes_OI.shape)}", fix="convert it again")
    if scale_O1.shape != (len(codes_OI), 1) or (scale_O1 != scale_O1[0]).any():
        raise InputError(f"{shards.describe(f'{name}_scale')} is not one scale for every row", fix="convert it again")
    return codes_OI, scale_O1[0]


def pack_int2(codes_OI: torch.Tensor) -> torch.Tensor:
    """Pack ternary codes.

    Args:
        codes_OI: int8 [O, I] in {-1, 0, 1}.

    Returns:
        int32 [O, I / 16].

    Raises:
        ValueError: I is no multiple of 16, or a code is not ternary.
    """
    if codes_OI.shape[-1] % _CODES_PER_WORD:
        raise ValueError(f"{codes_OI.shape[-1]} codes a row: they must be a multiple of {_CODES_PER_WORD}")
    low, high = (int(bound) for bound in codes_OI.aminmax())
    if low < -1 or high > 1:
        raise ValueError(f"codes reach from {low} to {high}: packed codes must be -1, 0 or 1")
    fields = (codes_OI + _OFFSET).view(torch.uint8).unflatten(-1, (-1, _CODES_PER_BYTE)) << _bits()
    # The bytes of a word are stored lowest first.
    return fields.sum(-1, dtype=torch.uint8).view(torch.int32)


def unpack_int2(words_OW: torch.Tensor) -> torch.Tensor:
    """Unpack what ``pack_int2`` made.

    Args:
        words_OW: int32 [O, W].

    Returns:
        int8 [O, 16 W] in {-1, 0, 1}.

    Raises:
        ValueError: words that no ternary codes make.
    """
    fields = (words_OW.contiguous().view(torch.uint8).unsqueeze(-1) >> _bits()) & 3
    codes_OI = fields.flatten(-2).view(torch.int8) - _OFFSET
    if bad := int((codes_OI < -1).sum()):
        raise ValueError(f"{bad} of {codes_OI.numel()} codes are not ternary")
    return codes_OI


def _bits() -> torch.Tensor:
    """Where each code of a byte begins."""
    return torch.arange(0, 8, 8 // _CODES_PER_BYTE, dtype=torch.uint8)


def _stored(source: WeightSource, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        weight = source.read(name)
        if is_ternary(name, source.config):
            codes_OI, scale_1 = ternary_matrix(name, weight, groups=1)
            yield f"{name}_packed", pack_int2(codes_OI)
            yield f"{name}_scale", scale_1.repeat(len(codes_OI), 1)
            yield f"{name}_shape", torch.tensor(codes_OI.shape)
        else:
            check_finite(name, weight)
            yield name, weight


def _refusals(config: Config) -> Iterator[str]:
    """What transformers' own quantization holds, and this format does not."""
    if config.model.sub_norm:
        yield (
            "model.sub_norm=true: LlamaForCausalLM, which hf_weights=compressed is written for, has no sub-norms; "
            "hf_weights=packed holds them"
        )
    for name, shape in export_shapes(config).items():
        if is_ternary(name, config) and shape[-1] % _CODES_PER_WORD:
            yield f"{name} has rows of {shape[-1]}: hf_weights=compressed packs {_CODES_PER_WORD} codes into a word"
            return

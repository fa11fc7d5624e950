"""Writes the packed format of docs/packed-format.md from latent weights, one layer at a time.

Each layer is a safetensors file of its own, so no more than its packed codes and one latent tensor are in memory, and
the same weights give the same bytes whatever layout trained them.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from bitmoe.config.convert_schema import Packing
from bitmoe.config.schema import Config
from bitmoe.convert.codes import check_finite, is_ternary, ternary_matrix
from bitmoe.convert.packed_config import packed_config
from bitmoe.convert.packed_manifest import tensor_digest
from bitmoe.convert.tokenizer_files import special_ids, write_json, write_tokenizer_files
from bitmoe.data.tokenizer import Tokenizer
from bitmoe.model.export_names import export_shapes, slots
from bitmoe.train.safetensors_shards import write_shards
from bitmoe.train.weight_source import WeightSource
from bitmoe_kernels.ternary_pack import pack, packed_width

# Shapes: O = output rows, B = bytes of a row, E = experts, G = quantization groups.


def write_packed(
    source: WeightSource,
    tokenizer: Tokenizer,
    folder: Path,
    packing: Packing,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, str]:
    """Write config, tokenizer and tensors; the manifest comes when all files are there (``packed_manifest``).

    Args:
        source: the model.
        tokenizer: its tokenizer.
        folder: an empty folder, which the caller gives its final name.
        packing: how codes are stored.
        progress: called with the name of each tensor.

    Returns:
        ``tensor_digest`` of every tensor.

    Raises:
        InputError: weights with NaN or infinity.
    """
    config, digests = source.config, {}

    def tensors(names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            for written, tensor in _packed(source, name, shapes[name], packing.value).items():
                digests[written] = tensor_digest(tensor)
                yield written, tensor

    write_json(folder / "config.json", packed_config(config, packing, special_ids(tokenizer)))
    write_tokenizer_files(tokenizer, folder, config.context.seq_length)
    shapes = export_shapes(config)
    layers = groupby(slots(config), key=lambda slot: slot.layer)
    write_shards(folder, [tensors([name for slot in layer for name in slot.names]) for _, layer in layers], progress)
    return digests


def packed_bytes(config: Config, packing: Packing) -> int:
    """Bytes of all tensors, if those that are not ternary have four a number."""
    total = 0
    for name, shape in export_shapes(config).items():
        if is_ternary(name, config):
            matrices = prod(shape[:-2])
            total += prod(shape[:-1]) * packed_width(shape[-1], packing.value) + 4 * config.quant.groups * matrices
        else:
            total += 4 * prod(shape)
    return total


def scale_name(name: str) -> str:
    """Where the scales of a ternary matrix lie."""
    return f"{name}_scale"


def _packed(source: WeightSource, name: str, shape: tuple[int, ...], layout: str) -> dict[str, torch.Tensor]:
    """The tensors that one exported tensor becomes, by name."""
    if is_ternary(name, source.config):
        packed, scale = _packed_matrices(source, name, shape, layout)
        return {name: packed, scale_name(name): scale}
    tensor = source.read(name)
    check_finite(name, tensor)
    return {name: tensor}


def _packed_matrices(
    source: WeightSource, name: str, shape: tuple[int, ...], layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes uint8 [O, B] and scale fp32 [G]; of stacked experts [E, O, B] and [E, G], made one by one."""
    groups = source.config.quant.groups
    if len(shape) == 2:
        codes_OI, scale_G = ternary_matrix(name, source.read(name), groups)
        return pack(codes_OI, layout), scale_G
    packed_EOB = torch.empty(*shape[:-1], packed_width(shape[-1], layout), dtype=torch.uint8)
    scale_EG = torch.empty(shape[0], groups)
    for expert in range(shape[0]):
        codes_OI, scale_EG[expert] = ternary_matrix(name, source.read(name, expert), groups)
        packed_EOB[expert] = pack(codes_OI, layout)
    return packed_EOB, scale_EG

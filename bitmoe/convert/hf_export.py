"""Writes a dense model as transformers' ``bitnet`` quantization reads it: ``config.json`` and safetensors.

Packed, every ternary matrix is four codes a byte and one ``weight_scale``, the mean of |w|, in fp32 as it was computed;
transformers rounds it to the dtype it loads the model in. Online, every tensor is stored as the training forward used
it, and transformers makes matrices ternary whenever it computes. The input of every linear is INT8 there, whatever
the model was trained with.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import refusals
from bitmoe.config.schema import Config
from bitmoe.convert.codes import check_finite, is_ternary, ternary_matrix
from bitmoe.convert.hf_config import CONFIG_FILE, hf_config
from bitmoe.convert.hf_packing import pack_rows
from bitmoe.model.export_names import export_shapes, slots
from bitmoe.train.run_dir import replace_file
from bitmoe.train.safetensors_shards import write_shards
from bitmoe.train.weight_source import WeightSource

_MAX_SHARD_BYTES = 5 << 30
# Of the widest dtype, for shards must be known before the first tensor is read.
_MAX_ELEMENT_BYTES = 4


def write_hf(
    source: WeightSource,
    folder: Path,
    *,
    packed: bool,
    progress: Callable[[str], None] = lambda name: None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    token_ids: Mapping[str, int | None] | None = None,
) -> None:
    """Write a model in the memory of one of its layers.

    Args:
        source: the model.
        folder: an existing, empty folder, which the caller gives its final name.
        packed: two bits a ternary weight instead of the latent weights.
        progress: called with the name of each tensor.
        max_shard_bytes: a layer that is larger is cut into several files; a tensor never is.
        token_ids: any of ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, for ``config.json``.

    Raises:
        InputError: transformers cannot hold the model, or its weights are NaN or infinite.
    """
    reasons = refusals(source.config, "hf", as_int8=True)
    if reasons:
        raise InputError("; ".join(reasons), fix="to=bitmoe holds every model")
    convert = _packed if packed else _as_read
    shards = [convert(source, names) for names in plan_shards(source.config, max_shard_bytes)]
    write_shards(folder, shards, progress)
    dtype = source.read("model.norm.weight").dtype
    content = hf_config(source.config, dtype, packed=packed, token_ids=dict(token_ids or {}))
    replace_file(folder / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())


def plan_shards(config: Config, max_bytes: int = _MAX_SHARD_BYTES) -> list[list[str]]:
    """Names of each shard: one layer, or what stands before or after all layers, cut where it is too large."""
    shapes = export_shapes(config)
    shards = []
    for _, layer in groupby(slots(config), key=lambda slot: slot.layer):
        shard, size = [], 0
        for name in (name for slot in layer for name in slot.names):
            added = prod(shapes[name]) * _MAX_ELEMENT_BYTES
            if shard and size + added > max_bytes:
                shards.append(shard)
                shard, size = [], 0
            shard.append(name)
            size += added
        shards.append(shard)
    return shards


def _as_read(source: WeightSource, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        weight = source.read(name)
        check_finite(name, weight)
        yield name, weight


def _packed(source: WeightSource, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in _as_read(source, names):
        if is_ternary(name, source.config):
            codes_OI, scale_1 = ternary_matrix(name, weight, groups=1)
            yield name, pack_rows(codes_OI)
            yield f"{name}_scale", scale_1
        else:
            yield name, weight

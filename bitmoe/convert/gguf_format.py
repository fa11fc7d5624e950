"""Writes GGUF files for llama.cpp and bitnet.cpp from latent weights, and reads their ternary codes back.

Which models they compute is decided in ``bitmoe.config.export_targets``. Ternary matrices become TQ1_0 or TQ2_0:
blocks of 256 weights of a row, each with a scale ``d`` in fp16, so that codes are kept exactly and scales to 11 bits.
A group of quantization whose borders lie between blocks keeps a scale of its own. Embedding and head are fp16, norms
and routers fp32. For bitnet.cpp they become I2_S (``i2s_format.py``), with one scale in fp32.

llama.cpp quantizes the input of a ternary matrix to INT8 in blocks of 256 features, finer than this project's one scale
a token and group. So outputs agree closely, not bit for bit, and groups of the input need no word in the file.
bitnet.cpp takes one scale a token, as training does with one group.
"""

# Shapes: O = output rows, r = some of them, I = input features, b = bytes of a row, E = experts, G = groups,
#         B = I / 256 blocks of a row.

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import BITNET_CPP_ARCHITECTURE, GGUF_BLOCK, gguf_architecture
from bitmoe.config.schema import Config
from bitmoe.convert.codes import check_finite, is_row_parallel, ternary_matrix
from bitmoe.convert.gguf_names import export_name, gguf_name, interleave_halves
from bitmoe.convert.gguf_tokenizer import gguf_vocabulary
from bitmoe.convert.i2s_format import I2_S, MOSTLY_I2_S, GgufReader, i2s_bytes, pack_i2s, unpack_i2s
from bitmoe.data.tokenizer import Tokenizer
from bitmoe.model.export_names import export_shapes
from bitmoe.model.sizes import head_dim, num_query_groups
from bitmoe.train.weight_source import WeightSource

_FILE_TYPES = {"tq1_0": LlamaFileType.MOSTLY_TQ1_0, "tq2_0": LlamaFileType.MOSTLY_TQ2_0, "i2_s": MOSTLY_I2_S}
_TERNARY = {"tq1_0": GGMLQuantizationType.TQ1_0, "tq2_0": GGMLQuantizationType.TQ2_0, "i2_s": I2_S}
_ROWS_AT_ONCE = 64
_HALF = ("model.embed_tokens.weight", "lm_head.weight")


def write_gguf(
    source: WeightSource,
    out_file: Path,
    type_name: str,
    tokenizer: Tokenizer,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a model tensor by tensor, in the memory of one.

    Args:
        source: a model without a reason in ``refusals(config, "gguf")``, for i2_s ``refusals(config, "gguf i2_s")``.
        out_file: a new file, in a folder that the caller makes durable and gives its final name.
        type_name: ``tq1_0`` (1.69 bits a weight) or ``tq2_0`` (2.06 bits, faster) for llama.cpp, ``i2_s`` (2 bits) for
            bitnet.cpp.
        tokenizer: the model's.
        progress: called with the name of each tensor that was written.

    Raises:
        InputError: weights that are NaN or Inf or too large for fp16, or a tokenizer that llama.cpp does not have.
    """
    config = source.config
    shapes = export_shapes(config)
    architecture = BITNET_CPP_ARCHITECTURE if type_name == "i2_s" else gguf_architecture(config)
    with closing(gguf.GGUFWriter(out_file, architecture)) as writer:
        _add_metadata(writer, config, type_name)
        gguf_vocabulary(tokenizer, config.model.vocab_size).add_to(writer)
        for name, shape in shapes.items():
            kind = _type_of(name, type_name)
            if kind == I2_S:
                writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.int8), i2s_bytes(shape), kind)
                continue
            bytes_shape = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(gguf_name(name), bytes_shape, np.dtype(np.uint8), int(np.prod(bytes_shape)), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape in shapes.items():
            writer.write_tensor_data(_tensor_bytes(source, name, shape, _type_of(name, type_name)))
            progress(name)


def read_gguf_codes(file: Path, config: Config) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Ternary matrices of a file that ``write_gguf`` wrote, as ``ternarize`` returns them.

    Args:
        file: the file.
        config: of its model.

    Yields:
        Exported name, codes int8 [..., O, I], scale fp32 [..., G]; the scale is 0 where a group has no code but 0.

    Raises:
        InputError: an unknown tensor, bits that are no code, or blocks of one group with different scales.
    """
    for tensor in GgufReader(file).tensors:
        if tensor.tensor_type in _TERNARY.values():
            name = export_name(tensor.name)
            if tensor.tensor_type == I2_S:
                yield name, *unpack_i2s(tensor.data, tensor.shape.tolist()[::-1])
            elif tensor.data.ndim == 2:
                yield name, *_decode(tensor.data, tensor.tensor_type, name, config)
            else:
                experts = [_decode(matrix, tensor.tensor_type, name, config) for matrix in tensor.data]
                yield name, *(torch.stack(parts) for parts in zip(*experts, strict=True))


def _add_metadata(writer: gguf.GGUFWriter, config: Config, type_name: str) -> None:
    model, moe = config.model, config.moe
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(config.run.name)
    writer.add_file_type(_FILE_TYPES[type_name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(config.context.seq_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(moe.ffn_hidden_size if moe.num_experts else model.ffn_hidden_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(num_query_groups(model))
    writer.add_key_length(head_dim(model))
    writer.add_value_length(head_dim(model))
    writer.add_rope_dimension_count(head_dim(model))
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    if type_name == "i2_s":
        # Graphs of today ignore it; one with a choice of activations (microsoft/BitNet#605) takes ReLU2 by it.
        writer.add_string(f"{writer.arch}.hidden_activation", "relu2")
    if moe.num_experts:
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.router_topk)


def _type_of(name: str, type_name: str) -> GGMLQuantizationType | int:
    if name.endswith("_proj.weight"):
        return _TERNARY[type_name]
    return GGMLQuantizationType.F16 if name in _HALF else GGMLQuantizationType.F32


def _tensor_bytes(
    source: WeightSource, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType | int
) -> np.ndarray:
    """A tensor as GGUF stores it, uint8 [..., b]; of stacked experts one is read at a time."""
    if kind == I2_S:
        return pack_i2s(*ternary_matrix(name, source.read(name), groups=1))
    if kind not in _TERNARY.values():
        dtype = torch.float16 if kind is GGMLQuantizationType.F16 else torch.float32
        tensor = source.read(name).to(dtype)
        check_finite(f"{name} in {kind.name}", tensor)
        return tensor.contiguous().numpy().view(np.uint8)
    if len(shape) == 2:
        return _ternary_bytes(source.read(name), name, source.config, kind)
    packed_EOb = np.empty(gguf.quant_shape_to_byte_shape(shape, kind), dtype=np.uint8)
    for expert in range(shape[0]):
        packed_EOb[expert] = _ternary_bytes(source.read(name, expert), name, source.config, kind)
    return packed_EOb


def _ternary_bytes(w_OI: torch.Tensor, name: str, config: Config, kind: GGMLQuantizationType) -> np.ndarray:
    """Codes and scales of a latent matrix, uint8 [O, b], its rows in the order of llama.cpp."""
    codes_OI, scale_G = ternary_matrix(name, w_OI, config.quant.groups)
    axis, rows_of_group = _group_axis(name), len(codes_OI) // len(scale_G)
    packed = []
    for rows_r in _row_order(name, len(codes_OI), config).split(_ROWS_AT_ONCE):
        # A part of the rows has one scale for each of them, where groups are blocks of rows.
        scale = scale_G[rows_r // rows_of_group] if axis == 0 else scale_G
        packed.append(gguf.quantize(_dequantized(codes_OI[rows_r], scale, axis), kind))
        stored_rI = _dequantized(codes_OI[rows_r], scale.half().float(), axis)
        if not np.array_equal(gguf.dequantize(packed[-1], kind), stored_rI):
            raise InputError(
                f"{kind.name} does not hold {name} with scales {scale_G.tolist()}", fix="convert to=bitmoe"
            )
    return np.concatenate(packed)


def _dequantized(codes_OI: torch.Tensor, scale_G: torch.Tensor, axis: int) -> np.ndarray:
    return (codes_OI * scale_G.repeat_interleave(codes_OI.shape[axis] // len(scale_G)).unsqueeze(1 - axis)).numpy()


def _decode(
    packed_Ob: np.ndarray, kind: GGMLQuantizationType, name: str, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, I] and scales [G] of a stored matrix."""
    order_O, axis = _row_order(name, len(packed_Ob), config), _group_axis(name)
    codes_OI = torch.empty(gguf.quant_shape_from_byte_shape(packed_Ob.shape, kind), dtype=torch.int8)
    scale_OB = torch.empty(len(packed_Ob), codes_OI.shape[1] // GGUF_BLOCK)
    for start in range(0, len(packed_Ob), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        w_rI = torch.from_numpy(gguf.dequantize(packed_Ob[rows], kind))
        codes_OI[order_O[rows]] = w_rI.sign().to(torch.int8)
        scale_OB[order_O[rows]] = w_rI.unflatten(1, (-1, GGUF_BLOCK)).abs().amax(-1)
    blocks = scale_OB.unflatten(axis, (config.quant.groups, -1)).movedim(axis, 0).flatten(1)  # [G, blocks of a group]
    scale_G = blocks.amax(1)
    if not ((blocks == 0) | (blocks == scale_G[:, None])).all():
        raise InputError(f"blocks of {name} have different scales", fix="convert the model again")
    return codes_OI, scale_G


def _row_order(name: str, rows: int, config: Config) -> torch.Tensor:
    """Which row of an exported matrix is the first in the file, the second, and so on: int64 [O]."""
    heads = {"q_proj": config.model.num_attention_heads, "k_proj": num_query_groups(config.model)}
    part, order_O = name.split(".")[-2], torch.arange(rows)
    is_interleaved = part in heads and gguf_architecture(config) == "llama"
    return interleave_halves(order_O, heads[part]) if is_interleaved else order_O


def _group_axis(name: str) -> int:
    return 1 if is_row_parallel(name) else 0

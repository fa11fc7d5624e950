"""I2_S, the ternary type of bitnet.cpp: its bytes, and a reader of GGUF files that have it.

A matrix is flat, row by row. Each 128 codes are 32 bytes, byte j with codes j, 32 + j, 64 + j and 96 + j from its
highest bits to its lowest, as code + 1. After all of them come 32 bytes, of which the first four are the scale of the
matrix in fp32. This is the layout of bitnet.cpp on x86 with AVX2, as its sources build it (``quantize_i2_s`` of
``src/ggml-bitnet-mad.cpp``, where ``ACT_PARALLEL`` is defined); a build for ARM reads other blocks.

llama.cpp has no such type, so the ``gguf`` package does not know it: writing needs only the number, reading one more
step in building the list of tensors.
"""

# Shapes: O = output rows, I = input features, b = O I / 4 + 32 bytes, B = O I / 128 blocks.

from math import prod

import gguf
import numpy as np
import torch
from gguf.gguf_reader import ReaderField, ReaderTensor

from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import I2S_BLOCK

I2_S = 36
"""``GGML_TYPE_I2_S``."""
MOSTLY_I2_S = 40
"""``LLAMA_FTYPE_MOSTLY_I2_S`` of bitnet.cpp, whose llama.cpp has another meaning for it today."""
_QUARTER, _TAIL = I2S_BLOCK // 4, 32
_SHIFTS = np.array([[6], [4], [2], [0]], dtype=np.uint8)


def i2s_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix."""
    return prod(shape) // 4 + _TAIL


def pack_i2s(codes_OI: torch.Tensor, scale_1: torch.Tensor) -> np.ndarray:
    """Codes int8 [O, I] and their scale fp32 [1] as uint8 [b]; I is a multiple of 128."""
    unsigned_B4j = (codes_OI + 1).numpy().view(np.uint8).reshape(-1, 4, _QUARTER)
    tail = np.zeros(_TAIL // 4, dtype="<f4")
    tail[0] = scale_1.item()
    return np.concatenate([np.bitwise_or.reduce(unsigned_B4j << _SHIFTS, axis=1).ravel(), tail.view(np.uint8)])


def unpack_i2s(packed_b: np.ndarray, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [O, I] and scale fp32 [1] of what ``pack_i2s`` returned.

    Raises:
        InputError: bits that are no code.
    """
    unsigned_B4j = packed_b[:-_TAIL].reshape(-1, 1, _QUARTER) >> _SHIFTS & 3
    if (unsigned_B4j == 3).any():
        raise InputError("the I2_S data has bits that are no ternary code", fix="convert the model again")
    scale_1 = packed_b[-_TAIL:][:4].view("<f4").astype(np.float32)
    return torch.from_numpy(unsigned_B4j.view(np.int8).reshape(shape) - 1), torch.from_numpy(scale_1)


class GgufReader(gguf.GGUFReader):
    """``gguf.GGUFReader`` with I2_S: such a tensor has type 36, and its bytes as ``data``, uint8 [b]."""

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        i2s = [field for field in fields if field.parts[4][0] == I2_S]
        super()._build_tensors(start_offs, [field for field in fields if field.parts[4][0] != I2_S])
        self.tensors += [self._i2s_tensor(start_offs, field) for field in i2s]

    def _i2s_tensor(self, start_offs: int, field: ReaderField) -> ReaderTensor:
        *_, dims, _, offset = field.parts
        start, size = start_offs + int(offset[0]), i2s_bytes(dims.tolist())
        return ReaderTensor(
            name=field.name,
            tensor_type=I2_S,
            shape=dims,
            n_elements=prod(dims.tolist()),
            n_bytes=size,
            data_offset=start,
            data=self.data[start : start + size],
            field=field,
        )

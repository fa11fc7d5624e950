"""Every kind of export, read back from what was written: its tensors, and the logits its runtime computes.

The packed model runs layer by layer. A model of transformers' own class is run whole, as its user will run it. GGUF is
run with the codes and scales of the file in the packed model, for there is no runtime of it here, and so is
compressed-tensors, for there is no vLLM.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import gguf
import torch
from transformers import AutoModelForCausalLM

from bitmoe.config.convert_schema import Packing
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, Config
from bitmoe.convert.codes import is_ternary, ternary_matrix
from bitmoe.convert.compressed_format import read_compressed
from bitmoe.convert.gguf_format import read_gguf_codes
from bitmoe.convert.gguf_names import export_name
from bitmoe.convert.hf_packing import unpack_rows
from bitmoe.convert.i2s_format import GgufReader
from bitmoe.convert.packed_config import packed_config
from bitmoe.convert.packed_format import scale_name
from bitmoe.convert.packed_forward import PackedTensors, exported_logits
from bitmoe.convert.parity import EXACT, Limits
from bitmoe.convert.tokenizer_files import SpecialIds
from bitmoe.infer import BitmoeConfig
from bitmoe.model.export_names import export_shapes
from bitmoe.train.safetensors_shards import Shards
from bitmoe_kernels.ternary_pack import pack, unpack

# Shapes: B = sequences, S = positions, V = vocabulary, O = output rows, I = input columns, G = groups.


class WrittenExport(Protocol):
    """An export as it lies on disk."""

    limits: Limits
    """How far it may be from the training forward."""
    stage: BitStage | None
    """Formats of inputs that its runtime computes with; None means those of the model."""

    def ternary(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int8 [..., O, I] and scales fp32 [..., G] of an exported matrix."""

    def numbers(self, name: str) -> torch.Tensor:
        """An exported tensor that is not ternary."""

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Next-token logits fp32 [B, S, V]."""


class PackedExport:
    """The packed format."""

    limits, stage = EXACT, None

    def __init__(self, folder: Path, config: Config):
        self._tensors = PackedTensors(folder)
        self._inputs = {name: shape[-1] for name, shape in export_shapes(config).items()}

    def ternary(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            codes = unpack(self._tensors.read(name), self._inputs[name], self._tensors.config.packing)
        except ValueError as error:
            raise InputError(f"{name}: {error}", fix="convert it again") from error
        return codes, self._tensors.read(scale_name(name))

    def numbers(self, name: str) -> torch.Tensor:
        return self._tensors.read(name)

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        return exported_logits(self._tensors, tokens_BS)


class HfExport:
    """transformers' ``bitnet``: the same function with INT8 inputs, up to the order of sums."""

    # Inputs that fall between two INT8 codes are rounded by the last bit of sums, which are added in another order.
    limits, stage = Limits(top1_agreement=0.99, mean_kl=1e-4), BitStage()

    def __init__(self, folder: Path, is_packed: bool):
        self._folder, self._is_packed, self._shards = folder, is_packed, Shards(folder)

    def ternary(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        stored = self._shards.read(name)
        if self._is_packed:
            return unpack_rows(stored), self._shards.read(scale_name(name)).float().view(1)
        return ternary_matrix(name, stored, groups=1)

    def numbers(self, name: str) -> torch.Tensor:
        return self._shards.read(name)

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        # transformers compiles its quantizers, which needs a C++ compiler; as they are, they compute the same.
        with torch._dynamo.config.patch(disable=True):
            return model.eval()(tokens_BS, use_cache=False).logits.float()


class CompressedExport:
    """compressed-tensors: exact codes and scales."""

    limits, stage = EXACT, BitStage()

    def __init__(self, folder: Path, config: Config):
        self._config, self._shards = replace(config, quant=replace(config.quant, stages=[BitStage()])), Shards(folder)
        self.config = BitmoeConfig(**packed_config(self._config, Packing["2bit"], SpecialIds(eos=0, pad=0)))

    def ternary(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return read_compressed(self._shards, name)

    def numbers(self, name: str) -> torch.Tensor:
        return self._shards.read(name)

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        return exported_logits(self, tokens_BS)

    def names(self) -> Iterable[str]:
        """As ``ExportedTensors``."""
        return {name.removesuffix("_packed") for name in self._shards.stored if not name.endswith("_shape")}

    def read(self, name: str) -> torch.Tensor:
        """As ``ExportedTensors``."""
        if is_ternary(name, self._config):
            return pack(self.ternary(name)[0])
        matrix = name.removesuffix("_scale")
        return self.numbers(name) if matrix == name else self.ternary(matrix)[1]


class GgufExport:
    """GGUF: exact codes, scales in fp16 (of I2_S in fp32), embedding and head in fp16."""

    # Rounding the embedding to fp16 moves inputs to other INT8 codes; a model that is not trained answers to that with
    # other tokens. The tensors are compared strictly, and this finds another function.
    limits, stage = Limits(top1_agreement=0.9, mean_kl=1e-2, scale=2.0**-11), BitStage()

    def __init__(self, file: Path, config: Config):
        self._config = replace(config, quant=replace(config.quant, stages=[BitStage()]))
        # Two bits a weight: all of them fit where the model was trained.
        self._ternary = {name: (pack(codes), scale) for name, codes, scale in read_gguf_codes(file, config)}
        self._inputs = {name: shape[-1] for name, shape in export_shapes(config).items()}
        self._stored = {export_name(tensor.name): tensor for tensor in GgufReader(file).tensors}
        self.config = BitmoeConfig(**packed_config(self._config, Packing["2bit"], SpecialIds(eos=0, pad=0)))

    def ternary(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scale = self._ternary[name]
        return unpack(packed, self._inputs[name]), scale

    def numbers(self, name: str) -> torch.Tensor:
        tensor = self._stored[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        return exported_logits(self, tokens_BS)

    def names(self) -> Iterable[str]:
        """As ``ExportedTensors``: a matrix and its scales under two names."""
        for name in self._stored:
            yield from (name, scale_name(name)) if is_ternary(name, self._config) else (name,)

    def read(self, name: str) -> torch.Tensor:
        """As ``ExportedTensors``."""
        matrix = name.removesuffix("_scale")
        if matrix not in self._ternary:
            return self.numbers(name)
        return self._ternary[matrix][int(matrix != name)]

"""A BitNet model of Hugging Face as a ``WeightSource``: what ``convert to=checkpoint`` starts from.

``config.json`` is data, tensors come from safetensors alone, and everything they must be is checked against what the
config says: names, shapes and dtypes of all tensors and the value of all scales before the first weight is read, the
weights when they are read. Nothing of transformers is imported.

Latent weights of a packed model are lost; ``latent_weights`` makes some with the same codes and scales, so that
training continues the same function.
"""

from functools import cached_property
from pathlib import Path

import torch

from bitmoe.config.choices import Precision, TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.convert.hf_config import WeightScale, read_hf_config
from bitmoe.convert.hf_packing import CODES_PER_BYTE, TERNARY_SUFFIX, unpack_rows
from bitmoe.convert.latent_weights import latent_weights
from bitmoe.data.tokenizer import Tokenizer, build_tokenizer
from bitmoe.model.export_names import Slot, export_shapes, fuse
from bitmoe.train.safetensors_shards import Shards

_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
_FLOATS = ("F32", "BF16", "F16")
_LINEAR_CLASS = {WeightScale.factor: "autobitlinear", WeightScale.divisor: "bitlinear"}


class HFBitNetWeights:
    """The ``WeightSource`` over a folder with ``config.json`` and safetensors; reads one tensor at a time.

    Args:
        path: the folder.
        precision: dtype of the weights it gives.

    Raises:
        InputError: a model this project does not compute, or damaged files; names the file, and the key or tensor.
    """

    def __init__(self, path: Path, precision: Precision):
        self._folder, self._dtype = Path(path), _DTYPES[precision]
        self.config, self._weight_scale = read_hf_config(self._folder, precision)
        self._shards = Shards(self._folder)
        self._check_layers()
        self._shapes = export_shapes(self.config)
        self._check_tensors()
        self._scales = {
            name: self._scale(f"{name}_scale")
            for name in self._shapes
            if self._weight_scale is not WeightScale.absent and name.endswith(TERNARY_SUFFIX)
        }

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InputError: the folder has no ``tokenizer.json``, or one that cannot be used.
        """
        if self.config.tokenizer.kind is not TokenizerKind.file:
            raise InputError(f"{self._folder} has no tokenizer.json", fix="put that of the model there")
        return build_tokenizer(self.config.tokenizer)

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One exported tensor, as ``WeightSource.read`` says; there are no experts.

        Raises:
            InputError: bytes that are no ternary codes, NaN or infinity, or a scale that no latent weights have.
        """
        stored = self._shards.read(name)
        if name not in self._scales:
            return stored.to(self._dtype)
        try:
            return latent_weights(unpack_rows(stored), self._scales[name], self._dtype)
        except ValueError as error:
            fix = "another precision, or another copy of the model"
            raise InputError(f"{self._shards.describe(name)}: {error}", fix=fix) from error

    def read_slot(self, slot: Slot, expert: int | None = None) -> torch.Tensor:
        """One tensor of one layer as a checkpoint fuses it."""
        return fuse(slot, {name: self.read(name, expert) for name in slot.names}, self.config)

    def _check_layers(self) -> None:
        """Refuse more layers than tensors before a name is made for each of them."""
        layers, tensors = self.config.model.num_layers, len(self._shards.stored)
        if layers > tensors:
            raise self._refusal(f"config.json says {layers} layers, and there are {tensors} tensors")

    def _check_tensors(self) -> None:
        expected = self._expected()
        stored = self._shards.stored
        for name in sorted(expected.keys() - stored.keys()):
            raise self._refusal(f"the tensor {name} is missing")
        for name in sorted(stored.keys() - expected.keys()):
            raise InputError(
                f"{self._shards.describe(name)} is no tensor of the model that config.json describes",
                fix="give a model of transformers without additions",
            )
        for name, (dtypes, shapes) in expected.items():
            if stored[name].dtype not in dtypes or stored[name].shape not in shapes:
                raise InputError(
                    f"{self._shards.describe(name)} is {stored[name].dtype} {list(stored[name].shape)}, "
                    f"config.json means {' or '.join(dtypes)} {list(shapes[0])}",
                    fix="give weights and config of the same model",
                )

    def _expected(self) -> dict[str, tuple[tuple[str, ...], list[tuple[int, ...]]]]:
        """Dtypes and shapes that each tensor may have."""
        expected = {}
        for name, shape in self._shapes.items():
            if self._weight_scale is WeightScale.absent or not name.endswith(TERNARY_SUFFIX):
                expected[name] = (_FLOATS, [shape])
            elif shape[0] % CODES_PER_BYTE:
                raise self._refusal(f"{name} has {shape[0]} rows, and four rows are packed into one")
            else:
                expected[name] = (("U8",), [(shape[0] // CODES_PER_BYTE, shape[1])])
                expected[f"{name}_scale"] = (_FLOATS, [(1,), ()])
        return expected

    def _scale(self, name: str) -> float:
        """The mean of |w|, an fp32 number, whatever convention it is stored in."""
        stored, kind = float(self._shards.read(name)), _LINEAR_CLASS[self._weight_scale]
        where = self._shards.describe(name)
        if stored <= 0:
            raise InputError(f"{where} is {stored:g}, and a scale is above 0", fix="give another copy of the model")
        scale = stored if self._weight_scale is WeightScale.factor else 1 / stored
        if scale > 1:
            (other,) = set(_LINEAR_CLASS.values()) - {kind}
            raise InputError(
                f"{where} is {stored:g}: with linear_class {kind!r} the mean of |w| would be {scale:g}, "
                f"which no BitNet has; it seems to be stored as {other!r} stores it",
                fix=f'write "linear_class": "{other}" into quantization_config of config.json, if that is so',
            )
        return float(torch.tensor(scale, dtype=torch.float32))

    def _refusal(self, problem: str) -> InputError:
        return InputError(f"{self._folder}: {problem}", fix="give weights and config of the same model")

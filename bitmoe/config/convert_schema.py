"""The schema of ``bitmoe convert``: what to read, what to write, in which format.

The literal under a field is its documentation, as in ``schema.py``.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bitmoe.config.choices import Precision
from bitmoe.config.errors import InputError

# Members of these two are named as users write them, which no class body could.
Packing = Enum("Packing", {"2bit": "2bit", "1.6bit": "1.6bit"})
Packing.__doc__ = "Bits of a ternary code in the packed format."


class Target(Enum):
    """Format to write: this project's packed one, transformers' BitNet, llama.cpp's, or latent weights to train on."""

    bitmoe = "bitmoe"
    hf = "hf"
    gguf = "gguf"
    checkpoint = "checkpoint"


class HfWeights(Enum):
    """packed: two bits a weight; online: master weights that transformers quantizes as it runs; compressed: two bits a
    weight as compressed-tensors packs them, for vLLM."""

    packed = "packed"
    online = "online"
    compressed = "compressed"


class GgufType(Enum):
    """Ternary types: tq2_0 and tq1_0 of llama.cpp; i2_s of bitnet.cpp, in a build whose graph has ReLU2 (llama.cpp
    itself refuses the file)."""

    tq2_0 = "tq2_0"
    tq1_0 = "tq1_0"
    i2_s = "i2_s"


@dataclass
class ConvertConfig:
    """One conversion."""

    source: str | None = None
    """A run's folder (its newest whole checkpoint is read), a checkpoint, a folder that to=checkpoint wrote, or a
    BitNet model of Hugging Face."""
    to: Target | None = None
    """Format to write: bitmoe for inference with everything a model has, hf and gguf for transformers and llama.cpp
    where they compute the same function, checkpoint to go on training with run.init_from."""
    out: str | None = None
    """Folder to write, which must not exist yet; it appears whole or not at all."""
    packing: Packing = Packing["2bit"]
    """to=bitmoe: bits of a ternary code on disk; 1.6bit is unpacked to 2bit when the model is loaded."""
    hf_weights: HfWeights = HfWeights.packed
    """to=hf: packed codes, online master weights, or for vLLM compressed-tensors (which has no sub-norms)."""
    gguf_type: GgufType = GgufType.tq2_0
    """to=gguf: tq2_0 takes 2.06 bits a weight and is faster, tq1_0 takes 1.69; i2_s takes 2 and is for bitnet.cpp on
    x86, whose models have ReLU2 and sub-norms."""
    as_int8: bool = False
    """to=hf and to=gguf: accept that the runtime computes all inputs in INT8, whatever the model was trained with."""
    precision: Precision = Precision.bf16
    """Of a model from Hugging Face: dtype of the weights that are read."""
    check_tokens: int = 512
    """Tokens of held-out text on which the result is compared with the training forward."""


def validate_conversion(config: ConvertConfig) -> None:
    """Refuse a conversion that cannot begin.

    Raises:
        InputError: a key without a value, a source that is not there, or a result that is.
    """
    fixes = {
        "source": "source=RUN, a checkpoint, or a model's folder",
        "to": f"to={'|'.join(target.name for target in Target)}",
        "out": "out=FOLDER",
    }
    for key, fix in fixes.items():
        if getattr(config, key) in (None, ""):
            raise InputError("it has no value", fix=fix, key=key)
    if not Path(config.source).is_dir():
        raise InputError(f"{config.source} is no folder", fix=fixes["source"], key="source")
    if Path(config.out).exists():
        raise InputError(f"{config.out} exists already", fix="choose another folder, or remove it", key="out")
    if config.check_tokens < 2:
        raise InputError(f"{config.check_tokens} is too few to compare", fix="at least 2", key="check_tokens")

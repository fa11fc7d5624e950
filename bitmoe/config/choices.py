"""The values that keys of the schema choose from, and what each choice means."""

from enum import Enum


class Activation(Enum):
    """FFN activation: ReLU2-GLU (BitNet a4.8, eq. 5) or SwiGLU (BitNet b1.58)."""

    relu2_glu = "relu2_glu"
    swiglu = "swiglu"


class ActFormat(Enum):
    """Number format of a linear's input. ``none`` leaves it in the model's precision."""

    none = "none"
    int8 = "int8"
    int4 = "int4"
    fp4 = "fp4"


class WeightFormat(Enum):
    """Number format of the transformer linears' weights. ``none`` is the bf16 baseline."""

    ternary = "ternary"
    none = "none"


BackwardFormat = Enum("BackwardFormat", {"bf16": "bf16", "8bit": "8bit"}, module=__name__)
"""What the products of a ternary linear's backward multiply."""


class Precision(Enum):
    """Compute and communication dtype; master weights and optimizer state are fp32 in both."""

    bf16 = "bf16"
    fp32 = "fp32"


class Resume(Enum):
    """auto: continue if the run has a checkpoint; never: refuse a run directory in use; must: refuse without one."""

    auto = "auto"
    never = "never"
    must = "must"


class Recompute(Enum):
    """Activation recomputation: nothing, the attention core, gate and up of the FFN, or whole layers."""

    none = "none"
    selective = "selective"
    ffn = "ffn"
    full = "full"


class Wire(Enum):
    """How codes travel between ranks: in as few bytes as hold them, or as wide as bf16."""

    codes = "codes"
    bf16 = "bf16"


class Score(Enum):
    """How router logits become routing probabilities."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class Balancing(Enum):
    """Load balancing loss of the router: per micro-batch, per sequence, over the global batch, or none."""

    none = "none"
    aux_loss = "aux_loss"
    seq_aux_loss = "seq_aux_loss"
    global_aux_loss = "global_aux_loss"


class Schedule(Enum):
    """Learning-rate curve after warm-up. ``two_stage`` is BitNet b1.58's: linear, with a drop at ``switch``."""

    two_stage = "two_stage"
    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class Source(Enum):
    """Where text comes from: the interpreter's standard library, local files, or a Hugging Face dataset name."""

    stdlib = "stdlib"
    files = "files"
    hub = "hub"


class TokenizerKind(Enum):
    """byte: 256 bytes and three specials; file: a Hugging Face tokenizer.json; bpe: trained on the given text."""

    byte = "byte"
    file = "file"
    bpe = "bpe"

"""The schema of every Hydra group: types, defaults and the text that documents each key.

YAML files under ``conf/`` hold only differences from these defaults. The string literal under a field is its
documentation (``bitmoe <command> --help`` and the README's table are made from it). Checks that need more
than one field live in ``validate.py``.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from bitmoe.config.choices import (
    ActFormat,
    Activation,
    BackwardFormat,
    Balancing,
    Precision,
    Recompute,
    Resume,
    Schedule,
    Score,
    Source,
    TokenizerKind,
    WeightFormat,
    Wire,
)


@dataclass
class ModelConfig:
    """Shape of the transformer."""

    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int = 512
    """Inner width of a dense FFN (each of gate and up)."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); null means as many as query heads."""
    head_dim: int | None = None
    """Width of a head; null means hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """Rows of the embedding; null means the tokenizer's size. Padded up to a multiple of vocab_multiple."""
    vocab_multiple: int = 64
    """The embedding is padded to a multiple of this; fixed, so that it does not depend on the layout."""
    activation: Activation = Activation.relu2_glu
    """FFN activation."""
    sub_norm: bool = True
    """RMSNorm in front of the o and down projections (BitNet's SubLN)."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    tie_embeddings: bool = False
    """Share the embedding with the output head."""
    init_std: float = 0.02
    """Standard deviation of initial weights; o and down are divided by sqrt(2 * num_layers)."""


@dataclass
class BitStage:
    """Activation formats by linear role from one point of the run on."""

    start: float = 0.0
    """When the stage begins: below 1 a fraction of run.steps, from 1 on a step number."""
    qkv: ActFormat = ActFormat.int8
    """Input of the q, k and v projections."""
    o: ActFormat = ActFormat.int8
    """Input of the attention output projection."""
    o_keep: float = 1.0
    """Share of the o input kept by top-K (per token and group); 1 keeps all, the paper's second stage 0.5."""
    gate_up: ActFormat = ActFormat.int8
    """Input of the gate and up projections, of dense FFNs and of experts."""
    down: ActFormat = ActFormat.int8
    """Input of the down projection."""


@dataclass
class QuantConfig:
    """What is quantized, how finely, and when."""

    weights: WeightFormat = WeightFormat.ternary
    """Format of the transformer linears' weights; embedding, head, norms and router are never quantized."""
    groups: int = 1
    """Quantization groups G along the tensor-parallel dimension of every linear; TP and ETP must divide it or
    it is 1."""
    backward: BackwardFormat = BackwardFormat.bf16
    """Backward products of ternary linears: bf16 (fp32 with run.precision=fp32) multiplies the gradient as it is; 8bit
    rounds it to 8 bits, but not for the weight gradient where inputs have 8 bits and groups. Codes of weights and
    activations stay exact in both."""
    stages: list[BitStage] = field(default_factory=lambda: [BitStage()])
    """The bit schedule, in order of start."""


@dataclass
class MoEConfig:
    """Mixture of experts; num_experts=0 is a dense model."""

    num_experts: int = 0
    """Routed experts per layer; 0 means dense."""
    router_topk: int = 2
    """Experts each token is sent to."""
    ffn_hidden_size: int = 512
    """Inner width of a routed expert."""
    shared_expert_size: int = 0
    """Inner width of the shared expert every token passes through; 0 means none."""
    score: Score = Score.softmax
    """How router logits become probabilities."""
    balancing: Balancing = Balancing.aux_loss
    """Load balancing loss."""
    aux_loss_coeff: float = 0.01
    """Weight of the load balancing loss."""
    z_loss_coeff: float = 0.0
    """Weight of the router z-loss; 0 means none."""
    expert_bias: bool = False
    """Aux-loss-free balancing by a bias on the scores (needs score=sigmoid)."""
    expert_bias_rate: float = 0.001
    """Step of that bias."""
    capacity_factor: float | None = None
    """Token capacity of an expert as a multiple of the even share; null is dropless. Depends on the layout."""
    scaling_factor: float | None = None
    """Constant that multiplies the routing probabilities; null means 1."""


@dataclass
class ContextConfig:
    """Sequence length and what long sequences need."""

    seq_length: int = 256
    """Tokens of a training sequence."""
    kv_bits: int = 16
    """Bits at which a converted model keeps cached keys and values: 16, 4 or 3. Training has no cache."""


@dataclass
class ParallelConfig:
    """How the model is laid out over ranks. Data parallelism is what is left of the world size."""

    tensor: int = 1
    """Tensor parallel size of attention and dense FFN (Megatron: --tensor-model-parallel-size)."""
    pipeline: int = 1
    """Pipeline stages (--pipeline-model-parallel-size)."""
    virtual_pipeline: int | None = None
    """Model chunks per pipeline stage (interleaved 1F1B); null means one."""
    expert: int = 1
    """Expert parallel size (--expert-model-parallel-size)."""
    expert_tensor: int = 1
    """Tensor parallel size inside routed experts (--expert-tensor-parallel-size)."""
    sequence: bool = False
    """Sequence parallelism over the tensor group (--sequence-parallel); MoE with tensor > 1 needs it."""
    wire: Wire = Wire.codes
    """How inputs of qkv, gate and up travel in the sequence-parallel all-gather and to other ranks' experts. codes: two
    a byte of 4-bit formats, one of int8; bf16: each widened to a bf16 number, the bytes other frameworks send. Every
    token has its fp32 scale beside it, and both give the same bits. Outputs, gradients, and all that is not quantized
    (quant=none) travel in run.precision, as in Megatron, whatever stands here."""

    @property
    def attention_ranks(self) -> int:
        """Ranks that hold one copy of attention, dense FFN, embedding and head."""
        return self.tensor * self.pipeline

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of all routed experts."""
        return self.expert_tensor * self.expert * self.pipeline

    @property
    def smallest_world_size(self) -> int:
        """The world size that holds whole copies of both; every legal world size is a multiple of it."""
        return math.lcm(self.attention_ranks, self.expert_ranks)


@dataclass
class DataConfig:
    """Training text."""

    source: Source = Source.stdlib
    """Where text comes from."""
    path: list[str] = field(default_factory=list)
    """Text, JSON-lines or Parquet files (or folders of them), or token files by their common prefix (x for
    x.bin, x.idx)."""
    weights: list[float] = field(default_factory=list)
    """Blend weight of each path; empty means by size."""
    name: str | None = None
    """Dataset on the Hugging Face hub, owner/name or owner/name:configuration, for source=hub."""
    text_key: str = "text"
    """Column that holds the text in JSON lines, Parquet and hub datasets."""
    eval_fraction: float = 0.02
    """Share of documents held out for evaluation."""
    max_bytes: int | None = None
    """Read at most this many bytes of each text source; null means all. Token files are used whole."""
    cache: str = "data/cache"
    """Where tokenized text is kept."""


@dataclass
class TokenizerConfig:
    """Text to token ids."""

    kind: TokenizerKind = TokenizerKind.byte
    """Which tokenizer."""
    path: str | None = None
    """The tokenizer.json for kind=file."""
    eod_token: str | None = None
    """Token that ends a document in a tokenizer.json; null tries the usual names (<|endoftext|>, </s>, ...)."""
    vocab_size: int = 8192
    """Size of the vocabulary trained by kind=bpe."""


@dataclass
class OptimConfig:
    """Adam and its schedules; defaults are the paper's (Table 7) but for the learning rate."""

    lr: float = 1.5e-3
    """Peak learning rate of the first stage."""
    lr_second: float | None = 1.0e-3
    """Peak the curve is drawn from after the switch (schedule=two_stage); null means lr."""
    lr_end: float = 3e-5
    """Learning rate at the last step."""
    warmup_steps: int = 375
    """Steps of linear warm-up."""
    schedule: Schedule = Schedule.two_stage
    """Learning-rate curve."""
    switch: float = 0.5
    """Where the second stage of learning rate and weight decay begins, as a fraction of run.steps."""
    weight_decay: float = 0.1
    """Weight decay on matrices until the switch."""
    weight_decay_second: float = 0.0
    """Weight decay after the switch."""
    beta1: float = 0.9
    """Adam's first decay rate."""
    beta2: float = 0.95
    """Adam's second decay rate."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0 means no clipping."""


@dataclass
class EngineConfig:
    """The training engine: megatron-core's DDP with the distributed optimizer."""

    name: str = "megatron"
    """Which engine."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs overlap_grad_reduce."""
    cuda_graph: bool = True
    """Record micro-batches as CUDA graphs where their kernels never change: only tensor and data parallelism cut the
    model, experts multiply in bf16, nothing is overlapped, and at most gate and up are recomputed; else kernels are
    launched one by one."""


@dataclass
class RunConfig:
    """One run: its name, its length, what it writes."""

    name: str = "default"
    """Name of the run; its directory is <dir>/<name>."""
    dir: str = "runs"
    """Folder of all runs."""
    steps: int = 1000
    """Optimizer steps."""
    micro_batch_size: int = 4
    """Sequences of one forward pass of one data-parallel rank."""
    global_batch_size: int = 8
    """Sequences of one optimizer step over all ranks."""
    seed: int = 1234
    """Seed of initial weights and data order."""
    precision: Precision = Precision.bf16
    """Compute dtype."""
    deterministic: bool = False
    """Fixed summation trees in the forward pass: equal weights give bit-equal losses at any power-of-two TP; slower."""
    resume: Resume = Resume.auto
    """What to do with a run directory that exists."""
    init_from: str | None = None
    """Weights a new run starts from: a run, a checkpoint, or a folder that convert to=checkpoint wrote; null means
    random values. A dense model can become a mixture of experts. A run continued from its own checkpoint does not
    look at it."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always saves. 0 means only the last."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    eval_every: int = 250
    """Steps between evaluations on held-out text; 0 means only at the end."""
    eval_batches: int = 8
    """Global batches of one evaluation."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    recompute: Recompute = Recompute.none
    """What the backward pass computes again instead of keeping it: nothing, the attention core (selective), gate and up
    (ffn, where weights are ternary), or whole layers (full)."""
    nproc: int | None = None
    """Local ranks to start; null means as many as the layout needs."""
    sample: str | None = "def "
    """Prompt continued at the end of the run; null means no sample."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.dir) / self.name


@dataclass
class Config:
    """Everything a command needs: one field per Hydra group."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)

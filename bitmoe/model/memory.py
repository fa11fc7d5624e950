"""Memory of one rank, by component, and the bytes of what is written to disk: arithmetic without torch.

Weights lie in the dtype of run.precision, gradients in fp32; Adam's two moments, and in bf16 runs the fp32 copy of
the weights, are divided over data-parallel ranks. Left out: the padding of megatron-core's buffers (at most 127
elements a parameter), the allocator's fragmentation, buffers of NCCL, and uneven routing.
"""

from dataclasses import dataclass, fields

from bitmoe.config.choices import BackwardFormat, Precision, Recompute
from bitmoe.config.schema import Config
from bitmoe.model.activations import FP32, Activations
from bitmoe.model.counts import Cut, Weight, embedding, final_norm, head, is_ternary, layer_weights, model_weights
from bitmoe.parallel.topology import Topology

BF16 = 2
_MOMENTS = 2
_ROW_MULTIPLE = 16


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at the peak of a training step."""

    weights: int
    """Parameters."""
    gradients: int
    """The fp32 buffer that gradients are summed in."""
    optimizer: int
    """This rank's share of Adam's moments and of the fp32 copy of bf16 weights."""
    ternary_codes: int
    """Codes of the quantized weights, with their scales."""
    activations: int
    """What forward passes keep for backward passes, of all micro-batches in flight."""
    logits: int
    """Logits and cross-entropy (last stage)."""
    temporaries: int
    """What a product needs while it runs, where that is more than the logits: never there together."""

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(config: Config, world_size: int, stage: int) -> RankMemory:
    """Memory of a rank of one pipeline stage; all ranks of a stage need the same.

    Args:
        config: without ``problems`` on ``world_size`` ranks; model.vocab_size known.
        world_size: all ranks.
        stage: pipeline stage, from 0.
    """
    weights = stage_weights(config, stage)
    numel = sum(rank_numel(weight, config) for weight in weights)
    activations = Activations(config)
    logits = activations.logits() if _is_last(config, stage) else 0
    return RankMemory(
        weights=activations.element * numel,
        gradients=FP32 * numel,
        optimizer=_optimizer_bytes(config, world_size, weights),
        ternary_codes=sum(_code_bytes(weight, config) for weight in weights if is_ternary(weight, config)),
        activations=_activation_bytes(config, world_size, stage),
        logits=logits,
        temporaries=max(0, activations.temporaries() - logits),
    )


def stage_weights(config: Config, stage: int) -> list[Weight]:
    """The weights that a pipeline stage holds, before they are cut over its ranks.

    A tied model of several stages holds the embedding twice.
    """
    count = config.model.num_layers // config.parallel.pipeline
    weights = [Weight(w.component, (count, *w.shape), w.cut, w.role) for w in layer_weights(config)]
    if stage == 0:
        weights.append(embedding(config))
    if _is_last(config, stage):
        weights.append(final_norm(config))
        if stage > 0 or not config.model.tie_embeddings:
            weights.append(head(config))
    return weights


def rank_numel(weight: Weight, config: Config) -> int:
    """Elements of a stage's weight that one of its ranks holds."""
    return weight.numel // _num_parts(weight, config)


def micro_batches(config: Config, world_size: int) -> int:
    """Micro-batches of one optimizer step on each data-parallel rank."""
    data = Topology(config.parallel, world_size).data_parallel
    return config.run.global_batch_size // (config.run.micro_batch_size * data)


def layers_in_flight(config: Config, world_size: int, stage: int) -> int:
    """Layers of a stage, counted once a micro-batch, whose activations are kept at the same time.

    1F1B runs a stage ahead by the number of stages behind it; with interleaved chunks by twice that and by one round
    of micro-batches for every chunk but the last.
    """
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    behind = stages - 1 - stage
    ahead = behind if chunks == 1 else 2 * behind + (chunks - 1) * stages
    in_flight = min(ahead + 1, micro_batches(config, world_size) * chunks)
    return in_flight * config.model.num_layers // (stages * chunks)


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint: weights, and for each an fp32 copy and two moments."""
    numel = sum(weight.numel for weight in model_weights(config))
    return numel * (Activations(config).element + FP32 * (1 + _MOMENTS))


def packed_bytes(config: Config, codes_per_byte: int) -> int:
    """Bytes of the model packed for inference: ternary codes in uint8, the rest in bf16.

    Args:
        config: its model and quantization.
        codes_per_byte: 4 at 2 bits a code, 5 at 1.6.
    """
    weights = model_weights(config)
    codes = sum(weight.numel for weight in weights if is_ternary(weight, config))
    rest = sum(weight.numel for weight in weights) - codes
    return -(-codes // codes_per_byte) + BF16 * rest


def _is_last(config: Config, stage: int) -> bool:
    return stage == config.parallel.pipeline - 1


def _num_parts(weight: Weight, config: Config) -> int:
    parallel = config.parallel
    parts = {Cut.nothing: 1, Cut.tensor: parallel.tensor, Cut.expert: parallel.expert * parallel.expert_tensor}
    return parts[weight.cut]


def _optimizer_bytes(config: Config, world_size: int, weights: list[Weight]) -> int:
    topology = Topology(config.parallel, world_size)
    copies = _MOMENTS + (1 if config.run.precision is Precision.bf16 else 0)
    ranks = {True: topology.expert_data_parallel, False: topology.data_parallel}
    return FP32 * copies * sum(rank_numel(weight, config) // ranks[weight.cut is Cut.expert] for weight in weights)


def _code_bytes(weight: Weight, config: Config) -> int:
    """Codes of one byte; a scale for every output row (qkv, gate_up) or for every matrix and group (o, down).

    The 8-bit backward has the codes once more, transposed, with output rows padded to a multiple of 16.
    """
    *_, rows, columns = weight.shape
    ranks = config.parallel.expert_tensor if weight.cut is Cut.expert else config.parallel.tensor
    if weight.role in ("qkv", "gate_up"):
        rows //= ranks
        scales = rows
    else:
        columns //= ranks
        scales = max(1, config.quant.groups // ranks)
    matrices = rank_numel(weight, config) // (rows * columns)
    has_columns = config.quant.backward is BackwardFormat["8bit"]
    padded_rows = -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE if has_columns else 0
    return matrices * ((rows + padded_rows) * columns + FP32 * scales)


def _activation_bytes(config: Config, world_size: int, stage: int) -> int:
    activations, in_flight = Activations(config), layers_in_flight(config, world_size, stage)
    layer, hidden = activations.saved_by_layer(), activations.hidden_bytes
    # Whole layers recomputed: their inputs, and one layer at a time in full.
    saved = in_flight * hidden + layer if config.run.recompute is Recompute.full else in_flight * layer
    if config.parallel.pipeline > 1:
        chunks = in_flight * config.parallel.pipeline * (config.parallel.virtual_pipeline or 1)
        # The schedule keeps what each chunk sends on; what it received, its first norm keeps too.
        saved += chunks // config.model.num_layers * hidden
    return saved + (activations.saved_by_head() if _is_last(config, stage) else 0)

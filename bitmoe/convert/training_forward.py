"""The training forward of a whole model in the memory of one layer: what every export is compared with.

The real layers of ``bitmoe.layers`` compute, in fp32 on one rank. One layer is built, and takes the weights of each
layer in turn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from bitmoe.config.choices import Balancing, Precision, Recompute
from bitmoe.config.schema import BitStage, Config, ParallelConfig
from bitmoe.convert.codes import is_row_parallel
from bitmoe.model.export_names import Slot, slots, split
from bitmoe.model.gpt import build_language_model
from bitmoe.parallel.process_groups import Groups, local_device
from bitmoe.quant.policy import QuantPolicy
from bitmoe.quant.ternary_codes import CodeCache
from bitmoe.train.weight_source import WeightSource

# Shapes: B = sequences, S = positions, V = vocabulary, H = hidden, O = output rows, I = input columns, G = groups,
#         "..." = experts where they are stacked.


@dataclass(frozen=True)
class TernaryMatrix:
    """What the training forward multiplies in the place of an exported matrix."""

    name: str
    codes: torch.Tensor
    """int8 [..., O, I]."""
    scale: torch.Tensor
    """fp32 [..., G]."""


class TrainingForward:
    """Runs tokens through a model, layer by layer.

    Args:
        source: the model.
        groups: of a single rank.
        stage: formats of inputs; None means those of the last bit stage.
    """

    def __init__(self, source: WeightSource, groups: Groups, stage: BitStage | None = None):
        self._source, self._slots = source, slots(source.config)
        config = _one_layer(source.config)
        self._policy = QuantPolicy(config.quant)
        self._policy.stage = stage or config.quant.stages[-1]
        self._model = build_language_model(config, groups, self._policy, dtype=torch.float32).eval()
        state = self._model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
        self._tensors = {shard.key: shard.data for shard in state.values() if isinstance(shard, ShardedTensor)}

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor, inspect: Callable[[TernaryMatrix], None]) -> torch.Tensor:
        """Next-token logits fp32 [B, S, V], without padding of the vocabulary.

        Args:
            tokens_BS: token ids.
            inspect: called with every ternary matrix as it is multiplied.
        """
        model, tokens_BS = self._model, tokens_BS.to(local_device())
        self._load(None)
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        x_SBH = model.embedding(input_ids=tokens_BS, position_ids=positions_BS)
        rotary = model.rotary_pos_emb(tokens_BS.shape[1])
        for layer in range(self._source.config.model.num_layers):
            present = self._load(layer)
            for matrix in self._ternary_matrices(present):
                inspect(matrix)
            x_SBH, _ = model.decoder.layers[0](x_SBH, rotary)
        head_VH = model.shared_embedding_or_output_weight() if self._source.config.model.tie_embeddings else None
        logits_SBV, _ = model.output_layer(model.decoder.final_layernorm(x_SBH), weight=head_VH)
        return logits_SBV.transpose(0, 1)[..., : self._source.config.model.vocab_size]

    def _load(self, layer: int | None) -> dict[str, Slot]:
        """Give the model the tensors of one layer, or those outside layers; returns their places by key."""
        present = {slot.key: slot for slot in self._slots if slot.layer == layer}
        for key, slot in present.items():
            self._tensors[key].copy_(self._source.read_slot(slot))
        self._policy.parameters_changed()
        return present

    def _ternary_matrices(self, present: dict[str, Slot]) -> Iterator[TernaryMatrix]:
        """Codes and scales of the layer's caches, under the names of exported matrices."""
        key_of = {id(tensor): key for key, tensor in self._tensors.items()}
        for module in self._model.decoder.modules():
            caches = [name for name, value in vars(module).items() if isinstance(value, CodeCache)]
            for cache in caches if self._policy.is_ternary else []:
                weight = getattr(module, cache.replace("cache", "weight"))
                codes, scale = getattr(module, cache).get()
                yield from self._exported(present[key_of[id(weight)]], codes.view_as(weight), scale)

    def _exported(self, slot: Slot, codes: torch.Tensor, scale: torch.Tensor) -> Iterator[TernaryMatrix]:
        config, groups = self._source.config, self._policy.groups
        if is_row_parallel(slot.names[0]):
            yield TernaryMatrix(slot.names[0], codes, scale)
            return
        # One scale a row, in the order of the fused rows.
        scales = split(slot, scale.reshape(*codes.shape[:-1], 1), config)
        for name, part in split(slot, codes, config).items():
            yield TernaryMatrix(name, part, scales[name].unflatten(-2, (groups, -1))[..., 0, 0])


def _one_layer(config: Config) -> Config:
    """The same model with a single layer, on one rank, without what only training has."""
    return replace(
        config,
        model=replace(config.model, num_layers=1),
        moe=replace(config.moe, balancing=Balancing.none, capacity_factor=None),
        parallel=ParallelConfig(),
        run=replace(config.run, precision=Precision.fp32, recompute=Recompute.none, deterministic=False),
    )

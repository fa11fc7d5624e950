"""The language model: megatron-core's GPTModel over our layers, with a loss that can be made layout-independent."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from bitmoe.config.schema import Config
from bitmoe.layers.context import LayerContext
from bitmoe.layers.norm import RMSNorm
from bitmoe.layers.sharding import mark_tensor_parallel
from bitmoe.layers.transformer_layer import TransformerLayer
from bitmoe.model.sizes import padded_vocab_size
from bitmoe.model.transformer_config import make_transformer_config
from bitmoe.parallel.process_groups import Groups, local_device
from bitmoe.quant.policy import QuantPolicy
from bitmoe_kernels.cross_entropy import vocab_parallel_cross_entropy

# Shapes: S = sequence, B = batch, V = vocabulary (padded).


class LanguageModel(GPTModel):
    """GPTModel with the quantization policy of its layers and a cross-entropy in the dtype it is given.

    Build it with ``build_language_model``.
    """

    policy: QuantPolicy

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats of each token.

        Deterministic runs gather the vocabulary and sum in fp64, so the loss does not depend on how it is split.

        Args:
            labels: token ids [B, S].
            logits: [S, B, V / tensor-parallel size].

        Returns:
            [B, S]: fp32, or the dtype of fp64 logits.
        """
        if logits.dtype != torch.float64 and not self.policy.deterministic:
            # Nothing else reads the logits, so their gradient may take their place.
            loss_SB = vocab_parallel_cross_entropy(
                logits, labels.T.contiguous(), self.pg_collection.tp, inplace_backward=logits.requires_grad
            )
            return loss_SB.T.contiguous()
        full = gather_from_tensor_model_parallel_region(logits).double()
        loss_SB = torch.nn.functional.cross_entropy(full.flatten(0, 1), labels.T.flatten(), reduction="none")
        loss_BS = loss_SB.view(labels.T.shape).T.contiguous()
        return loss_BS if logits.dtype == torch.float64 else loss_BS.float()


def build_language_model(
    config: Config,
    groups: Groups,
    policy: QuantPolicy,
    *,
    vp_stage: int | None = None,
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """Build this rank's part of the model; parameters are uninitialized.

    Args:
        config: validated, with a known model.vocab_size.
        groups: process groups of the layout.
        policy: shared by all layers (and all chunks of a virtual pipeline).
        vp_stage: which chunk of a virtual pipeline; None without one.
        dtype: parameters' dtype if not that of run.precision.
    """
    transformer_config = make_transformer_config(config, dtype)
    context = LayerContext(
        model=config.model,
        moe=config.moe,
        policy=policy,
        groups=groups,
        sequence_parallel=config.parallel.sequence,
        recompute=config.run.recompute,
        dtype=transformer_config.params_dtype,
        device=local_device(),
        wire=config.parallel.wire,
    )
    first, last = _is_first_and_last(config, groups, vp_stage)
    num_layers = get_num_layers_to_build(transformer_config, vp_stage, groups.pp.rank())
    layer = ModuleSpec(module=TransformerLayer, params={"context": context})
    model = LanguageModel(
        config=transformer_config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm),
        vocab_size=padded_vocab_size(config.model),
        max_sequence_length=config.context.seq_length,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        pg_collection=groups.mcore,
        vp_stage=vp_stage,
    )
    model.policy = policy
    _mark_vocabulary_parallel(model)
    return model.to(device=context.device)


def _mark_vocabulary_parallel(model: LanguageModel) -> None:
    """megatron-core marks these weights only where it initializes them; unmarked, the gradient norm misses parts."""
    if model.pre_process:
        mark_tensor_parallel(model.embedding.word_embeddings.weight, dim=0)
    if model.post_process and model.output_layer.weight is not None:
        mark_tensor_parallel(model.output_layer.weight, dim=0)


def _is_first_and_last(config: Config, groups: Groups, vp_stage: int | None) -> tuple[bool, bool]:
    """Whether this chunk holds the embedding, and whether it holds the head."""
    rank, size = groups.pp.rank(), groups.pp.size()
    last_chunk = (config.parallel.virtual_pipeline or 1) - 1
    chunk = vp_stage or 0
    return rank == 0 and chunk == 0, rank == size - 1 and chunk == last_chunk

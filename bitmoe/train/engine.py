"""The megatron engine: model chunks, gradients, optimizer, and one training step over a pipeline schedule.

megatron-core supplies DDP, the distributed optimizer and the 1F1B schedules; this puts a bitmoe model into them and
keeps the two promises its quantizers need: codes are made again after every change of parameters, and the bit stage
is the same on every rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from bitmoe.config.schema import Config
from bitmoe.layers.moe import MoELayer
from bitmoe.layers.router_statistics import summarize
from bitmoe.model.gpt import build_language_model
from bitmoe.model.initialize import initialize
from bitmoe.model.sizes import padded_vocab_size
from bitmoe.model.transformer_config import model_dtype
from bitmoe.parallel.process_groups import Groups, local_device
from bitmoe.quant.bit_schedule import stage_at
from bitmoe.quant.policy import QuantPolicy
from bitmoe.train.micro_batch_graphs import MicroBatchGraphs, graphs_hold
from bitmoe.train.optimizer_step import optimizer_step, use_fused_adam
from bitmoe.train.schedule import learning_rate, weight_decay

# Shapes: B = sequences of a micro-batch, S = sequence length.

Batch = dict[str, torch.Tensor]
"""``tokens`` and ``labels``, int64 [B, S]."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean cross-entropy in nats per token over the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of the step."""
    weight_decay: float
    """Weight decay of the step."""
    stage: int
    """Index into quant.stages."""


class MegatronEngine:
    """This rank's part of a training run.

    Args:
        config: validated, with a known model.vocab_size.
        groups: process groups of the layout.
    """

    def __init__(self, config: Config, groups: Groups):
        self.config, self.groups, self._stage = config, groups, 0
        self.policy = QuantPolicy(config.quant, config.run.deterministic)
        stages = config.parallel.virtual_pipeline or 1
        chunks = [
            build_language_model(config, groups, self.policy, vp_stage=stage if stages > 1 else None)
            for stage in range(stages)
        ]
        initialize(_sharded_state(chunks), config.model, config.run.seed)
        self.transformer_config = chunks[0].config
        self.chunks = [self._wrap(chunk, index) for index, chunk in enumerate(chunks)]
        self.optimizer = get_megatron_optimizer(self._optimizer_config(), self.chunks, config_overrides=_NO_DECAY)
        if torch.cuda.is_available():
            use_fused_adam(self.optimizer)
        self._connect_schedule()
        self._forward_backward = get_forward_backward_func()
        self._graphs = MicroBatchGraphs(self.policy, self._micro_batch) if graphs_hold(config) else None

    def _wrap(self, chunk: torch.nn.Module, index: int) -> DistributedDataParallel:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.config.engine.overlap_grad_reduce,
            overlap_param_gather=self.config.engine.overlap_param_gather,
            use_distributed_optimizer=True,
        )
        # Autograd adds up gradients on the stream their nodes were made on: the default one cannot be recorded.
        with _side_stream():
            return DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)

    def _optimizer_config(self) -> OptimizerConfig:
        optim, dtype = self.config.optim, model_dtype(self.config)
        return OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=self.config.engine.overlap_param_gather,
        )

    def _connect_schedule(self) -> None:
        """Tell megatron-core's schedules how to finish and synchronize gradients."""
        settings, engine, chunks = self.transformer_config, self.config.engine, self.chunks
        settings.finalize_model_grads_func = finalize_model_grads
        if engine.overlap_grad_reduce:
            settings.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        if engine.overlap_param_gather:
            settings.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])

    def close(self) -> None:
        """Let go of what would keep process groups from ending."""
        if self._graphs is not None:
            self._graphs.clear()

    @property
    def models(self) -> list[torch.nn.Module]:
        """The language model chunks inside their DDP wrappers."""
        return [chunk.module for chunk in self.chunks]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step on each data-parallel rank."""
        run = self.config.run
        return run.global_batch_size // (run.micro_batch_size * self.groups.dp.size())

    def rows(self) -> list[range]:
        """Which sequences of a global batch this rank's micro-batches are.

        Micro-batches are dealt out in turn, so the same sequences form a micro-batch whatever the number of
        data-parallel ranks.
        """
        size, ranks, rank = self.config.run.micro_batch_size, self.groups.dp.size(), self.groups.dp.rank()
        firsts = [(index * ranks + rank) * size for index in range(self.num_micro_batches)]
        return [range(first, first + size) for first in firsts]

    def train_step(self, step: int, get_batch: Callable[[range], Batch]) -> StepResult:
        """Run optimizer step ``step`` (counted from 1).

        Args:
            step: which step; sets learning rate, weight decay and bit stage.
            get_batch: the micro-batch made of the given rows of this step's global batch.
        """
        config = self.config
        stage = self.set_stage(step)
        lr = learning_rate(step, config.optim, config.run.steps)
        decay = weight_decay(step, config.optim, config.run.steps)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay * group["wd_mult"]
        loss = self._add_up_gradients(get_batch)
        grad_norm = optimizer_step(self.optimizer, config.optim.clip_grad)
        self.policy.parameters_changed()
        # Read when all is launched: the GPU would wait for the launches of the optimizer.
        return StepResult(loss.item(), grad_norm.item(), lr, decay, stage)

    def set_stage(self, step: int) -> int:
        """Put the layers into the bit stage of ``step``; returns its index."""
        self._stage, self.policy.stage = stage_at(step, self.config.quant, self.config.run.steps)
        return self._stage

    def compute_gradients(self, get_batch: Callable[[range], Batch], whole: bool = False) -> float:
        """Forward and backward over this rank's micro-batches.

        Args:
            get_batch: the micro-batch made of the given rows of the global batch.
            whole: leave every rank with all reduced gradients of its parameters (``main_grad``), to look at them; the
                optimizer needs only its own shard of them.

        Returns:
            The loss of the global batch.
        """
        return self._add_up_gradients(get_batch, whole).item()

    def _add_up_gradients(self, get_batch: Callable[[range], Batch], whole: bool = False) -> torch.Tensor:
        """``compute_gradients``, with the loss on its device."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._graphs is not None and not whole:
            return self._run_graphs(get_batch)
        return self._run_schedule(get_batch, forward_only=False, force_all_reduce=whole)

    def _run_graphs(self, get_batch: Callable[[range], Batch]) -> torch.Tensor:
        losses = [self._graphs(_to_device(get_batch(rows)), self._stage) for rows in self.rows()]
        finalize_model_grads(self.chunks, pg_collection=self.groups.mcore)
        return self._global_mean(losses)

    def _micro_batch(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of one of the step's micro-batches by megatron-core's schedule; returns its loss."""
        settings, count = self.transformer_config, self.num_micro_batches
        settings.finalize_model_grads_func = None
        settings.grad_scale_func = lambda loss: loss / count
        try:
            (output,) = self._schedule([batch])
        finally:
            settings.finalize_model_grads_func, settings.grad_scale_func = finalize_model_grads, None
        return output["loss"]

    @torch.no_grad()
    def evaluate(self, get_batch: Callable[[range], Batch]) -> float:
        """Mean cross-entropy in nats per token of one global batch, without gradients."""
        for chunk in self.chunks:
            chunk.eval()
        return self._run_schedule(get_batch, forward_only=True).item()

    def _run_schedule(
        self, get_batch: Callable[[range], Batch], forward_only: bool, force_all_reduce: bool = False
    ) -> torch.Tensor:
        batches = [_to_device(get_batch(rows)) for rows in self.rows()]
        outputs = self._schedule(batches, forward_only=forward_only, force_all_reduce=force_all_reduce)
        return self._global_mean([output["loss"] for output in outputs])

    def _schedule(self, batches: list[Batch], **options: bool) -> list[dict[str, torch.Tensor]]:
        """Run micro-batches by megatron-core's schedule; the loss of each, on last pipeline stages."""
        iterators = [iter(batches) for _ in self.chunks]
        return self._forward_backward(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.config.context.seq_length,
            micro_batch_size=self.config.run.micro_batch_size,
            **({"forward_only": False} | options),
        )

    def _global_mean(self, losses: list[torch.Tensor]) -> torch.Tensor:
        """Mean over all micro-batches, fp64; only last pipeline stages have losses, equal on tensor-parallel ranks."""
        total = torch.zeros(2, dtype=torch.float64, device=local_device())
        for loss in losses:
            total += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
        dist.all_reduce(total)
        return total[0] / total[1]

    def record_statistics(self, recording: bool) -> None:
        """Switch the counting of codes and routing on or off."""
        self.policy.statistics.recording = recording

    def collect_statistics(self) -> dict[str, float | list[float]]:
        """Health of quantizers and routers since the last call; every rank must call it.

        Returns:
            The metrics of ``QuantStatistics.collect`` and of ``router_statistics.summarize``.
        """
        metrics = self.policy.statistics.collect(local_device())
        moe = self.config.moe
        if moe.num_experts:
            shape = (self.config.model.num_layers, moe.num_experts + 3)
            counts = torch.zeros(shape, dtype=torch.float64, device=local_device())
            for layer in (m for model in self.models for m in model.modules() if isinstance(m, MoELayer)):
                counts[layer.layer_number - 1] = layer.statistics.take()
            dist.all_reduce(counts)
            metrics |= summarize(counts, moe.router_topk)
        return metrics

    @torch.no_grad()
    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Logits of whole sequences, on every rank.

        Args:
            tokens_BS: token ids [B, S], the same on all ranks.

        Returns:
            [B, S, V] with the padded vocabulary, on every rank.
        """
        for chunk in self.chunks:
            chunk.eval()
        # An interleaved schedule needs at least as many micro-batches as there are pipeline stages.
        copies = self.groups.pp.size() if len(self.chunks) > 1 else 1
        batches = [{"tokens": tokens_BS.to(local_device())}] * copies
        iterators = [iter(batches) for _ in self.chunks]
        outputs = self._forward_backward(
            forward_step_func=_forward_logits,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=copies,
            seq_length=tokens_BS.shape[1],
            micro_batch_size=tokens_BS.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        return self._from_last_stage(outputs, tokens_BS)

    def _from_last_stage(self, outputs: list[torch.Tensor], tokens_BS: torch.Tensor) -> torch.Tensor:
        vocab = padded_vocab_size(self.config.model)
        logits = torch.empty(*tokens_BS.shape, vocab, dtype=torch.float32, device=local_device())
        if outputs:
            parts = [torch.empty_like(outputs[0]) for _ in range(self.groups.tp.size())]
            dist.all_gather(parts, outputs[0].contiguous(), group=self.groups.tp)
            logits.copy_(torch.cat(parts, dim=-1))
        pp = self.groups.pp
        dist.broadcast(logits, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
        return logits

    def gather_parameters(self) -> None:
        """Bring every rank's parameters up to date; overlapped gathers are otherwise made by the next forward."""
        if self.config.engine.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """This rank's parameters and buffers under names that are unique over all chunks."""
        return _sharded_state(self.models)


_NO_DECAY = {
    ParamKey(
        with_name_predicate=ParamWithNamePredicate(name="norm gains", fn=lambda param, name: "norm" in name)
    ): ParamGroupOverride(wd_mult=0.0)
}


@contextmanager
def _side_stream() -> Iterator[None]:
    """Run on a stream of its own, and let the current one wait for it; nothing without a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def _one_or_all(functions: list[Callable]) -> Callable | list[Callable]:
    return functions[0] if len(functions) == 1 else functions


def _to_device(batch: Batch) -> Batch:
    return {key: tensor.to(local_device(), non_blocking=True) for key, tensor in batch.items()}


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module):
    """Run one micro-batch through one chunk, as megatron-core's schedules call it."""
    batch = next(batches)
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    losses_BS = model(tokens, positions, None, labels=batch["labels"])
    return losses_BS, _mean_loss


def _forward_logits(batches: Iterator[Batch], model: torch.nn.Module):
    tokens = next(batches)["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None), lambda logits, non_loss_data: logits.float()


def _mean_loss(losses_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses_BS.mean()
    # The schedule divides the loss in place by the number of micro-batches.
    return loss, {"loss": loss.detach().clone()}


def _sharded_state(chunks: list[torch.nn.Module]) -> dict[str, ShardedTensor]:
    metadata = ensure_metadata_has_dp_cp_group(None)
    return {
        f"{index}.{name}": shard
        for index, chunk in enumerate(chunks)
        for name, shard in chunk.sharded_state_dict(metadata=metadata).items()
    }

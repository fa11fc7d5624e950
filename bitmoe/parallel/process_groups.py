"""Process groups: started here, read here, and handed to layers as arguments.

The only module that touches megatron-core's ``parallel_state``. Everything below gets a ``Groups`` or a single
process group.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection

from bitmoe.config.schema import ParallelConfig
from bitmoe.parallel import cpu_bridge


@dataclass(frozen=True)
class Groups:
    """The process groups a model's layers work with, by what is split over them."""

    tp: dist.ProcessGroup
    """Tensor parallel: attention, dense FFN, embedding."""
    pp: dist.ProcessGroup
    """Pipeline stages."""
    dp: dist.ProcessGroup
    """Data parallel replicas of non-expert parameters."""
    ep: dist.ProcessGroup
    """Expert parallel: whole experts."""
    etp: dist.ProcessGroup
    """Expert tensor parallel: slices of one expert."""
    edp: dist.ProcessGroup
    """Data parallel replicas of expert parameters."""
    mcore: ProcessGroupCollection
    """The same and more, in megatron-core's own container."""


def local_device() -> torch.device:
    """The device of this rank: its GPU where CUDA exists, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def start(timeout_minutes: float = 30.0) -> None:
    """Join the default process group: NCCL on GPUs, gloo on CPUs.

    Rank and world size come from the environment, as torchrun sets it; the meeting point is torchrun's too, or the
    file that our own launcher names.
    """
    cpu_bridge.install()
    if dist.is_initialized():
        return
    device = local_device()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=os.environ.get("BITMOE_RENDEZVOUS", "env://"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if on_gpu else None,
    )


def make_groups(parallel: ParallelConfig) -> Groups:
    """Make megatron-core's process groups for this layout, replacing those of a former one.

    Args:
        parallel: a validated layout; the world size must be a multiple of what it needs.
    """
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    parallel_state.destroy_model_parallel()
    _forget_auxiliary_losses()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    # Layers fork random generators even where nothing is drawn (there is no dropout here). Those of inference stay as
    # they are: a fork copies them between host and GPU, which a CUDA graph cannot record.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        tp=collection.tp,
        pp=collection.pp,
        dp=collection.dp_cp,
        ep=collection.ep,
        etp=collection.expt_tp,
        edp=collection.expt_dp,
        mcore=collection,
    )


def _forget_auxiliary_losses() -> None:
    """megatron-core records them per process, in tensors as long as the first model had layers."""
    try:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    except ImportError:  # before 0.19
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    else:
        destroy_moe_metrics_tracker()


def leave() -> None:
    """Wait for all ranks, then leave all process groups."""
    if dist.is_initialized():
        dist.barrier()
        leave_at_once()


def leave_at_once() -> None:
    """Leave all process groups, in which no rank may be waiting for this one any more."""
    parallel_state.destroy_model_parallel()
    # Its cache holds the last modules, and these their group.
    RotaryEmbedding.forward.cache_clear()
    dist.destroy_process_group()

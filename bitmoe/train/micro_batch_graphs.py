"""Forward and backward of a micro-batch as a CUDA graph: thousands of kernels, launched at once.

A layer of this model is some fifty kernels, most of them shorter than Python takes to launch one. A graph is recorded
where the sequence of kernels cannot change from step to step: every rank runs all layers, experts are whole on it (of
what is exchanged only run time knows the size) and multiplied without a wait for their sizes, nothing is recomputed but
gate and up (all else would move random generators), and no gradient travels before the backward pass ends. Collectives
of tensor parallelism are recorded like any kernel: they have made their connections when a key is run for the first
time.

What decides the sequence is the ``Key``: the first micro-batch of a step makes ternary codes, the others find them; a
recording step counts codes; a bit stage has its formats. Each key is run once as it is, which compiles its kernels,
then recorded at its second use. All graphs share one pool of memory: nothing but their losses, copied out at once, is
read after them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from bitmoe.config.choices import Precision, Recompute
from bitmoe.config.schema import Config
from bitmoe.quant.policy import QuantPolicy
from bitmoe_kernels.grouped_ternary_gemm import multiplies_without_wait

# Shapes: B = sequences of a micro-batch, S = sequence length.


class Key(NamedTuple):
    """What the kernels of a micro-batch depend on."""

    stage: int
    makes_codes: bool
    is_recording: bool


def graphs_hold(config: Config) -> bool:
    """Whether micro-batches of this layout can be recorded."""
    parallel, engine, run = config.parallel, config.engine, config.run
    is_whole = parallel.pipeline == parallel.expert == parallel.expert_tensor == 1
    is_kept = run.recompute in (Recompute.none, Recompute.ffn)
    is_static = config.moe.capacity_factor is None and is_kept and not run.deterministic
    is_apart = not (engine.overlap_grad_reduce or engine.overlap_param_gather or _experts_wait(config))
    return engine.cuda_graph and torch.cuda.is_available() and is_whole and is_static and is_apart


def _experts_wait(config: Config) -> bool:
    """Whether experts' products wait for the GPU to learn how many rows each has."""
    dtype = torch.bfloat16 if config.run.precision is Precision.bf16 else torch.float32
    widths = config.model.hidden_size, config.moe.ffn_hidden_size
    return config.moe.num_experts > 0 and not multiplies_without_wait(dtype, *widths)


class MicroBatchGraphs:
    """Runs micro-batches, recorded where they have been run before.

    Args:
        policy: says whether ternary codes must be made, and whether codes are counted.
        run: forward and backward of one micro-batch ``{"tokens", "labels"}``; adds to the gradients and returns the
            loss, a tensor without elements to wait for.
    """

    def __init__(self, policy: QuantPolicy, run: Callable[[dict[str, torch.Tensor]], torch.Tensor]):
        self._policy, self._run = policy, run
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._seen: set[Key] = set()
        self._inputs_BS: dict[str, torch.Tensor] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: dict[str, torch.Tensor], stage: int) -> torch.Tensor:
        """Forward and backward of one micro-batch at a bit stage; returns its loss."""
        policy = self._policy
        key = Key(stage, not policy.codes_are_fresh, policy.statistics.recording)
        if key not in self._seen:
            self._seen.add(key)
            return self._run(batch)
        if not self._inputs_BS:
            self._inputs_BS = {name: tensor.clone() for name, tensor in batch.items()}
        for name, tensor in batch.items():
            self._inputs_BS[name].copy_(tensor)
        if key not in self._graphs:
            self._graphs[key] = self._record()
        graph, loss = self._graphs[key]
        graph.replay()
        policy.codes_made()
        return loss.clone()

    def clear(self) -> None:
        """Forget what was recorded. NCCL's communicators cannot end while a graph holds one of their collectives."""
        torch.cuda.synchronize()
        self._graphs.clear()

    def _record(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls must be recordable: others may be loading data or saving a checkpoint.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._run(self._inputs_BS)
        return graph, loss

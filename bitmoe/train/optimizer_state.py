"""The optimizer's part of a checkpoint: fp32 weights and Adam moments as tensors shaped like the parameters.

megatron-core's ``fully_reshardable`` format is the one of its formats that any layout can read. Its handling of what
is not a tensor fails with torch's Adam (a fresh optimizer has no step count, and loading would share one count
between all parameters) and brings back hyperparameters of the old run. So only the tensors go through it; the step
count lies in the manifest, and hyperparameters come from the config.
"""

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # One data-parallel rank writes, so only it needs the gathered state.
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


def sharded_optimizer_state(optimizer: ChainedOptimizer, model: dict[str, Any], *, is_loading: bool) -> dict[str, dict]:
    """Describe weights and moments for megatron-core's checkpoint; collective.

    Args:
        optimizer: its parts hold dense and expert parameters.
        model: the model's sharded state, whose tensors are the parameters themselves.
        is_loading: describe empty tensors to load into.

    Returns:
        State of each part; when saving, only of those parts this rank writes.
    """
    states = {}
    for index, part in enumerate(optimizer.chained_optimizers):
        _allocate(part)
        state = part.sharded_param_state_fully_reshardable(model, is_loading, _METADATA)
        if state is not None:
            states[str(index)] = state
    return states


def load_optimizer_state(optimizer: ChainedOptimizer, states: dict[str, dict], step: int) -> None:
    """Take over loaded weights, moments and the number of steps done.

    Args:
        optimizer: of the model the state was described for.
        states: ``sharded_optimizer_state(is_loading=True)`` with loaded tensors.
        step: optimizer steps done.
    """
    for index, part in enumerate(optimizer.chained_optimizers):
        adam = part.optimizer
        for state in adam.state.values():
            # megatron-core looks for a loaded tensor for every one it finds here.
            state.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(states[str(index)])
        _set_step(adam, step)


def steps_done(optimizer: ChainedOptimizer) -> int:
    """How many steps Adam has counted for its bias correction."""
    adam = optimizer.chained_optimizers[0].optimizer
    if isinstance(adam, torch.optim.Adam):
        return int(next((state["step"] for state in adam.state.values()), 0))
    return int(adam.param_groups[0].get("step") or 0)


def _allocate(part: DistributedOptimizer) -> None:
    """Make moments and step count of an optimizer that has not taken a step."""
    if not part.optimizer.state:
        part.init_state_fn(part.optimizer, part.config)
        _set_step(part.optimizer, 0)


def _set_step(adam: torch.optim.Optimizer, step: int) -> None:
    """torch's Adam counts for every parameter, apex's and Transformer Engine's for every group."""
    if isinstance(adam, torch.optim.Adam):
        is_fused = adam.param_groups[0]["fused"]
        for parameter, state in adam.state.items():
            state["step"] = torch.tensor(float(step), device=parameter.device if is_fused else "cpu")
    else:
        for group in adam.param_groups:
            group["step"] = step

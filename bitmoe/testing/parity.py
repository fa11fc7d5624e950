"""Runs one model in any layout and gathers what must not depend on the layout: loss, gradients, codes, curves.

The functions run inside ranks (see ``bitmoe.testing.ranks``). They return plain dictionaries of global tensors, put
together from the shards that every rank describes, so a test compares two layouts tensor by tensor. Copies of one
shard on different ranks must be equal bit for bit; a difference is an error here.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from bitmoe.config.schema import Config
from bitmoe.model.initialize import global_index
from bitmoe.parallel.process_groups import make_groups, start
from bitmoe.quant.ternary_codes import CodeCache
from bitmoe.train.engine import Batch, MegatronEngine

# Shapes: B = sequences, S = sequence length.


def make_engine(config: Config) -> MegatronEngine:
    """Build an engine in this layout, with ``move_off_start`` applied.

    Args:
        config: complete and valid for the ranks that run this.
    """
    start()
    engine = MegatronEngine(config, make_groups(config.parallel))
    move_off_start(engine.sharded_state().values())
    engine.optimizer.reload_model_params()
    engine.policy.parameters_changed()
    return engine


@torch.no_grad()
def move_off_start(shards: Iterable[ShardedTensor]) -> None:
    """Move norm gains off one and expert biases off zero, so that mistakes with them show; the same in every layout."""
    for shard in shards:
        wave = torch.sin(global_index(shard, torch.arange(shard.data.numel())) * 1.7).view_as(shard.data)
        if "norm" in shard.key:
            shard.data.copy_(1 + 0.2 * wave)
        elif "expert_bias" in shard.key:
            shard.data.copy_(0.02 * wave)


def random_batches(config: Config, step: int) -> Callable[[range], Batch]:
    """Random tokens of one step's global batch, the same in every layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.run.global_batch_size, config.context.seq_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)

    def get_batch(rows: range) -> Batch:
        chosen = tokens[rows.start : rows.stop]
        return {"tokens": chosen[:, :-1].contiguous(), "labels": chosen[:, 1:].contiguous()}

    return get_batch


def gather_global(shards: list[tuple[ShardedTensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put local values together into global tensors.

    Args:
        shards: descriptions of this rank's parts and the values to place there (of the same local shape).

    Returns:
        On rank 0 every global tensor by name; elsewhere nothing.

    Raises:
        RuntimeError: two ranks hold different values of the same elements, or elements nobody holds.
    """
    local = [(s.key, tuple(s.global_shape), tuple(s.global_offset), v.detach().cpu()) for s, v in shards]
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, gathered)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, value in (part for parts in gathered or [] for part in parts):
        target = whole.setdefault(key, torch.full(shape, float("nan"), dtype=torch.float64))
        value = value.double().view((1,) * (len(shape) - value.dim()) + tuple(value.shape))
        place = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
        known = ~target[place].isnan()
        if not torch.equal(target[place][known], value[known]):
            raise RuntimeError(f"replicas of {key} at {offset} differ")
        target[place] = value
    for key, value in whole.items():
        if value.isnan().any():
            raise RuntimeError(f"{key} has elements that no rank holds, or that are NaN")
    return whole


def first_step(config: Config) -> dict:
    """Loss, gradients, gradient norm, weights and ternary codes of the first step.

    Returns:
        On rank 0 ``loss``, ``grad_norm``, ``grads``, ``weights`` (buffers included) and ``codes`` (by global name);
        elsewhere an empty dictionary.
    """
    engine = make_engine(config)
    engine.set_stage(1)
    shards = list(engine.sharded_state().values())
    weights = gather_global([(shard, shard.data) for shard in shards])
    loss = engine.compute_gradients(random_batches(config, 1), whole=True)
    parameters = [shard for shard in shards if isinstance(shard.data, torch.nn.Parameter)]
    grads = gather_global([(shard, shard.data.main_grad) for shard in parameters])
    codes = gather_global(ternary_codes(engine))
    _, grad_norm, _ = engine.optimizer.step()
    step = {"loss": loss, "grad_norm": float(grad_norm), "grads": grads, "weights": weights, "codes": codes}
    return step if dist.get_rank() == 0 else {}


def ternary_codes(engine: MegatronEngine) -> list[tuple[ShardedTensor, torch.Tensor]]:
    """This rank's ternary codes, each with the description of the parameter it was made from."""
    by_parameter = {id(s.data): s for s in engine.sharded_state().values()}
    owners = ((module, name) for chunk in engine.models for module in chunk.modules() for name in vars(module))
    found = []
    for module, name in owners:
        cache = getattr(module, name)
        if isinstance(cache, CodeCache):
            weight = getattr(module, name.replace("cache", "weight"))
            found.append((by_parameter[id(weight)], cache.get()[0].view_as(weight)))
    return found


def loss_curve(config: Config, steps: int, perturb_seed: int | None = None) -> list[float]:
    """Losses of the first ``steps`` optimizer steps.

    Args:
        config: the run; random tokens stand for data.
        steps: how many.
        perturb_seed: first move every weight by one unit in the last place, in directions drawn with this seed, to
            see how far rounding alone carries; None leaves them.
    """
    engine = make_engine(config)
    if perturb_seed is not None:
        generator = torch.Generator().manual_seed(perturb_seed)
        for parameter in (p for chunk in engine.models for p in chunk.parameters()):
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.data.copy_(torch.nextafter(parameter.data, torch.where(up, torch.inf, -torch.inf)))
        engine.optimizer.reload_model_params()
    return [engine.train_step(step, random_batches(config, step)).loss for step in range(1, steps + 1)]

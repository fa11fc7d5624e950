"""Checks of how model, experts and batch divide over ranks and quantization groups.

They say here, before any process starts, what megatron-core would answer from every rank, some of it without
a message. The rules it does not have are those of quantization groups: a group lies whole on one rank.
"""

from collections.abc import Iterator

from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config


def layout_problems(config: Config, world_size: int | None) -> Iterator[InputError]:
    """Every reason why the layout cannot work; numbers must be in range (``ranges.py``)."""
    yield from _tensor(config)
    yield from _groups(config)
    yield from _pipeline(config)
    yield from _experts(config)
    if world_size is not None:
        yield from _world(config, world_size)


def divisors(*numbers: int) -> list[int]:
    """The common divisors, ascending."""
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


def query_groups(config: Config) -> int:
    """Key/value heads, where null means as many as query heads."""
    return config.model.num_query_groups or config.model.num_attention_heads


def _tensor(config: Config) -> Iterator[InputError]:
    model, tensor = config.model, config.parallel.tensor
    heads = {"attention": model.num_attention_heads, "key/value": query_groups(config)}
    legal = f"one of {_listed(divisors(*heads.values()))}"
    for kind, number in heads.items():
        if number % tensor:
            what = f"{number} {kind} heads do not divide by {tensor}"
            yield InputError(what, fix=legal, key="parallel.tensor")
    if not config.moe.num_experts:
        yield from _divides("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tensor", tensor)
    yield from _divides("model.vocab_multiple", model.vocab_multiple, "parallel.tensor", tensor)
    if config.parallel.sequence and tensor == 1:
        yield InputError(
            "sequence parallelism needs a tensor group, and parallel.tensor is 1",
            fix="parallel.sequence=false or parallel.tensor=2",
            key="parallel.sequence",
        )
    if config.parallel.sequence:
        yield from _divides("context.seq_length", config.context.seq_length, "parallel.tensor", tensor)


def _groups(config: Config) -> Iterator[InputError]:
    groups, moe = config.quant.groups, config.moe
    cut = {"model.num_query_groups": query_groups(config)}
    if not moe.num_experts:
        cut["model.ffn_hidden_size"] = config.model.ffn_hidden_size
    else:
        cut["moe.ffn_hidden_size"] = moe.ffn_hidden_size
    if moe.num_experts and moe.shared_expert_size:
        cut["moe.shared_expert_size"] = moe.shared_expert_size
    legal = divisors(*cut.values())
    for key, size in cut.items():
        if size % groups:
            what = f"{key}={size} does not divide by {groups}"
            yield InputError(what, fix=f"one of {_listed(legal)}", key="quant.groups")
    for name in ("tensor", "expert_tensor"):
        key, size = f"parallel.{name}", getattr(config.parallel, name)
        if groups > 1 and groups % size:
            fitting = [g for g in legal if g % size == 0] or [1]
            yield InputError(
                f"{groups} groups do not divide over {key}={size}",
                fix=f"quant.groups one of {_listed(fitting)}, or {key} one of {_listed(divisors(groups))}",
                key="quant.groups",
            )


def _pipeline(config: Config) -> Iterator[InputError]:
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    if chunks == 1:
        yield InputError("1 chunk is no virtual pipeline", fix="null, or 2 or more", key="parallel.virtual_pipeline")
    layers = config.model.num_layers
    if chunks and stages == 1:
        yield InputError(
            f"{chunks} chunks per pipeline stage need more than one stage",
            fix="parallel.virtual_pipeline=null or parallel.pipeline=2",
            key="parallel.virtual_pipeline",
        )
    elif layers % (stages * (chunks or 1)):
        each = f" stages of {chunks} chunks" if chunks else " stages"
        yield InputError(
            f"{layers} layers do not divide over {stages}{each}",
            fix=f"model.num_layers a multiple of {stages * (chunks or 1)}",
            key="parallel.virtual_pipeline" if chunks else "parallel.pipeline",
        )


def _experts(config: Config) -> Iterator[InputError]:
    moe, parallel = config.moe, config.parallel
    if not moe.num_experts:
        for name in ("expert", "expert_tensor"):
            key, size = f"parallel.{name}", getattr(parallel, name)
            if size > 1:
                yield InputError(f"{size} in a dense model", fix=f"{key}=1 or moe=tiny", key=key)
        return
    if moe.num_experts % parallel.expert:
        yield InputError(
            f"{moe.num_experts} experts do not divide by {parallel.expert}",
            fix=f"one of {_listed(divisors(moe.num_experts))}",
            key="parallel.expert",
        )
    slices = parallel.expert_tensor
    yield from _divides("moe.ffn_hidden_size", moe.ffn_hidden_size, "parallel.expert_tensor", slices)
    if moe.shared_expert_size:
        yield from _divides("moe.shared_expert_size", moe.shared_expert_size, "parallel.tensor", parallel.tensor)
    if parallel.tensor > 1 and not parallel.sequence:
        yield InputError(
            f"experts with parallel.tensor={parallel.tensor} need sequence parallelism",
            fix="parallel.sequence=true",
            key="parallel.sequence",
        )


def _world(config: Config, world_size: int) -> Iterator[InputError]:
    parallel, run = config.parallel, config.run
    multiple = parallel.smallest_world_size
    if world_size % multiple:
        below = world_size // multiple * multiple
        near = [str(size) for size in (below, below + multiple) if size]
        yield InputError(
            f"{world_size} ranks do not fit the layout\n"
            f"attention: tensor {parallel.tensor} x data x pipeline {parallel.pipeline}"
            f" = a multiple of {parallel.attention_ranks}\n"
            f"experts: expert_tensor {parallel.expert_tensor} x expert {parallel.expert} x data"
            f" x pipeline {parallel.pipeline} = a multiple of {parallel.expert_ranks}",
            fix=f"{' or '.join(near)} ranks, or another parallel.*",
            key="world size",
        )
        return
    data = world_size // parallel.attention_ranks
    batch, at_once = run.global_batch_size, run.micro_batch_size * data
    if batch % at_once:
        below = batch // at_once * at_once
        near = [str(size) for size in (below, below + at_once) if size]
        yield InputError(
            f"{batch} sequences do not divide by run.micro_batch_size={run.micro_batch_size}"
            f" x {data} data-parallel ranks",
            fix=" or ".join(near),
            key="run.global_batch_size",
        )
    elif parallel.virtual_pipeline and batch // at_once % parallel.pipeline:
        yield InputError(
            f"{batch // at_once} micro-batches a step do not divide by parallel.pipeline={parallel.pipeline},"
            " which interleaved chunks need",
            fix=f"a multiple of {at_once * parallel.pipeline}",
            key="run.global_batch_size",
        )


def _divides(key: str, value: int, by_key: str, by: int) -> Iterator[InputError]:
    if value % by:
        fix = f"{key} a multiple of {by}, or another {by_key}"
        yield InputError(f"{value} does not divide by {by_key}={by}", fix=fix, key=key)


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)

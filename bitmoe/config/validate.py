"""Checks between keys: everything that would fail later, said before any process starts.

Each problem is an ``InputError`` with the key, the value and what would be legal. Nothing heavy is imported,
so the answer takes a second. ``ranges.py`` holds the checks of single numbers, ``layout.py`` those of
divisibility over ranks and groups; the rest is here.
"""

from collections.abc import Iterator
from itertools import pairwise

from bitmoe.config.choices import (
    ActFormat,
    Activation,
    BackwardFormat,
    Recompute,
    Score,
    Source,
    TokenizerKind,
    WeightFormat,
)
from bitmoe.config.errors import InputError
from bitmoe.config.layout import divisors, layout_problems, query_groups
from bitmoe.config.ranges import range_problems
from bitmoe.config.schema import BitStage, Config

FORMAT_FIELDS = ("qkv", "o", "gate_up", "down")


def validate(config: Config, world_size: int | None) -> None:
    """Refuse a config that cannot run.

    Args:
        config: the composed config.
        world_size: how many ranks there are; None leaves out what depends on it.

    Raises:
        InputError: the first of ``problems``, or a mistake in what names the training text and the tokenizer.
    """
    for problem in [*problems(config, world_size), *_inputs(config)]:
        raise problem


def problems(config: Config, world_size: int | None) -> list[InputError]:
    """Every reason why this model, recipe and layout cannot work, whatever the data.

    Numbers out of range are returned alone, because the other checks compute with them.
    """
    return list(range_problems(config)) or [
        *_model(config),
        *_quant(config),
        *_moe(config),
        *_recipe(config),
        *_recompute(config),
        *layout_problems(config, world_size),
    ]


def _model(config: Config) -> Iterator[InputError]:
    model = config.model
    heads, kv_heads = model.num_attention_heads, query_groups(config)
    if model.head_dim is None and model.hidden_size % heads:
        yield InputError(
            f"{model.hidden_size} does not divide by {heads} attention heads",
            fix=f"a multiple of {heads}, or give model.head_dim",
            key="model.hidden_size",
        )
    elif (width := model.head_dim or model.hidden_size // heads) % 2:
        what = f"{width} is odd, and the rotary embedding turns pairs"
        yield InputError(what, fix="an even width", key="model.head_dim")
    elif config.context.kv_bits < 16 and width % 8:
        what = f"{config.context.kv_bits}, but heads are {width} wide and low-bit caches pack eight features at a time"
        yield InputError(what, fix="16, or a model.head_dim that is a multiple of 8", key="context.kv_bits")
    if heads % kv_heads:
        yield InputError(
            f"{heads} attention heads do not divide by {kv_heads}",
            fix=f"one of {', '.join(map(str, divisors(heads)))}",
            key="model.num_query_groups",
        )


def _quant(config: Config) -> Iterator[InputError]:
    stages = config.quant.stages
    if not stages:
        yield InputError("there is no stage", fix="quant.stages=[{start:0}]", key="quant.stages")
        return
    if stages[0].start != 0:
        yield InputError(f"the first stage starts at {stages[0].start}", fix="start: 0", key="quant.stages[0].start")
    starts = [_start_step(stage, config.run.steps) for stage in stages]
    for i, (before, start) in enumerate(pairwise(starts), 1):
        if start <= before:
            yield InputError(
                f"step {start:g} is not after step {before:g}, where the stage before it begins",
                fix="list the stages in the order of their start",
                key=f"quant.stages[{i}].start",
            )
    quantized = config.quant.weights is not WeightFormat.none
    if not quantized and config.quant.backward is not BackwardFormat.bf16:
        what = f"{config.quant.backward.name} with quant.weights=none: there are no codes to multiply"
        yield InputError(what, fix="bf16 (the default)", key="quant.backward")
    for i, stage in enumerate(stages):
        for name in FORMAT_FIELDS:
            if quantized != (getattr(stage, name) is not ActFormat.none):
                yield InputError(
                    f"{getattr(stage, name).name} with quant.weights={config.quant.weights.name}",
                    fix="int8, int4 or fp4" if quantized else "none (as quant=none sets it)",
                    key=f"quant.stages[{i}].{name}",
                )


def _start_step(stage: BitStage, steps: int) -> float:
    """Where a stage begins, in steps: its start is a fraction of the run below 1."""
    return stage.start * steps if stage.start < 1 else stage.start


def _moe(config: Config) -> Iterator[InputError]:
    moe = config.moe
    if not moe.num_experts:
        return
    if moe.router_topk == 1 and moe.score is Score.softmax:
        yield InputError(
            "1 with moe.score=softmax: the softmax of one score is 1 whatever the router says, so it cannot learn",
            fix="moe.score=sigmoid, or 2 or more",
            key="moe.router_topk",
        )
    if moe.router_topk > moe.num_experts:
        yield InputError(
            f"{moe.router_topk} experts for each token of moe.num_experts={moe.num_experts}",
            fix=f"at most {moe.num_experts}",
            key="moe.router_topk",
        )
    if moe.expert_bias and moe.score is not Score.sigmoid:
        yield InputError(
            f"it needs sigmoid scores, not {moe.score.name}", fix="moe.score=sigmoid", key="moe.expert_bias"
        )


def _recipe(config: Config) -> Iterator[InputError]:
    optim, engine = config.optim, config.engine
    for name in ("lr", "lr_second"):
        peak = getattr(optim, name)
        if peak is not None and peak < optim.lr_end:
            yield InputError(f"{optim.lr_end} is above optim.{name}={peak}", fix=f"at most {peak}", key="optim.lr_end")
    if engine.name != "megatron":
        yield InputError(f"there is no engine {engine.name!r}", fix="megatron", key="engine.name")
    if engine.overlap_param_gather and not engine.overlap_grad_reduce:
        yield InputError(
            "gathering parameters behind the forward pass needs overlapped gradients",
            fix="engine.overlap_grad_reduce=true",
            key="engine.overlap_param_gather",
        )


def _recompute(config: Config) -> Iterator[InputError]:
    if config.run.recompute is not Recompute.ffn:
        return
    parallel, moe, groups = config.parallel, config.moe, config.quant.groups
    # Experts are cut over ranks of their own; without a shared one no other feed-forward is there.
    has_dense = not moe.num_experts or moe.shared_expert_size > 0
    ranks = max(parallel.tensor if has_dense else 1, parallel.expert_tensor if moe.num_experts else 1)
    if config.quant.weights is not WeightFormat.ternary:
        what = f"ffn with quant.weights={config.quant.weights.name}: gate and up are multiplied again from codes"
        yield InputError(what, fix="none, selective or full", key="run.recompute")
    elif config.model.activation is not Activation.relu2_glu:
        what = f"ffn with model.activation={config.model.activation.name}, which is no part of the product in front"
        yield InputError(what, fix="none, selective or full, or model.activation=relu2_glu", key="run.recompute")
    elif groups % ranks:
        what = f"ffn with quant.groups={groups}, of which {ranks} ranks do not hold whole ones"
        yield InputError(what, fix=f"none, or quant.groups={ranks} or a multiple", key="run.recompute")


def _inputs(config: Config) -> Iterator[InputError]:
    data, tokenizer = config.data, config.tokenizer
    if data.source is Source.files and not data.path:
        yield InputError(
            "data.source=files, but no path", fix="data.path=[corpus.txt], or data=stdlib", key="data.path"
        )
    if data.source is not Source.files and data.path:
        yield InputError(f"not read with data.source={data.source.name}", fix="data=files", key="data.path")
    if data.source is Source.hub and not data.name:
        yield InputError("data.source=hub, but no name", fix="data.name=OWNER/NAME, or data=stdlib", key="data.name")
    if data.weights and len(data.weights) != len(data.path):
        yield InputError(
            f"{len(data.weights)} weights for {len(data.path)} paths",
            fix="one for each of data.path, or none",
            key="data.weights",
        )
    if tokenizer.kind is TokenizerKind.file and not tokenizer.path:
        yield InputError(
            "tokenizer.kind=file, but no path",
            fix="tokenizer.path=tokenizer.json, or tokenizer=byte",
            key="tokenizer.path",
        )

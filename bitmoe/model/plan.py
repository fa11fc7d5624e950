"""``bitmoe plan``: what a run will need, for any number of ranks, on a machine that has none of them.

Three tables (parameters, memory of the fullest ranks, and how a step is divided) and what the trained model can be
converted to or, for a layout that cannot work, every reason with its way out. Nothing is built: the numbers come from
``counts.py`` and ``memory.py``, the reasons from ``config.export_targets``.
"""

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bitmoe.config.choices import Recompute, WeightFormat
from bitmoe.config.errors import InputError
from bitmoe.config.export_targets import BITNET_CPP_ARCHITECTURE, gguf_architecture, hf_architecture, refusals
from bitmoe.config.schema import Config
from bitmoe.config.validate import problems
from bitmoe.model.counts import (
    TRAINING_PER_FORWARD,
    Weight,
    active_parameters,
    forward_flops,
    is_ternary,
    model_weights,
    total_parameters,
)
from bitmoe.model.memory import RankMemory, checkpoint_bytes, micro_batches, packed_bytes, rank_memory
from bitmoe.model.sizes import with_vocab_size
from bitmoe.parallel.topology import Topology

BAD_LAYOUT = 2
_MEMORY_ROWS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer, its share",
    "ternary_codes": "ternary codes",
    "activations": "activations",
    "logits": "logits and cross-entropy",
    "temporaries": "temporaries of a product",
}
_RECOMPUTED = {
    Recompute.none: "",
    Recompute.selective: ", attention recomputed",
    Recompute.ffn: ", gate and up recomputed",
    Recompute.full: ", recomputed",
}


def plan(config: Config, world_size: int, console: Console | None = None) -> int:
    """Print the plan of a run, or why there is none.

    Args:
        config: any composed config.
        world_size: number of ranks.
        console: where to print; None means standard output.

    Returns:
        0, or 2 if the layout cannot work.
    """
    console = console or Console(highlight=False, markup=False)
    reasons = problems(config, world_size)
    try:
        config = with_vocab_size(config)
    except InputError as reason:
        reasons.append(reason)
    if reasons:
        console.print(_refusal(reasons, world_size))
        return BAD_LAYOUT
    stages = sorted({0, config.parallel.pipeline - 1})
    memories = [rank_memory(config, world_size, stage) for stage in stages]
    console.print(_parameter_table(config), _memory_table(config, memories), _facts(config, world_size))
    console.print(_exports(config))
    console.print(_conclusion(config, world_size, max(memory.total for memory in memories)))
    return 0


def _refusal(reasons: list[InputError], world_size: int) -> Group:
    table = Table.grid(padding=(0, 1))
    for number, reason in enumerate(reasons, 1):
        what, _, fix = str(reason).partition("\nfix: ")
        table.add_row(f"{number}.", Text(what))
        table.add_row("", Text(f"fix: {fix}", style="green"))
    heading = f"{_plural(len(reasons), 'reason')} why this cannot work on {_plural(world_size, 'rank')}:"
    return Group(Text(heading, style="bold red"), table)


def _parameter_table(config: Config) -> Table:
    table = _table("Parameters", "total", "active per token")
    weights = model_weights(config)
    for component in dict.fromkeys(weight.component for weight in weights):
        _add_parameters(table, component, config, [w for w in weights if w.component == component])
    table.add_section()
    inner = [w for w in weights if w.component not in ("embedding", "head")]
    _add_parameters(table, "without embedding and head", config, inner)
    _add_parameters(table, "all", config, weights, style="bold")
    return table


def _add_parameters(table: Table, name: str, config: Config, weights: list[Weight], style: str = "") -> None:
    counts = total_parameters(weights), active_parameters(weights, config)
    table.add_row(name, *(f"{count:,}" for count in counts), style=style)


def _memory_table(config: Config, memories: list[RankMemory]) -> Table:
    """Stages between the first and the last need less than the first."""
    size, unit = _unit(max(memory.total for memory in memories))
    stages = ["first stage", "last stage"] if len(memories) > 1 else ["every rank"]
    table = _table("Memory of a rank", *(f"{stage}, {unit}" for stage in stages))
    for field, name in _MEMORY_ROWS.items():
        parts = [getattr(memory, field) for memory in memories]
        if any(parts):
            note = _RECOMPUTED[config.run.recompute] if field == "activations" else ""
            table.add_row(name + note, *(f"{part / size:,.2f}" if part else "" for part in parts))
    table.add_section()
    table.add_row("all", *(f"{memory.total / size:,.2f}" for memory in memories), style="bold")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    table.add_column(title, min_width=30)
    for column in columns:
        table.add_column(column, justify="right", min_width=16)
    return table


def _facts(config: Config, world_size: int) -> Table:
    """How a step is divided over ranks, what it costs, and what lands on disk."""
    topology, run = Topology(config.parallel, world_size), config.run
    data, seq_length, count = topology.data_parallel, config.context.seq_length, micro_batches(config, world_size)
    step_tokens = run.global_batch_size * seq_length
    linears, attention = forward_flops(config)
    forward = linears + attention
    training = TRAINING_PER_FORWARD * forward
    checkpoint = checkpoint_bytes(config)
    shares = f"data {data} x {_plural(count, 'micro-batch')} x {run.micro_batch_size} sequences x {seq_length:,} tokens"
    facts = [("attention ranks", _grid(topology.attention_grid))]
    if config.moe.num_experts:
        facts.append(("expert ranks", _grid(topology.expert_grid)))
    facts += [
        ("a step", f"{step_tokens:,} tokens, {_flops(training * step_tokens)}"),
        ("", shares),
        ("a token", f"{_flops(forward)} forward, {_flops(training)} in training; attention {attention / forward:.1%}"),
        ("a checkpoint", f"{_bytes(checkpoint)}; {_bytes(checkpoint * run.keep_checkpoints)} for all that are kept"),
    ]
    if config.quant.weights is WeightFormat.ternary:
        facts.append(("for inference", _packed(config)))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    for fact in facts:
        table.add_row(*fact)
    return table


def _packed(config: Config) -> str:
    weights = model_weights(config)
    ternary = total_parameters(weight for weight in weights if is_ternary(weight, config))
    share = ternary / total_parameters(weights)
    sizes = (f"{_bytes(packed_bytes(config, codes))} at {8 / codes:g} bits" for codes in (4, 5))
    return f"{', '.join(sizes)} a ternary weight\n{share:.1%} of the weights are ternary, the rest is bf16"


def _exports(config: Config) -> Table:
    """What ``bitmoe convert`` can make of the model; of a target that cannot hold it, the first reason."""
    table = Table.grid(padding=(0, 2))
    for column in range(2):
        table.add_column(style="cyan", no_wrap=column == 0)
    table.add_column()
    table.add_row("exports", "bitmoe", "yes")
    architectures = {
        "hf": hf_architecture(config),
        "gguf": gguf_architecture(config),
        "gguf i2_s": BITNET_CPP_ARCHITECTURE,
    }
    for target, architecture in architectures.items():
        first, *others = refusals(config, target) or [f"yes, as {architecture}"]
        more = f"; {_plural(len(others), 'more reason')}" if others else ""
        table.add_row("", target, first + more)
    return table


def _conclusion(config: Config, world_size: int, peak: int) -> Text:
    weights = model_weights(config)
    total, active = total_parameters(weights), active_parameters(weights, config)
    used = f", {_short(active)} active," if active < total else ""
    return Text(
        f"\n{_short(total)} parameters{used} on {_plural(world_size, 'rank')}: up to about {_bytes(peak)} each.",
        style="bold green",
    )


def _grid(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis.replace('_', '-')} {size}" for axis, size in sizes.items())


def _plural(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('ch') else 's'}"


def _bytes(count: int) -> str:
    size, unit = _unit(count)
    return f"{count / size:,.1f} {unit}"


def _unit(count: int) -> tuple[int, str]:
    units = {2**40: "TiB", 2**30: "GiB", 2**20: "MiB"}
    return next(((size, name) for size, name in units.items() if count >= size), (2**10, "KiB"))


def _flops(count: int) -> str:
    return f"{_short(count, (('E', 18), ('P', 15), ('T', 12), ('G', 9), ('M', 6)), ' ')}FLOP"


def _short(count: int, suffixes: Sequence[tuple[str, int]] = (("B", 9), ("M", 6)), gap: str = "") -> str:
    """Three digits or so: 14.2B, 679M."""
    for suffix, power in suffixes:
        # From here on three digits round to this unit.
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g}{gap}{suffix}"
    return f"{count:,}{gap}"

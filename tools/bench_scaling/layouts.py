"""What is measured: layouts of ranks, and for each the models, wires and overlaps that are worth a row there."""

import argparse
from dataclasses import dataclass, replace
from itertools import product

from registry import SETTINGS

from bitmoe.config.choices import Wire
from bitmoe.config.compose import compose
from bitmoe.config.schema import Config
from bitmoe.config.validate import validate

RECIPE = ("quant=a48", "quant.backward=8bit")


@dataclass(frozen=True)
class Layout:
    """Ranks of one process group after another."""

    world: int
    """GPUs."""
    tensor: int = 1
    """Ranks that share attention and dense FFN, with sequence parallelism."""
    expert: int = 1
    """Ranks that share the routed experts."""

    @property
    def data(self) -> int:
        """Copies of attention and dense FFN, each of which takes a micro-batch of its own."""
        return self.world // self.tensor


LAYOUTS = {
    "1": Layout(1),
    "DP2": Layout(2),
    "TP2": Layout(2, tensor=2),
    "EP2": Layout(2, expert=2),
    "DP4": Layout(4),
    "TP2xDP2": Layout(4, tensor=2),
    "TP4": Layout(4, tensor=4),
    "EP4": Layout(4, expert=4),
    "EP2xDP2": Layout(4, expert=2),
}
"""By name. Experts are cut among data-parallel ranks: with EP every rank has attention and tokens of its own."""


@dataclass(frozen=True)
class Variant:
    """One row of a layout."""

    model: str
    """dense or moe."""
    groups: int = 1
    """quant.groups."""
    wire: Wire | None = None
    """parallel.wire, where codes travel."""
    is_overlapped: bool = False
    """Gradients are reduced behind the backward pass, parameters gathered behind the forward pass."""


def variants(layout: Layout, groups: int) -> list[Variant]:
    """The rows of a layout; ``groups`` is the G that is tried beside 1 where it matters."""
    both_groups = dict.fromkeys((1, groups))
    if layout.tensor > 1:
        return [Variant("dense", *choice) for choice in product(both_groups, Wire)]
    if layout.expert > 1:
        return [Variant("moe", wire=wire) for wire in Wire]
    if layout.world > 1:
        return [
            Variant(model, is_overlapped=overlapped) for model, overlapped in product(("dense", "moe"), (False, True))
        ]
    return [*(Variant("dense", number) for number in both_groups), Variant("moe")]


def make_config(layout: Layout, variant: Variant, arguments: argparse.Namespace) -> Config:
    """What this row trains; quantized from the first step on as the recipe is in its last stage.

    Args:
        layout: where.
        variant: what.
        arguments: of the command line.

    Raises:
        InputError: it cannot work in this layout.
    """
    is_moe = variant.model == "moe"
    preset = arguments.moe_model if is_moe else arguments.dense_model
    overrides = [*SETTINGS, *RECIPE, f"model={preset}", f"moe={arguments.moe if is_moe else 'none'}"]
    if is_moe and arguments.moe_layers:
        overrides.append(f"model.num_layers={arguments.moe_layers}")
    overrides += [f"parallel.tensor={layout.tensor}", f"parallel.expert={layout.expert}"]
    overrides += [f"parallel.sequence={layout.tensor > 1}", f"quant.groups={variant.groups}"]
    overrides += [f"parallel.wire={variant.wire.value}"] if variant.wire else []
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        overrides.append(f"engine.{name}={variant.is_overlapped}")
    overrides += [f"context.seq_length={arguments.seq}", f"run.micro_batch_size={arguments.micro_batch}"]
    overrides.append(f"run.global_batch_size={arguments.micro_batch * layout.data}")
    config = compose([*overrides, *arguments.overrides])
    config.quant.stages = [replace(config.quant.stages[-1], start=0.0)]
    validate(config, layout.world)
    return config

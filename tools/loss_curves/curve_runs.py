"""Which runs there are: each model in each variant. Imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass

SECOND_STAGE = 0.8
"""Where 4-bit inputs begin. The papers' 0.95 would leave them 50 of 1,000 steps, too few for a curve: they get 200."""

MODELS = {"dense": "curves_dense", "moe": "curves_moe"}
"""The experiment of each model."""


@dataclass(frozen=True)
class Variant:
    """One way to train a model."""

    label: str
    """What the figure and the table call it."""
    overrides: tuple[str, ...]
    """Of the config, on top of the model's."""
    is_quantized: bool = True


BF16, BASE, EIGHT_BIT, SECOND_SEED = "bf16", "a48", "a48-8bit", "a48-seed"
"""The variants; BASE is the one that the others are compared with."""

VARIANTS = {
    BF16: Variant("bf16, not quantized", ("quant=none",), is_quantized=False),
    BASE: Variant("a4.8, bf16 backward", ("quant=a48",)),
    EIGHT_BIT: Variant("a4.8, 8-bit backward", ("quant=a48", "quant.backward=8bit")),
    SECOND_SEED: Variant("a4.8, bf16 backward, second seed", ("quant=a48", "run.seed=4321")),
}


@dataclass(frozen=True)
class CurveRun:
    """One run."""

    model: str
    """A key of MODELS."""
    variant: str
    """A key of VARIANTS."""
    overrides: tuple[str, ...]
    """Of ``bitmoe pretrain``, all but the place of the run."""

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"{self.model}-{self.variant}"


def all_runs(
    models: Sequence[str], overrides: Sequence[str], second_stage: float, variants: Sequence[str] = tuple(VARIANTS)
) -> list[CurveRun]:
    """The runs of some models, in the order to start them: what a comparison needs most comes first.

    Args:
        models: keys of MODELS.
        overrides: of the config, for all runs; a variant's own win over them.
        second_stage: where 4-bit inputs begin, as ``quant.stages.1.start``.
        variants: keys of VARIANTS.
    """
    runs = []
    for name in variants:
        variant = VARIANTS[name]
        stages = [f"quant.stages.1.start={second_stage}"] if variant.is_quantized else []
        for model in models:
            ours = (f"experiment={MODELS[model]}", *overrides, *variant.overrides, *stages)
            runs.append(CurveRun(model, name, ours))
    return runs

"""What every quantized layer must agree on: groups, the current bit stage, and the number of the parameter value.

One ``QuantPolicy`` is made per model and handed to its layers. The trainer moves it: ``stage`` follows the bit
schedule, ``parameters_changed()`` is called after every optimizer step and every load, and makes the layers' ternary
codes stale.
"""

from typing import Protocol

from bitmoe.config.choices import ActFormat, BackwardFormat, WeightFormat
from bitmoe.config.schema import BitStage, QuantConfig
from bitmoe.quant.statistics import QuantStatistics


class HasEpoch(Protocol):
    """Something made of parameters of one epoch."""

    epoch: int


class QuantPolicy:
    """Groups, formats by role and the parameter epoch of one model.

    Args:
        config: the quantization group of the configuration.
        deterministic: add partial sums in one fixed order in every layout (``run.deterministic``).
    """

    def __init__(self, config: QuantConfig, deterministic: bool = False):
        self.groups = config.groups
        self.is_ternary = config.weights is WeightFormat.ternary
        self.is_backward_8bit = config.backward is BackwardFormat["8bit"]
        self.deterministic = deterministic
        self.stage: BitStage = config.stages[0]
        self.epoch = 0
        self.statistics = QuantStatistics()
        self._caches: list[HasEpoch] = []

    def parameters_changed(self) -> None:
        """Tell the layers that parameters have new values, so that codes are made again when next needed."""
        self.epoch += 1

    def register_cache(self, cache: HasEpoch) -> None:
        """Add codes that ``codes_are_fresh`` speaks of."""
        self._caches.append(cache)

    @property
    def codes_are_fresh(self) -> bool:
        """Whether the codes of all weights were made since parameters changed."""
        return all(cache.epoch == self.epoch for cache in self._caches)

    def codes_made(self) -> None:
        """Tell the caches that a recorded forward pass has made their codes."""
        for cache in self._caches:
            cache.epoch = self.epoch

    def act_format(self, role: str) -> ActFormat:
        """Format of the input of ``role`` (qkv, o, gate_up or down) at the current stage."""
        return getattr(self.stage, role)

    def keep(self, role: str) -> float:
        """Share of the input of ``role`` that top-K keeps; 1 means all."""
        return self.stage.o_keep if role == "o" else 1.0


def split_groups(groups: int, ranks: int) -> tuple[int, bool]:
    """How the G groups of a linear lie on the ranks its features are split over.

    Args:
        groups: quantization groups G of the whole linear.
        ranks: size of the tensor-parallel group; divides G, or G is 1.

    Returns:
        Groups this rank owns whole (1 if it owns part of one), and whether its group spans all ranks.

    Raises:
        ValueError: G is neither 1 nor a multiple of ``ranks``.
    """
    if groups % ranks == 0:
        return groups // ranks, False
    if groups == 1:
        return 1, True
    raise ValueError(f"quant.groups = {groups} is neither 1 nor a multiple of {ranks} tensor-parallel ranks")

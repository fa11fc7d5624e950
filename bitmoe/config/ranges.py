"""Checks of one key at a time: is the number in its range?

They come first: the checks between keys divide by these numbers.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config

ABOVE_ZERO = ("above 0", lambda x: x > 0)
ZERO_OR_MORE = ("0 or more", lambda x: x >= 0)
BELOW_ONE = ("from 0 to below 1", lambda x: 0 <= x < 1)

# A number that is not listed must be above 0.
RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "quant.stages[].start": ZERO_OR_MORE,
    "quant.stages[].o_keep": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "moe.num_experts": ZERO_OR_MORE,
    "moe.shared_expert_size": ZERO_OR_MORE,
    "moe.aux_loss_coeff": ZERO_OR_MORE,
    "moe.z_loss_coeff": ZERO_OR_MORE,
    "context.kv_bits": ("out of 16, 4 and 3", lambda x: x in (16, 4, 3)),
    "data.eval_fraction": ("above 0 and below 1", lambda x: 0 < x < 1),
    "optim.lr_end": ZERO_OR_MORE,
    "optim.warmup_steps": ZERO_OR_MORE,
    "optim.switch": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "optim.weight_decay": ZERO_OR_MORE,
    "optim.weight_decay_second": ZERO_OR_MORE,
    "optim.beta1": BELOW_ONE,
    "optim.beta2": BELOW_ONE,
    "optim.clip_grad": ZERO_OR_MORE,
    "run.seed": ZERO_OR_MORE,
    "run.checkpoint_every": ZERO_OR_MORE,
    "run.eval_every": ZERO_OR_MORE,
}
RUN_NAME = re.compile(r"[\w=][\w.,=+@-]*")


def range_problems(config: Config) -> Iterator[InputError]:
    """Every number outside its range, and a run name that is no plain name."""
    for key, value in _numbers(config, ""):
        allowed, holds = RULES.get(re.sub(r"\[\d+\]", "[]", key), ABOVE_ZERO)
        if not (math.isfinite(value) and holds(value)):
            yield InputError(f"{value} is out of range", fix=f"a number {allowed}", key=key)
    if not RUN_NAME.fullmatch(config.run.name):
        yield InputError(
            f"{config.run.name!r} is not a plain name",
            fix="letters, digits and any of _ . , = + @ - (folders go to run.dir)",
            key="run.name",
        )


def _numbers(node: Any, path: str) -> Iterator[tuple[str, float]]:
    """Every number in the config with its key, list elements as ``key[i]``."""
    if is_dataclass(node):
        for field in fields(node):
            yield from _numbers(getattr(node, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(node, list):
        for i, element in enumerate(node):
            yield from _numbers(element, f"{path}[{i}]")
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield path, node

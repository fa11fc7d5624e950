"""How an export agrees with the training forward, as numbers, and how much of it must.

Tensors are compared one by one: codes and scales with those that the training layers multiply, the others with the
source. Logits are compared on held-out text. The report is ``parity.json``; an export outside its limits is refused.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bitmoe.config.errors import InputError

# Shapes: B = sequences, S = positions, V = vocabulary.

# Below its smallest normal number fp16 has no relative precision.
_SMALLEST = 2.0**-14


@dataclass(frozen=True)
class Limits:
    """What an export may differ by."""

    top1_agreement: float
    """At least this share of positions has the same likeliest token."""
    mean_kl: float
    """At most this mean KL divergence, in nats per token."""
    scale: float = 0.0
    """Largest relative difference of a scale, or of a number that is not ternary."""


EXACT = Limits(top1_agreement=1.0, mean_kl=1e-6)
"""The same function in fp32."""


@dataclass
class TensorComparison:
    """Written tensors against what they should be.

    Args:
        limit: largest relative difference of numbers that are no codes.
    """

    limit: float = 0.0
    tensors: int = 0
    codes: int = 0
    codes_different: int = 0
    largest_difference: float = 0.0
    """Relative, of scales and of numbers that are not ternary."""
    wrong: list[str] = field(default_factory=list)
    """Names of tensors outside the limit, in the order they were compared."""
    worst_tensor: str | None = None
    """The one with most different codes, or else with the largest difference; None if there is no difference."""
    _worst: tuple[int, float] = (0, 0.0)

    def add_ternary(
        self,
        name: str,
        expected: tuple[torch.Tensor, torch.Tensor],
        found: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Compare codes and scales of a matrix; a group without codes may have any scale."""
        (codes, scale), (found_codes, found_scale) = expected, found
        different = _count_different(codes, found_codes)
        self.codes += codes.numel()
        self.codes_different += different
        self._add(name, different, _relative_difference(scale, found_scale))

    def add_numbers(self, name: str, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Compare a tensor that is not ternary."""
        self._add(name, 0, _relative_difference(expected, found))

    def _add(self, name: str, codes_different: int, difference: float) -> None:
        self.tensors += 1
        self.largest_difference = max(self.largest_difference, difference)
        if codes_different or difference > self.limit:
            self.wrong.append(name)
        if (codes_different, difference) > self._worst:
            self._worst, self.worst_tensor = (codes_different, difference), name

    def as_dict(self) -> dict[str, Any]:
        """For ``parity.json``."""
        return {key: value for key, value in asdict(self).items() if not key.startswith("_") and key != "limit"}

    def refuse_wrong(self) -> None:
        """Refuse a tensor outside the limit.

        Raises:
            InputError: there is one; names the first, and the worst.
        """
        if self.wrong:
            raise InputError(
                f"{self.wrong[0]} is not what the training forward computes with ({len(self.wrong)} of {self.tensors} "
                f"tensors differ, in {self.codes_different} codes; the worst is {self.worst_tensor})",
                fix="nothing was written; report this with the model's config",
            )


def compare_logits(expected_BSV: torch.Tensor, found_BSV: torch.Tensor) -> dict[str, float]:
    """Agreement of two models' next-token distributions.

    Returns:
        ``top1_agreement``; ``mean_kl`` and ``max_kl`` of the second from the first, in nats; ``mean_cosine`` and
        ``min_cosine`` of logits.

    Raises:
        InputError: logits of another shape, or NaN among them.
    """
    if expected_BSV.shape != found_BSV.shape:
        raise InputError(f"logits {list(found_BSV.shape)}, the training forward has {list(expected_BSV.shape)}")
    agreement, divergence, cosine = [], [], []
    # A sequence at a time: the vocabulary in fp64 is large.
    for expected_SV, found_SV in zip(expected_BSV.double(), found_BSV.double(), strict=True):
        p_SV, q_SV = expected_SV.log_softmax(-1), found_SV.log_softmax(-1)
        agreement.append(expected_SV.argmax(-1) == found_SV.argmax(-1))
        divergence.append((p_SV.exp() * (p_SV - q_SV)).sum(-1))
        cosine.append(torch.cosine_similarity(expected_SV, found_SV, dim=-1))
    agreement, divergence, cosine = (torch.cat(parts) for parts in (agreement, divergence, cosine))
    if not (divergence.isfinite().all() and cosine.isfinite().all()):
        raise InputError("the logits of the export are not finite", fix="nothing was written; report this")
    return {
        "top1_agreement": agreement.double().mean().item(),
        "mean_kl": divergence.mean().item(),
        "max_kl": divergence.max().item(),
        "mean_cosine": cosine.mean().item(),
        "min_cosine": cosine.min().item(),
    }


def refuse_different(logits: dict[str, float], limits: Limits) -> None:
    """Refuse logits outside the limits.

    Raises:
        InputError: they are; says by how much.
    """
    if logits["top1_agreement"] < limits.top1_agreement or logits["mean_kl"] > limits.mean_kl:
        raise InputError(
            f"the export computes another function: top-1 agreement {logits['top1_agreement']:.2%} (at least "
            f"{limits.top1_agreement:.0%}), mean KL {logits['mean_kl']:.1e} (at most {limits.mean_kl:.0e})",
            fix="nothing was written; report this with the model's config",
        )


def _count_different(expected: torch.Tensor, found: torch.Tensor) -> int:
    if expected.shape != found.shape:
        return expected.numel()
    return int((expected != found.to(expected.device)).sum())


def _relative_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest |difference|, relative to the larger number or to ``_SMALLEST``; infinite for another shape or NaN."""
    if expected.shape != found.shape:
        return float("inf")
    expected, found = expected.float(), found.to(expected.device).float()
    size = torch.maximum(expected.abs(), found.abs()).clamp(min=_SMALLEST)
    return ((expected - found).abs() / size).nan_to_num(nan=float("inf")).max().item()

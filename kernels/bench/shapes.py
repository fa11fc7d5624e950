"""The shapes that benchmarks time: dense layers of published sizes, and layers of routed experts.

Hidden sizes and FFN widths are those of ``conf/model``, widths in their aligned form. Imports nothing.
"""

from typing import NamedTuple

BF16_PEAK, EIGHT_BIT_PEAK = 989, 1979
"""Dense TFLOP/s of an H100 or H200 (SXM), by its datasheet."""


class DenseLayer(NamedTuple):
    """A transformer layer with a gated FFN and as many key/value heads as query heads."""

    hidden_size: int
    ffn_size: int


class MoELayer(NamedTuple):
    """Routed experts with gated FFNs, and the tokens they are timed on."""

    num_experts: int
    hidden_size: int
    ffn_size: int
    top_k: int
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """Copies of tokens that experts compute."""
        return self.num_tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of gate, up and down, forward and backward: three times two a multiply-add and matrix."""
        return 18 * self.num_rows * self.hidden_size * self.ffn_size

    @property
    def title(self) -> str:
        """As tables name it."""
        return f"{self.num_experts}x({self.hidden_size},{self.ffn_size}) top-{self.top_k}, {self.num_tokens:,} tokens"


class LinearShape(NamedTuple):
    """A linear, or several side by side that read the same input."""

    outputs: int
    inputs: int
    projections: int


DENSE_LAYERS = {
    "700M": DenseLayer(1536, 4096),
    "1.3B": DenseLayer(2048, 5504),
    "3B": DenseLayer(3200, 8704),
    "7B": DenseLayer(4096, 11008),
}
LINEAR_RUNS = [("700M", 8192), ("1.3B", 8192), ("3B", 8192), ("7B", 8192), ("7B", 32768)]
"""Layers and tokens at which linears are timed."""

ALL_BASELINES = ("7B", 8192)
"""The one of LINEAR_RUNS at which every baseline is timed, stage by stage where there are stages."""

MOE_LAYERS = [MoELayer(8, 4096, 14336, 2, 8192), MoELayer(64, 2048, 1408, 6, 16384)]
LARGE_MOE_LAYERS = [layer._replace(num_tokens=32768) for layer in MOE_LAYERS]
"""The same with more tokens."""

COLUMN_LINEARS = ("qkv", "gate_up")
"""Read INT4 codes, one scale a token; the others read INT8 codes in groups."""


def linear_shapes(layer: DenseLayer) -> dict[str, LinearShape]:
    """The linears of a dense layer by role."""
    hidden, ffn = layer
    return {
        "qkv": LinearShape(3 * hidden, hidden, 3),
        "gate_up": LinearShape(2 * ffn, hidden, 2),
        "o": LinearShape(hidden, hidden, 1),
        "down": LinearShape(hidden, ffn, 1),
    }


def share_of_floor(ms: float, flops: float, bf16_share: float) -> float:
    """How much of a time products need at the tensor cores' peak; ``bf16_share`` of them are bf16 ones, not 8-bit."""
    floor_ms = 1e-9 * flops * (bf16_share / BF16_PEAK + (1 - bf16_share) / EIGHT_BIT_PEAK)
    return round(floor_ms / ms, 3)


def bf16_share_of_linears(layer: DenseLayer, groups: int) -> float:
    """Of the FLOPs with an 8-bit backward: the weight gradients of linears with INT8 inputs in groups."""
    if groups == 1:
        return 0.0
    sizes = {name: shape.outputs * shape.inputs for name, shape in linear_shapes(layer).items()}
    return sum(size for name, size in sizes.items() if name not in COLUMN_LINEARS) / sum(sizes.values()) / 3


def linear_flops(layer: DenseLayer, num_tokens: int) -> int:
    """Of all linears of a layer, forward and backward."""
    return 6 * num_tokens * sum(shape.outputs * shape.inputs for shape in linear_shapes(layer).values())

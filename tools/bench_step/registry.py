"""The trainers by name. Their modules are imported when they are built, so one whose library is missing fails alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What a name stands for."""

    what: str
    """One line for the table."""
    overrides: tuple[str, ...]
    """Of the config, on top of the shape."""
    module: str
    """Module of this folder that builds it."""
    function: str = "build"
    """Its function: (config, groups) to a Trainer."""
    is_dense_only: bool = False
    """It cannot train a mixture of experts."""


# A learning rate at which random tokens do no harm from the first step on, and a run long enough to stay there.
SETTINGS = ("parallel=single", "run=paper", "quant.groups=1", "optim.lr=1e-4", "optim.lr_second=null")
"""Overrides of the config, for all trainers."""

_PLAIN = ("quant=none",)

TRAINERS = {
    "bitmoe-8bit": Entry("a4.8, 8-bit backward", ("quant=a48", "quant.backward=8bit"), "bitmoe_trainer"),
    "bitmoe-8bit-recompute": Entry(
        "the same, gate and up multiplied again in the backward",
        ("quant=a48", "quant.backward=8bit", "run.recompute=ffn"),
        "bitmoe_trainer",
    ),
    "bitmoe-bf16-backward": Entry("a4.8, bf16 backward", ("quant=a48", "quant.backward=bf16"), "bitmoe_trainer"),
    "bitmoe-bf16": Entry("nothing quantized", _PLAIN, "bitmoe_trainer"),
    "megatron-bf16": Entry("local spec, cuDNN attention", _PLAIN, "megatron_trainer"),
    "llama-bf16": Entry("transformers, compiled layers, fused AdamW", _PLAIN, "llama_trainer", is_dense_only=True),
    "llama-bf16-masters": Entry(
        "the same, fp32 master weights", _PLAIN, "llama_trainer", "build_with_masters", is_dense_only=True
    ),
    "fake-quant": Entry(
        "a4.8 fake-quantized in eager torch, in megatron-core's trainer",
        ("quant=a48",),
        "megatron_trainer",
        "build_fake_quant",
        is_dense_only=True,
    ),
}

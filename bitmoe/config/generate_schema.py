"""The schema of ``bitmoe generate``: what to load, what to continue, how to draw.

The literal under a field is its documentation, as in ``schema.py``.
"""

from dataclasses import dataclass
from pathlib import Path

from bitmoe.config.errors import InputError


@dataclass
class GenerateConfig:
    """One continuation of one prompt."""

    source: str | None = None
    """Folder that bitmoe convert wrote (to=bitmoe or to=hf)."""
    prompt_file: str | None = None
    """File whose text is continued; null takes --prompt TEXT, or else standard input."""
    max_new_tokens: int = 200
    """How many tokens to generate at most; a text that ends earlier stops there."""
    temperature: float = 0.8
    """Divides the logits before drawing; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability; 1 draws from all."""
    seed: int = 1234
    """Seed of the draws."""
    kv_bits: int | None = None
    """Bits of cached keys and values: 16, 4 or 3; null takes what the model was saved with."""
    device: str | None = None
    """cpu or cuda; null takes a GPU where there is one."""


def validate_generation(config: GenerateConfig) -> None:
    """Refuse what no model and no sampler can do.

    Raises:
        InputError: no source, or a value out of range.
    """
    if not config.source:
        raise InputError("it has no value", fix="source=FOLDER, one that bitmoe convert wrote", key="source")
    if not (Path(config.source) / "config.json").is_file():
        fix = "make one: bitmoe convert source=RUN to=bitmoe out=FOLDER"
        raise InputError(f"{config.source} holds no config.json", fix=fix, key="source")
    for key, is_good, meaning in (
        ("max_new_tokens", config.max_new_tokens > 0, "1 or more"),
        ("temperature", config.temperature >= 0, "0 or more"),
        ("top_p", 0 < config.top_p <= 1, "above 0 and at most 1"),
        ("kv_bits", config.kv_bits in (None, 3, 4, 16), "16, 4 or 3"),
        ("device", config.device in (None, "cpu", "cuda"), "cpu or cuda"),
    ):
        if not is_good:
            raise InputError(f"{getattr(config, key)} is out of range", fix=meaning, key=key)

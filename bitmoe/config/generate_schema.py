"""The schema of ``bitmoe generate``: what to load, what to continue, how to draw."""

from dataclasses import dataclass


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

"""Sizes that a config leaves to be derived: head width, key/value heads, rows of the embedding.

Plain integers without torch, so that ``bitmoe plan`` and the model itself take them from the same place.
"""

import math
from dataclasses import replace

from bitmoe.config.choices import TokenizerKind
from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config, ModelConfig

BYTE_VOCAB_SIZE = 259
"""Ids of the byte tokenizer: 256 bytes, end of document, beginning of text, padding."""


def head_dim(model: ModelConfig) -> int:
    """Width of an attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelConfig) -> int:
    """Key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple that does not depend on the layout."""
    return math.ceil(model.vocab_size / model.vocab_multiple) * model.vocab_multiple


def with_vocab_size(config: Config) -> Config:
    """Fill in model.vocab_size where it is null, without reading or training a tokenizer.

    Raises:
        InputError: the size stands in a tokenizer.json.
    """
    if config.model.vocab_size is not None:
        return config
    if config.tokenizer.kind is TokenizerKind.file:
        raise InputError(
            "null means the size of tokenizer.json, which is not read here",
            fix="give the number, such as model.vocab_size=32000, or tokenizer=byte",
            key="model.vocab_size",
        )
    is_byte = config.tokenizer.kind is TokenizerKind.byte
    vocab_size = BYTE_VOCAB_SIZE if is_byte else config.tokenizer.vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))

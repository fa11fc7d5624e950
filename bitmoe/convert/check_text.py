"""The text an export is compared on: held-out tokens that training prepared, or docstrings of the standard library."""

import argparse
import collections
import fractions
import heapq
import inspect
import json
import statistics
import string
import textwrap
from pathlib import Path

import numpy as np
import torch

from bitmoe.config.schema import Config
from bitmoe.data.split import EVAL
from bitmoe.data.token_files import open_token_file
from bitmoe.data.tokenizer import Tokenizer

_MODULES = (argparse, collections, fractions, heapq, statistics, string, textwrap)


def check_tokens(config: Config, tokenizer: Tokenizer, count: int) -> tuple[torch.Tensor, str]:
    """Tokens to run a model on.

    Args:
        config: of the model; its ``data.cache`` is looked into, nothing is prepared.
        tokenizer: of the model.
        count: how many, about: a multiple of what a sequence takes.

    Returns:
        Token ids int64 [B, S] with S up to the model's sequence length, and where they are from.
    """
    length = min(count, config.context.seq_length)
    needed = max(1, count // length) * length
    ids, name = _held_out(Path(config.data.cache), tokenizer, needed)
    if ids is None:
        ids, name = tokenizer.encode(_passage()), "docstrings of Python's standard library"
    return torch.from_numpy(np.resize(ids, needed).astype(np.int64)).view(-1, length), name


def _held_out(cache: Path, tokenizer: Tokenizer, needed: int) -> tuple[np.ndarray | None, str]:
    """The beginning of a held-out split that was made with this tokenizer."""
    for sidecar in sorted(cache.glob(f"*/{EVAL}.tokens.json")):
        known = json.loads(sidecar.read_bytes())
        if known.get("tokenizer") == tokenizer.fingerprint and known.get("tokens", 0) >= needed:
            return open_token_file(sidecar.parent / EVAL).tokens[:needed], f"held-out text of {sidecar.parent.name}"
    return None, ""


def _passage() -> str:
    members = [vars(module)[name] for module in _MODULES for name in module.__all__]
    return "\n\n".join(filter(None, map(inspect.getdoc, [*_MODULES, *members])))

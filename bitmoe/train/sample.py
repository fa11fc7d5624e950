"""A sample continuation at the end of a run: does the model write something like its text?

It recomputes the whole context for every token, in the training layout; serving is another matter.
"""

import math

import numpy as np
import torch

from bitmoe.data.tokenizer import Tokenizer
from bitmoe.train.engine import MegatronEngine


def continue_text(
    engine: MegatronEngine, tokenizer: Tokenizer, prompt: str, num_tokens: int = 120, temperature: float = 0.5
) -> str:
    """Sample a continuation; every rank must call it, and gets the same text.

    Args:
        engine: the trained model.
        tokenizer: of the model.
        prompt: text to continue; cut to the last half of the context if longer.
        num_tokens: how many tokens at most; stops at the end of a document or of the context.
        temperature: divides the logits; the draws depend on run.seed only.
    """
    length = engine.config.context.seq_length
    start = [tokenizer.eod_id, *tokenizer.encode(prompt).tolist()][-length // 2 :]
    tokens = np.full((1, length), tokenizer.eod_id, dtype=np.int64)
    tokens[0, : len(start)] = start
    generator = np.random.default_rng(engine.config.run.seed)
    end = len(start)
    # Padding behind a token cannot change it. Sequence parallelism cuts the length over the tensor group.
    block = math.lcm(32, engine.groups.tp.size())
    while end < min(length, len(start) + num_tokens):
        padded = min(length, math.ceil(end / block) * block)
        logits = (
            engine.logits(torch.from_numpy(tokens[:, :padded]))[0, end - 1, : tokenizer.vocab_size]
            .double()
            .cpu()
            .numpy()
        )
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        token = int(np.argmax(logits / temperature + generator.gumbel(size=logits.shape)))
        if token == tokenizer.eod_id:
            break
        tokens[0, end] = token
        end += 1
    return tokenizer.decode(tokens[0, len(start) : end].tolist())

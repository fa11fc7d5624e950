"""Small models saved as a training run saves them, in any layout, for tests of what reads checkpoints.

The functions run inside ranks (see ``bitmoe.testing.ranks``).
"""

from pathlib import Path

import torch

from bitmoe.config.schema import Config
from bitmoe.data.tokenizer import ByteTokenizer
from bitmoe.testing.parity import make_engine, random_batches
from bitmoe.train.checkpoint import load_checkpoint, save_checkpoint
from bitmoe.train.engine import MegatronEngine
from bitmoe.train.run_dir import config_dict


def save_model(config: Config, run: Path, steps: int = 2) -> Path:
    """Train for some steps on random tokens and save a checkpoint into ``<run>/checkpoints``."""
    engine = make_engine(config)
    for step in range(1, steps + 1):
        engine.train_step(step, random_batches(config, step))
    return save(engine, run, steps)


def reshard_model(path: Path, config: Config, run: Path) -> Path:
    """Load a checkpoint in another layout and save it again."""
    engine = make_engine(config)
    state = load_checkpoint(path, engine)
    return save(engine, run, state["step"])


def save(engine: MegatronEngine, run: Path, step: int) -> Path:
    """Save the present weights as training does, with the byte tokenizer."""
    state = {"step": step, "config": config_dict(engine.config)}
    return save_checkpoint(run / "checkpoints", engine, state, keep=2, tokenizer=ByteTokenizer())


def load_logits(path: Path, config: Config, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of a checkpoint by the training engine, in the last bit stage."""
    engine = make_engine(config)
    load_checkpoint(path, engine)
    engine.set_stage(config.run.steps)
    return engine.logits(tokens_BS)[..., : config.model.vocab_size]

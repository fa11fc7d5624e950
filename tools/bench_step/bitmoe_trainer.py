"""bitmoe itself: the engine of ``bitmoe pretrain``, as it is."""

from itertools import count

import torch
from trainer import Batch, Layer, Trainer

from bitmoe.config.schema import Config
from bitmoe.parallel.process_groups import Groups
from bitmoe.train.engine import MegatronEngine


def build(config: Config, groups: Groups) -> Trainer:
    """The engine of this config; its first step is step 1."""
    engine = MegatronEngine(config, groups)
    steps = count(1)

    def step(batch: Batch) -> float:
        return engine.train_step(next(steps), lambda rows: batch).loss

    def forward(batch: Batch) -> torch.Tensor:
        positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device).expand_as(batch["tokens"])
        return engine.chunks[0](batch["tokens"], positions, None, labels=batch["labels"]).mean()

    (model,) = engine.models
    first, angles = model.decoder.layers[0], model.rotary_pos_emb(config.context.seq_length)

    def layer(x_SBH: torch.Tensor) -> torch.Tensor:
        engine.policy.parameters_changed()
        return first(x_SBH, angles)[0]

    return Trainer(step, forward, Layer(first, layer))

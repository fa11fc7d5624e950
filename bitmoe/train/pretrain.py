"""``bitmoe pretrain`` on one rank: join the others, claim the run directory, prepare, train, report.

What can be refused is refused here, by rank 0 for all, before anything is built or written; the training itself is
``loop.py``.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config
from bitmoe.config.validate import validate
from bitmoe.data.loader import BatchLoader, EvalLoader
from bitmoe.data.prepare import prepare
from bitmoe.data.token_data import TokenData
from bitmoe.parallel.agree import on_first_rank
from bitmoe.parallel.process_groups import leave, make_groups, start
from bitmoe.train.checkpoint import load_checkpoint, newest_checkpoint, saved_state
from bitmoe.train.closing import close_run
from bitmoe.train.console import RunConsole, SilentConsole
from bitmoe.train.engine import MegatronEngine
from bitmoe.train.init_from import check_source, init_from, is_upcycled
from bitmoe.train.loop import Training, train
from bitmoe.train.metrics import TextLog
from bitmoe.train.open_source import find_source, open_source
from bitmoe.train.run_dir import RunDir, changed_model_keys, changed_order_keys, check_resume, config_dict
from bitmoe.train.sharded_weights import ShardedWeights
from bitmoe.train.status import DONE, STOPPED, write_running
from bitmoe.train.stop_signal import StopSignal
from bitmoe.train.weight_folder import WeightFolder


def pretrain(config: Config) -> int:
    """Run or continue a training run on this rank.

    Args:
        config: validated for this world size.

    Returns:
        Exit status: 0 when all steps are done, 75 when a signal stopped the run after saving.

    Raises:
        InputError: bad input, the same on every rank.
    """
    stop = StopSignal()
    start()
    run = RunDir(config.run.path)
    checkpoint = on_first_rank(lambda: _claim(run, config))
    source = on_first_rank(lambda: _find_weights(config)) if checkpoint is None else None
    console = _make_console(run, config, checkpoint)
    with console.phase("data"):
        # Rank 0 writes the cache; the others then find it.
        on_first_rank(lambda: prepare(config) and None)
        data = prepare(config)
        config = _with_vocabulary(config, data)
    with console:
        with console.phase("setup"):
            training = _set_up(config, run, data, checkpoint, source, console)
        with console.phase("training"):
            finished = train(training, stop)
        if finished:
            close_run(training)
        else:
            console.say(f"stopped by {stop.received or 'a signal to another rank'} after saving")
    training.engine.close()
    leave()
    return DONE if finished else STOPPED


def _claim(run: RunDir, config: Config) -> Path | None:
    """Own the run directory and find where to continue. Rank 0 only."""
    run.acquire()
    write_running(run.path)
    checkpoint = newest_checkpoint(run.checkpoints, lambda text: print(f"warning: {text}", flush=True))
    check_resume(config.run.resume, run, has_checkpoint=checkpoint is not None)
    return checkpoint


def _find_weights(config: Config) -> Path | None:
    """Where the weights of run.init_from lie, after a look whether they fit. Rank 0 only."""
    if config.run.init_from is None:
        return None
    try:
        source = find_source(config.run.init_from)
        check_source(open_source(source).config, config)
    except InputError as refused:
        raise InputError(refused.what, fix=refused.fix, key=refused.key or "run.init_from") from None
    return source


def _make_console(run: RunDir, config: Config, checkpoint: Path | None) -> SilentConsole:
    if dist.get_rank() != 0:
        return SilentConsole()
    done = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
    return RunConsole(config.run.steps, start_step=done, log=TextLog(run.log_file))


def _with_vocabulary(config: Config, data: TokenData) -> Config:
    """Fill in the vocabulary size from the tokenizer, and check everything that depends on it."""
    needed = data.tokenizer.vocab_size
    vocab_size = config.model.vocab_size or needed
    if vocab_size < needed:
        raise InputError(
            f"{vocab_size}, but the tokenizer has {needed} tokens",
            fix="leave it unset, or give it at least that size",
            key="model.vocab_size",
        )
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    validate(config, dist.get_world_size())
    return config


def _set_up(
    config: Config,
    run: RunDir,
    data: TokenData,
    checkpoint: Path | None,
    source: Path | None,
    console: SilentConsole,
) -> Training:
    sizes = {"seq_length": config.context.seq_length, "global_batch_size": config.run.global_batch_size}
    loader = BatchLoader(data, seed=config.run.seed, **sizes)
    held_out = EvalLoader(data, **sizes)
    if checkpoint is not None:
        on_first_rank(lambda: _check_same_run(saved_state(checkpoint)["config"], config))
    weights = _open_weights(source, config, data, console) if source is not None else None
    engine = MegatronEngine(config, make_groups(config.parallel))
    state = load_checkpoint(checkpoint, engine) if checkpoint is not None else {"step": 0}
    _check_same_data(state, data)
    if state["step"]:
        console.say(f"continuing from {checkpoint} (step {state['step']})")
    if weights is not None:
        init_from(engine, weights)
        upcycled = ", each expert from its dense FFN" if is_upcycled(weights.config, config) else ""
        console.say(f"starting from the weights of {source}{upcycled}")
    on_first_rank(lambda: run.write_config(config))
    return Training(config, run, engine, data, loader, held_out, console, step=state["step"])


def _open_weights(
    source: Path, config: Config, data: TokenData, console: SilentConsole
) -> ShardedWeights | WeightFolder:
    """Open the weights a new run starts from, now that its vocabulary is known."""
    weights = open_source(source)
    for warning in check_source(weights.config, config):
        console.warn(warning)
    # Weights that came without a tokenizer are taken as they are.
    with suppress(InputError):
        if weights.tokenizer.fingerprint != data.tokenizer.fingerprint:
            console.warn(f"the tokenizer is not that of {source}, whose weights may know its tokens by other ids")
    return weights


def _check_same_run(saved: dict, config: Config) -> None:
    """Refuse a changed model, and a changed order of the data: its position would mean something else."""
    new = config_dict(config)
    for changed, meaning in (
        (changed_model_keys(saved, new), "which makes it another model"),
        (changed_order_keys(saved, new), "which moves its position in the data"),
    ):
        if changed:
            raise InputError(
                f"{', '.join(changed)} changed since this run began, {meaning}",
                fix="restore them, or start another run with run.name=...",
                key=changed[0],
            )


def _check_same_data(state: dict, data: TokenData) -> None:
    if state.get("data_fingerprint", data.fingerprint) != data.fingerprint:
        raise InputError(
            "the training text changed since this run began, so its position in it means nothing",
            fix="restore the text, or start another run with run.name=...",
            key="data",
        )

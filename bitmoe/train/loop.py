"""The training loop: step, log, evaluate, save, stop when asked."""

import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from bitmoe.config.schema import Config
from bitmoe.data.bigram import bigram_entropy
from bitmoe.data.loader import BatchLoader, EvalLoader
from bitmoe.data.token_data import TokenData
from bitmoe.parallel.agree import any_rank
from bitmoe.quant.bit_schedule import stage_name
from bitmoe.train.checkpoint import save_checkpoint
from bitmoe.train.console import SilentConsole
from bitmoe.train.engine import MegatronEngine, StepResult
from bitmoe.train.metrics import MetricsLog
from bitmoe.train.run_dir import RunDir, config_dict
from bitmoe.train.stop_signal import StopSignal


@dataclass
class Training:
    """A run in progress on this rank."""

    config: Config
    run: RunDir
    engine: MegatronEngine
    data: TokenData
    loader: BatchLoader
    held_out: EvalLoader
    console: SilentConsole
    step: int
    """Optimizer steps done."""
    checkpoint: Path | None = None
    """The newest checkpoint this process wrote."""
    last: StepResult | None = None
    """What the last step did."""
    statistics: dict = field(default_factory=dict)
    """Health of quantizers and routers at the last logged step."""
    val_loss: float | None = None
    bigram_entropy: float | None = None

    @property
    def is_first_rank(self) -> bool:
        """Rank 0 writes and speaks."""
        return dist.get_rank() == 0

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.config.run.global_batch_size * self.config.context.seq_length


def train(training: Training, stop: StopSignal) -> bool:
    """Train up to run.steps.

    Returns:
        True when all steps are done; False when a signal to any rank stopped the run after saving.

    Raises:
        FloatingPointError: the loss is not finite; nothing of that step is saved.
    """
    run = training.config.run
    metrics = MetricsLog(training.run, warn=training.console.warn) if training.is_first_rank else None
    if metrics:
        metrics.begin(training.step)
    clock = _StepClock()
    stopped = False
    while training.step < run.steps and not stopped:
        _train_one(training, metrics, clock)
        stopped = any_rank(stop.received is not None)
        is_last = training.step == run.steps
        if is_last or (run.eval_every and training.step % run.eval_every == 0 and not stopped):
            evaluate(training, metrics)
        if is_last or stopped or (run.checkpoint_every and training.step % run.checkpoint_every == 0):
            save(training)
        clock.resume()
    if training.val_loss is None and not stopped:
        evaluate(training, metrics)
    if metrics:
        metrics.close()
    return not stopped


def _train_one(training: Training, metrics: MetricsLog | None, clock: "_StepClock") -> None:
    run, engine, step = training.config.run, training.engine, training.step + 1
    is_logged = step % run.log_every == 0 or step == run.steps or step == 1
    engine.record_statistics(is_logged)
    result = engine.train_step(step, lambda rows: training.loader.batch(step - 1, rows))
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise FloatingPointError(
            f"loss {result.loss} and gradient norm {result.grad_norm} at step {step}: nothing of it was saved"
        )
    training.step, training.last = step, result
    clock.tick()
    tokens_per_s = training.tokens_per_step / clock.seconds_per_step
    stage = stage_name(training.config.quant.stages[result.stage])
    training.console.step(step, loss=result.loss, tokens_per_s=tokens_per_s, stage=stage)
    if is_logged:
        training.statistics = engine.collect_statistics()
        if metrics:
            metrics.write(
                {
                    "step": step,
                    "tokens": training.tokens,
                    "lm_loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "lr": result.lr,
                    "weight_decay": result.weight_decay,
                    "stage": result.stage,
                    "tokens_per_s": tokens_per_s,
                    "step_ms": 1000 * clock.seconds_per_step,
                    "peak_bytes": peak_bytes(),
                    **training.statistics,
                }
            )
        clock.restart()


def evaluate(training: Training, metrics: MetricsLog | None) -> None:
    """Loss on held-out text, and the bigram entropy of the same text."""
    number = min(training.config.run.eval_batches, training.held_out.num_batches)
    with training.console.phase("evaluation"):
        training.engine.record_statistics(False)
        training.engine.set_stage(max(training.step, 1))
        losses = [training.engine.evaluate(lambda rows, i=i: training.held_out.batch(i, rows)) for i in range(number)]
        training.val_loss = sum(losses) / number
        if not math.isfinite(training.val_loss):
            raise FloatingPointError(
                f"held-out loss {training.val_loss} at step {training.step}: nothing of it was saved"
            )
        if training.bigram_entropy is None:
            training.bigram_entropy = bigram_entropy(training.held_out.text(number))
    if metrics:
        metrics.write(
            {
                "step": training.step,
                "tokens": training.tokens,
                "val_loss": training.val_loss,
                "bigram_entropy": training.bigram_entropy,
            }
        )


def save(training: Training) -> None:
    """Write a checkpoint of the present step."""
    state = {
        "step": training.step,
        "tokens": training.tokens,
        "data_fingerprint": training.data.fingerprint,
        "config": config_dict(training.config),
        "versions": {"torch": torch.__version__},
    }
    with training.console.phase("checkpoint"):
        training.checkpoint = save_checkpoint(
            training.run.checkpoints,
            training.engine,
            state,
            keep=training.config.run.keep_checkpoints,
            tokenizer=training.data.tokenizer,
        )


def peak_bytes() -> int:
    """Largest memory used so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _StepClock:
    """Mean wall-clock time of the steps since the last log line, without evaluations and checkpoints."""

    def __init__(self):
        self._seconds, self._steps, self._since = 0.0, 0, time.perf_counter()

    def tick(self) -> None:
        """A step has ended."""
        self._seconds += time.perf_counter() - self._since
        self._steps += 1
        self.resume()

    def resume(self) -> None:
        """Leave out what happened since the last step."""
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Begin a new mean."""
        self._seconds, self._steps = 0.0, 0

    @property
    def seconds_per_step(self) -> float:
        """Mean since ``restart``."""
        return self._seconds / max(self._steps, 1)

"""The end of a run: a sample continuation, the plot, the report."""

from bitmoe.parallel.agree import on_first_rank
from bitmoe.train.closing_report import ClosingReport
from bitmoe.train.loop import Training
from bitmoe.train.plot import plot_run
from bitmoe.train.sample import continue_text


def close_run(training: Training) -> None:
    """Sample, draw and report a finished run; every rank must call it."""
    prompt, sample = training.config.run.sample, ""
    if prompt is not None:
        with training.console.phase("sample"):
            sample = continue_text(training.engine, training.data.tokenizer, prompt)
    with training.console.phase("plot"):
        on_first_rank(lambda: plot_run(training.run.path))
    sparsity = {key.split("/")[1]: x for key, x in training.statistics.items() if key.startswith("sparsity/")}
    training.console.report(
        ClosingReport(
            run_dir=training.run.path,
            steps=training.step,
            tokens=training.tokens,
            train_loss=training.last.loss if training.last else None,
            val_loss=training.val_loss,
            bigram_entropy=training.bigram_entropy,
            sparsity=sparsity,
            prompt=prompt or "",
            sample=sample,
            checkpoint=training.checkpoint,
        )
    )

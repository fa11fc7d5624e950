"""The report that ends a run: what was reached, how long it took, where everything lies."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ClosingReport:
    """What the closing report shows; a field that is None or empty is left out."""

    run_dir: Path
    """The run's directory."""
    steps: int
    """Optimizer steps done, of all sessions together."""
    tokens: int | None = None
    """Tokens trained on."""
    train_loss: float | None = None
    """Training loss of the last step, nats per token."""
    val_loss: float | None = None
    """Loss on held-out text, nats per token."""
    bigram_entropy: float | None = None
    """Bigram entropy of the same held-out text, nats per token."""
    sparsity: dict[str, float] = field(default_factory=dict)
    """Share of zeros in the quantized input, by linear role."""
    prompt: str = ""
    """The prompt of the sample."""
    sample: str = ""
    """What the model wrote after the prompt."""
    checkpoint: Path | None = None
    """The last checkpoint."""


def render_report(report: ClosingReport, phases: dict[str, float]) -> str:
    """The report as aligned plain text.

    Args:
        report: the facts.
        phases: seconds by phase.
    """
    tokens = "" if report.tokens is None else f", {report.tokens:,} tokens"
    rows = [("done", f"{report.steps:,} steps{tokens} in {_seconds(sum(phases.values()))}")]
    if report.train_loss is not None:
        rows.append(("training loss", f"{report.train_loss:.3f} nats/token"))
    if report.val_loss is not None:
        rows.append(("held-out loss", _held_out(report.val_loss, report.bigram_entropy)))
    if report.sparsity:
        rows.append(("zeros in inputs", "  ".join(f"{role} {x:.1%}" for role, x in report.sparsity.items())))
    if phases:
        rows.append(("time", "  ".join(f"{name} {_seconds(x)}" for name, x in phases.items())))
    if report.sample:
        rows.append(("sample", _printable(report.prompt + report.sample)))
    rows.append(("run", str(report.run_dir)))
    if report.checkpoint is not None:
        rows.append(("checkpoint", str(report.checkpoint)))
    rows += [
        ("curves", str(report.run_dir / "loss.png")),
        ("metrics", str(report.run_dir / "metrics.jsonl")),
        ("TensorBoard", f"tensorboard --logdir {report.run_dir / 'tensorboard'}"),
    ]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(label.ljust(width) + text.replace("\n", "\n" + " " * width) for label, text in rows)


def _held_out(val_loss: float, bigram_entropy: float | None) -> str:
    text = f"{val_loss:.3f} nats/token"
    if bigram_entropy is None:
        return text
    verdict = f"beaten by {bigram_entropy - val_loss:.3f}" if val_loss < bigram_entropy else "NOT beaten"
    return f"{text}; bigram entropy of the same text {bigram_entropy:.3f}: {verdict}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _printable(text: str) -> str:
    """Escape what could steer a terminal; an untrained byte model writes anything."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)

"""The closing report: every fact, the verdict, nothing that could steer a terminal."""

import math
from pathlib import Path

import pytest

from bitmoe.train.closing_report import ClosingReport, render_report

FULL = ClosingReport(
    run_dir=Path("runs/x"),
    steps=300,
    tokens=614_400,
    train_loss=1.9,
    val_loss=1.9235,
    bigram_entropy=2.4121,
    sparsity={"qkv": 0.1204, "o": 0.5},
    prompt="def ",
    sample="f(x):\n    return x",
    checkpoint=Path("runs/x/checkpoints/step_00000300"),
)


def test_render_report_shows_everything():
    text = render_report(FULL, {"setup": 8.04, "training": 120.0})
    assert text == "\n".join(
        [
            "done             300 steps, 614,400 tokens in 2 min 8 s",
            "training loss    1.900 nats/token",
            "held-out loss    1.923 nats/token; bigram entropy of the same text 2.412: beaten by 0.489",
            "zeros in inputs  qkv 12.0%  o 50.0%",
            "time             setup 8.0 s  training 2 min 0 s",
            "sample           def f(x):",
            "                     return x",
            "run              runs/x",
            "checkpoint       runs/x/checkpoints/step_00000300",
            "curves           runs/x/loss.png",
            "metrics          runs/x/metrics.jsonl",
            "TensorBoard      tensorboard --logdir runs/x/tensorboard",
        ]
    )


@pytest.mark.parametrize("val_loss", [2.5, 2.0, math.nan])
def test_render_report_says_when_the_bigram_is_not_beaten(val_loss):
    text = render_report(ClosingReport(Path("x"), 1, val_loss=val_loss, bigram_entropy=2.0), {})
    assert "2.000: NOT beaten" in text


def test_render_report_leaves_out_what_is_unknown():
    text = render_report(ClosingReport(Path("runs/x"), 5), {})
    assert [line.split()[0] for line in text.splitlines()] == [
        "done",
        "run",
        "curves",
        "metrics",
        "TensorBoard",
    ]


def test_render_report_escapes_control_characters():
    text = render_report(ClosingReport(Path("x"), 1, prompt="a\x1b[2J", sample="\x00\r\u202eb\u00e9"), {})
    assert "a\\x1b[2J\\x00\\r\\u202eb\u00e9" in text

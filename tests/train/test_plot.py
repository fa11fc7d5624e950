"""The picture of a run: what is drawn, where the lines stand, what is refused."""

import math

import matplotlib.image
import numpy as np
import pytest

from bitmoe.config.choices import ActFormat, Schedule
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, Config
from bitmoe.train.metrics import MetricsLog
from bitmoe.train.plot import draw, plot_run
from bitmoe.train.run_dir import RunDir, config_dict


def config(schedule: Schedule = Schedule.two_stage) -> Config:
    made = Config()
    made.run.steps = 100
    made.optim.schedule = schedule
    made.quant.stages.append(
        BitStage(0.8, ActFormat.int4, ActFormat.int8, 0.5, ActFormat.int4, ActFormat.int8),
    )
    return made


def records(last: int = 100, **extra: float) -> list[dict]:
    made = [
        {
            "step": step,
            "lm_loss": 5 - step / 50,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "stage": int(step >= 80),
            **extra,
        }
        for step in range(10, last + 1, 10)
    ]
    return [*made, {"step": last, "val_loss": 3.25, "bigram_entropy": 2.5}]


def titles(figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def dotted(axis) -> list[float]:
    return [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"]


def curve(axis, label: str) -> np.ndarray:
    (found,) = [line for line in axis.lines if line.get_label() == label]
    return found.get_xydata()


def test_draw_has_a_panel_for_each_thing_recorded():
    extra = {"sparsity/qkv": 0.1, "sparsity/o": 0.5, "zeros/qkv": 0.3}
    moe = {"moe/load_max_over_mean": 1.5, "moe/router_entropy": 2.0}
    assert titles(draw("r", records(), None)) == ["r", "learning rate", "gradient norm"]
    assert titles(draw("r", records(**extra, **moe), None)) == [
        "r",
        "learning rate",
        "gradient norm",
        "zeros in quantized inputs",
        "zeros in ternary weights",
        "expert load, maximum / mean",
        "router entropy (nats)",
    ]


def test_draw_shows_the_losses():
    loss = draw("r", records(), None).axes[0]
    np.testing.assert_array_equal(loss.lines[0].get_xydata()[:2], [[10, 4.8], [20, 4.6]])
    np.testing.assert_array_equal(curve(loss, "held-out"), [[100, 3.25]])
    assert curve(loss, "bigram entropy of held-out text, 2.500")[:, 1].tolist() == [2.5, 2.5]
    assert "3.250" in [text.get_text() for text in loss.texts]


def test_draw_roles_keep_their_order():
    figure = draw("r", records(**{"sparsity/qkv": 0.1, "sparsity/o": 0.5, "sparsity/down": 0.6}), None)
    axis = figure.axes[titles(figure).index("zeros in quantized inputs")]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["qkv", "o", "down"]
    assert curve(axis, "o")[0].tolist() == [10, 0.5]


def test_draw_marks_stage_and_learning_rate_switch_in_every_panel():
    figure = draw("r", records(), config_dict(config()))
    assert [dotted(axis) for axis in figure.axes] == [[50, 80]] * 3
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert "learning-rate switch" in labels
    assert "bit stage a48" in labels


def test_draw_marks_no_switch_that_is_not_there_or_not_reached():
    assert dotted(draw("r", records(), config_dict(config(Schedule.linear))).axes[0]) == [80]
    assert dotted(draw("r", records(last=40), config_dict(config())).axes[0]) == []
    assert dotted(draw("r", records(), None).axes[0]) == [80]


def test_draw_smooths_without_lag_and_around_gaps():
    rows = [{"step": step, "lm_loss": float(step)} for step in range(1, 201)]
    rows[100]["lm_loss"] = math.nan
    smooth = curve(draw("r", rows, None).axes[0], "training")
    inner = np.r_[10:90, 110:190]
    np.testing.assert_allclose(smooth[inner, 1], smooth[inner, 0])
    assert np.isfinite(smooth).all()


def test_draw_keeps_a_spike_from_flattening_the_curve():
    rows = records()
    rows[3]["lm_loss"] = 1e9
    assert draw("r", rows, None).axes[0].get_ylim()[1] < 10


def test_draw_survives_a_run_that_diverged():
    rows = [{"step": step, "lm_loss": math.nan, "grad_norm": math.inf} for step in (1, 2)]
    assert titles(draw("r", rows, None)) == ["r", "gradient norm"]


def test_plot_run_writes_a_picture_and_nothing_else(tmp_path):
    run = RunDir(tmp_path / "first-run")
    run.path.mkdir()
    run.write_config(config())
    log = MetricsLog(run, tensorboard=False)
    for record in records():
        log.write(record)
    log.close()
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 110, "lm_')
    assert plot_run(run.path) == run.plot_file
    height, width, _ = matplotlib.image.imread(run.plot_file).shape
    assert width == 1500
    assert height > 800
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "loss.png", "metrics.jsonl"]


def test_plot_run_refuses_a_directory_without_metrics(tmp_path):
    with pytest.raises(InputError, match="no metrics at"):
        plot_run(tmp_path)


@pytest.mark.parametrize("content", ["", '{"step": 1, "val_loss": 2.0}\n'])
def test_plot_run_refuses_metrics_without_a_loss(tmp_path, content):
    RunDir(tmp_path).metrics_file.write_text(content)
    with pytest.raises(InputError, match="no loss yet"):
        plot_run(tmp_path)
    assert not RunDir(tmp_path).plot_file.exists()

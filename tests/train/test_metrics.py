"""Metrics: exact numbers, valid JSON, torn lines, resume, full disks."""

import json
import math
import resource
from contextlib import contextmanager

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bitmoe.config.errors import InputError
from bitmoe.train.metrics import MetricsLog, TextLog, read_metrics
from bitmoe.train.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


@pytest.fixture
def log(run):
    with_json_only = MetricsLog(run, tensorboard=False)
    yield with_json_only
    with_json_only.close()


@contextmanager
def file_size_limit(size: int):
    """The kernel refuses to let any file grow beyond ``size`` bytes: a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def scalars(run: RunDir, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_write_numbers_come_back_exactly(log, run):
    record = {
        "step": 7,
        "lm_loss": 0.1 + 0.2,
        "tiny": 5e-324,
        "tokens": 2**60,
        "load": [1.5, 2.0],
        "name": "a8",
    }
    log.write(record)
    assert read_metrics(run.metrics_file) == [record]


def test_write_is_on_disk_at_once(log, run):
    log.write({"step": 1})
    assert run.metrics_file.read_text() == '{"step": 1}\n'


def test_write_takes_tensors(log, run):
    log.write({"step": 1, "lm_loss": torch.tensor(0.5), "load": [torch.tensor(3)]})
    assert read_metrics(run.metrics_file) == [{"step": 1, "lm_loss": 0.5, "load": [3]}]


def test_write_non_finite_numbers_stay_valid_json(log, run):
    log.write({"step": 1, "a": math.nan, "b": math.inf, "c": [-math.inf, 1.0]})

    def refuse(name):
        raise AssertionError(name)

    plain = json.loads(run.metrics_file.read_text(), parse_constant=refuse)
    assert plain == {"step": 1, "a": "NaN", "b": "Infinity", "c": ["-Infinity", 1.0]}
    (record,) = read_metrics(run.metrics_file)
    assert math.isnan(record["a"])
    assert record["b"] == math.inf
    assert record["c"] == [-math.inf, 1.0]


def test_truncate_after_drops_later_steps_and_appending_goes_on(log, run):
    for step in (1, 2, 3, 4):
        log.write({"step": step, "lm_loss": math.nan})
    log.truncate_after(2)
    log.write({"step": 3, "lm_loss": 1.0})
    records = read_metrics(run.metrics_file)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert math.isnan(records[1]["lm_loss"])


def test_truncate_after_without_a_file(log, run):
    log.truncate_after(0)
    assert not run.metrics_file.exists()


def test_write_after_a_kill_in_mid_line(log, run):
    run.metrics_file.write_bytes(b'{"step": 1}\n{"step": 2, "lm_l')
    log.write({"step": 2})
    assert run.metrics_file.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_read_metrics_leaves_out_a_torn_last_line(run):
    run.metrics_file.write_bytes(b'{"step": 1}\n{"step": 2')
    assert read_metrics(run.metrics_file) == [{"step": 1}]


@pytest.mark.parametrize("damage", [b"{not json}", b"[1]", b"\xff\xfe"])
def test_read_metrics_refuses_a_damaged_line(run, damage):
    run.metrics_file.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(run.metrics_file)


def test_read_metrics_refuses_a_missing_file(run):
    with pytest.raises(InputError, match="no metrics at"):
        read_metrics(run.metrics_file)


def test_write_on_a_full_disk_warns_once_and_keeps_whole_lines(run):
    warned = []
    log = MetricsLog(run, tensorboard=False, warn=warned.append)
    with file_size_limit(1000):
        for step in range(1, 101):
            log.write({"step": step, "note": "x" * 20})
    log.write({"step": 101})
    log.close()
    assert len(warned) == 1
    assert "File too large" in warned[0]
    steps = [record["step"] for record in read_metrics(run.metrics_file)]
    assert steps == [*range(1, len(steps)), 101]
    assert 10 < len(steps) < 30


def test_tensorboard_groups_by_prefix(run):
    log = MetricsLog(run)
    log.write({"step": 1, "tokens": 9, "lm_loss": 2.5, "moe/router_entropy": 1.5, "stage": 0, "name": "a8"})
    log.write({"step": 2, "val_loss": 2.0, "lm_loss": math.nan})
    log.close()
    assert scalars(run, "train/lm_loss")[0] == (1, 2.5)
    assert math.isnan(scalars(run, "train/lm_loss")[1][1])
    assert scalars(run, "moe/router_entropy") == [(1, 1.5)]
    assert scalars(run, "eval/val_loss") == [(2, 2.0)]
    assert scalars(run, "train/tokens") == scalars(run, "train/name") == []


def test_tensorboard_hides_steps_that_are_run_again(run):
    for steps in ((1, 2, 3), (2, 3)):
        log = MetricsLog(run)
        for step in steps:
            log.write({"step": step, "lm_loss": float(10 * len(steps) + step)})
        log.close()
    assert scalars(run, "train/lm_loss") == [(1, 31.0), (2, 22.0), (3, 23.0)]


def test_tensorboard_failure_warns_once_and_the_file_goes_on(run):
    run.tensorboard.write_text("a file where TensorBoard wants a folder")
    warned = []
    log = MetricsLog(run, warn=warned.append)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.close()
    assert len(warned) == 1
    assert "TensorBoard" in warned[0]
    assert len(read_metrics(run.metrics_file)) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk_never_raises(run):
    warned = []
    log = MetricsLog(run, warn=warned.append)
    log.write({"step": 1, "lm_loss": 1.0})
    with file_size_limit(2**14):
        for step in range(2, 2000):
            log.write({"step": step, "lm_loss": 1.0, "grad_norm": 1.0})
        log.close()
    assert sum("TensorBoard" in text for text in warned) == 1
    assert sum("metrics.jsonl cannot" in text for text in warned) == 1


def test_text_log_stamps_every_line(tmp_path):
    log = TextLog(tmp_path / "log.txt")
    log.write("first\nsecond \udcff")
    log.write("third")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["first", "second \\udcff", "third"]
    assert all(line[4] == "-" and line[13] == ":" for line in lines)


def test_text_log_on_a_full_disk_only_warns(tmp_path):
    log = TextLog(tmp_path / "log.txt")
    log.write("x" * 50)
    with file_size_limit(100), pytest.warns(UserWarning, match=r"log\.txt cannot be written"):
        log.write("x" * 50)

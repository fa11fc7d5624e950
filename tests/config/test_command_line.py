"""The command line as a user meets it: exit statuses, one message, no heavy import, nothing written."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def words(value):
    """The id of a case: its arguments."""
    return " ".join(value) if isinstance(value, list) else ""


def bitmoe(*arguments, cwd, options=(), **env):
    """Run ``bitmoe`` in a process of its own, in a folder where anything it wrote would show."""
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *options, "-m", "bitmoe", *arguments],
        cwd=cwd,
        env={**clean, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretain"], "did you mean bitmoe pretrain?"),
        (["pretrain", "model.hedas=3"], "model.hedas: there is no such key"),
        (["pretrain", "+model.hedas=3"], "model.hedas: there is no such key"),
        (["pretrain", "run.steps=many"], "run.steps: Value 'many' of type 'str'"),
        (["pretrain", "model.activation=gelu"], "model.activation: Invalid value 'gelu'"),
        (["pretrain", "model=99b"], "model: there is no choice '99b'"),
        (["pretrain", "run.steps=[1"], "'run.steps=[1' is no override"),
        (["pretrain", "parallel.tensor=3"], "parallel.tensor: 4 attention heads do not divide by 3"),
        (["pretrain", "-m", "parallel.tensor=3,4"], "parallel.tensor: 4 attention heads do not divide by 3"),
        (["pretrain", "run.nproc=3"], "world size: 3 ranks do not fit the layout"),
        (["pretrain", "--config-name", "nope"], "primary config 'nope'"),
        (["prepare", "data=files"], "data.path: data.source=files, but no path"),
        (["plot", "run.name=nope"], "runs/nope"),
        (["convert"], "source: it has no value"),
        (["convert", "source=.", "to=hf"], "out: it has no value"),
        (["convert", "source=.", "out=model"], "to: it has no value\nfix: to=bitmoe|hf|gguf|checkpoint"),
        (["convert", "source=nope", "to=hf", "out=model"], "source: nope is no folder"),
        (["convert", "source=.", "to=hf", "out=."], "out: . exists already"),
        (["convert", "surce=."], "did you mean source?"),
        (["convert", "+surce=."], "surce: there is no such key"),
        (["convert", "to=onnx"], "to: Invalid value 'onnx', expected one of [bitmoe, hf, gguf, checkpoint]"),
        (["convert", "packing=3bit"], "packing: Invalid value '3bit', expected one of [2bit, 1.6bit]"),
        (["convert", "-m", "to=hf,bitmoe", "source=.", "out=."], "out: . exists already"),
        (["convert", "source=.", "to=hf", "out=model"], "'.' holds neither a checkpoint nor converted weights"),
    ],
    ids=words,
)
def test_bad_input_is_one_message_and_exit_2(arguments, message, tmp_path):
    done = bitmoe(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 12
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "multirun.yaml"]


def test_fault_keeps_its_traceback(tmp_path):
    run = tmp_path / "runs" / "broken"
    (run / "loss.png").mkdir(parents=True)  # where plot will write a file
    (run / "metrics.jsonl").write_text('{"step": 1, "lm_loss": 1.0}\n')
    done = bitmoe("plot", "run.name=broken", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "IsADirectoryError" in done.stderr


def test_only_rank_0_of_torchrun_speaks(tmp_path):
    ranks = [bitmoe("pretrain", cwd=tmp_path, RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    assert "error: world size: 3 ranks do not fit the layout" in ranks[0].stderr
    assert [rank.stderr for rank in ranks[1:]] == ["", ""]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["pretrain", "model.hedas=3"], 2),
        (["pretrain", "parallel.tensor=3"], 2),
        (["plan", "--help"], 0),
        (["pretrain", "--cfg", "job"], 0),
        (["convert", "source=.", "to=hf"], 2),
        (["convert", "--help"], 0),
    ],
    ids=words,
)
def test_answers_without_heavy_imports(arguments, status, tmp_path):
    start = time.monotonic()
    done = bitmoe(*arguments, cwd=tmp_path, options=["-X", "importtime"])
    assert time.monotonic() - start < 5
    assert done.returncode == status
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "bitmoe.config.schema" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "megatron", "transformers")}


@pytest.mark.parametrize("command", ["pretrain", "prepare", "plan", "doctor", "plot"])
def test_every_command_has_help_and_cfg(command, tmp_path):
    assert f"  {command} " in bitmoe("--help", cwd=tmp_path).stdout
    usage = bitmoe(command, "--help", cwd=tmp_path)
    assert (usage.returncode, usage.stderr) == (0, "")
    assert usage.stdout.startswith(f"usage: bitmoe {command} ")
    config = bitmoe(command, "--cfg", "job", "run.steps=17", cwd=tmp_path)
    assert (config.returncode, config.stderr) == (0, "")
    assert "steps: 17" in config.stdout
    assert list(tmp_path.iterdir()) == []


def test_convert_has_help_and_cfg_of_its_own(tmp_path):
    assert "  convert " in bitmoe("--help", cwd=tmp_path).stdout
    usage = bitmoe("convert", "--help", cwd=tmp_path)
    assert (usage.returncode, usage.stderr) == (0, "")
    assert usage.stdout.startswith("usage: bitmoe convert ")
    assert "  packing (2bit|1.6bit; default 2bit)" in usage.stdout
    assert "model.num_layers" not in usage.stdout
    config = bitmoe("convert", "--cfg", "job", "to=gguf", "packing=1.6bit", cwd=tmp_path)
    assert (config.returncode, config.stderr) == (0, "")
    assert "to: gguf\n" in config.stdout
    assert "packing: 1.6bit\n" in config.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_lists_them(tmp_path):
    done = bitmoe(cwd=tmp_path)
    assert done.returncode == 0
    assert "pretrain" in done.stdout


def test_config_dir_adds_choices(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("num_layers: 11\n")
    done = bitmoe("pretrain", "--cfg", "job", "--config-dir", str(tmp_path), "model=mine", cwd=tmp_path)
    assert "num_layers: 11" in done.stdout

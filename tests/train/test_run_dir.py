"""The run directory: lock between real processes, config round trip, refusals."""

import os
import resource
import subprocess
import sys

import pytest

from bitmoe.config.choices import ActFormat, Precision, Resume, WeightFormat
from bitmoe.config.errors import InputError
from bitmoe.config.schema import BitStage, Config
from bitmoe.train.run_dir import (
    RunDir,
    changed_model_keys,
    check_resume,
    config_dict,
    replace_file,
    require_space,
)

HOLDER = """
import sys
from bitmoe.train.run_dir import RunDir
run = RunDir(sys.argv[1])
run.acquire()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == b"locked\n"
    yield process
    process.kill()
    process.communicate()


def test_acquire_refuses_a_directory_in_use(tmp_path, holder):
    with pytest.raises(InputError, match=rf"in use by pid {holder.pid} on ") as refusal:
        RunDir(tmp_path / "run").acquire()
    assert refusal.value.fix


def test_acquire_after_the_owner_was_killed(tmp_path, holder):
    holder.kill()
    holder.wait()
    RunDir(tmp_path / "run").acquire()
    assert (tmp_path / "run/lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_release_lets_the_next_one_in(tmp_path):
    first, second = RunDir(tmp_path / "a/b"), RunDir(tmp_path / "a/b")
    first.acquire()
    with pytest.raises(InputError, match="in use"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_acquire_leaves_nothing_but_the_lock(tmp_path):
    run = RunDir(tmp_path / "run")
    run.acquire()
    run.release()
    assert [path.name for path in run.path.iterdir()] == ["lock"]


def test_acquire_refuses_a_file_in_the_way(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match="run.dir: .* is not writable"):
        RunDir(tmp_path / "runs/x").acquire()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_acquire_refuses_a_read_only_directory(tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(InputError, match="not writable"):
        RunDir(tmp_path / "run").acquire()


def test_acquire_refuses_an_unwritable_file_system():
    # procfs takes no new entries, not even from root.
    with pytest.raises(InputError, match="not writable"):
        RunDir("/proc/bitmoe-run").acquire()


def test_config_round_trip(tmp_path):
    config = Config()
    config.quant.stages.append(BitStage(start=0.95, qkv=ActFormat.int4, o_keep=0.5))
    config.run.precision = Precision.fp32
    run = RunDir(tmp_path)
    assert run.load_config() is None
    run.write_config(Config())
    run.write_config(config)
    loaded = run.load_config()
    assert loaded == config_dict(config)
    assert loaded["quant"]["stages"][1]["qkv"] == "int4"
    assert loaded["run"]["precision"] == "fp32"
    assert loaded["moe"]["capacity_factor"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("content", ["a: [1, 2", "just text", ""])
def test_load_config_refuses_what_is_no_config(tmp_path, content):
    run = RunDir(tmp_path)
    run.config_file.write_text(content)
    with pytest.raises(InputError, match="not a config of a run"):
        run.load_config()


def test_changed_model_keys_names_what_changes_the_model():
    old, new = Config(), Config()
    new.model.hidden_size = 256
    new.moe.num_experts = 4
    new.quant.groups = 4
    new.quant.weights = WeightFormat.none
    new.tokenizer.vocab_size = 9
    assert changed_model_keys(config_dict(old), config_dict(new)) == [
        "model.hidden_size",
        "moe.num_experts",
        "quant.groups",
        "quant.weights",
        "tokenizer.vocab_size",
    ]


def test_changed_model_keys_lets_training_change():
    new = Config()
    new.parallel.tensor = 2
    new.optim.lr = 1.0
    new.run.steps = 7
    new.moe.aux_loss_coeff = 0.5
    new.model.init_std = 0.1
    new.context.seq_length = 512
    new.quant.stages.append(BitStage(start=0.5))
    assert changed_model_keys(config_dict(Config()), config_dict(new)) == []


def test_changed_model_keys_takes_a_missing_old_key_as_its_default():
    old, new = config_dict(Config()), Config()
    del old["model"]["sub_norm"]
    assert changed_model_keys(old, config_dict(new)) == []
    new.model.sub_norm = False
    assert changed_model_keys(old, config_dict(new)) == ["model.sub_norm"]


@pytest.mark.parametrize(
    ("policy", "has_checkpoint", "refused"),
    [("auto", True, False), ("auto", False, False), ("never", True, True), ("never", False, False)]
    + [("must", True, False), ("must", False, True)],
)
def test_check_resume(policy, has_checkpoint, refused):
    run = RunDir("runs/x")
    if refused:
        with pytest.raises(InputError, match=f"run.resume: {policy}, but runs/x/checkpoints"):
            check_resume(Resume(policy), run, has_checkpoint=has_checkpoint)
    else:
        check_resume(Resume(policy), run, has_checkpoint=has_checkpoint)


def test_require_space(tmp_path):
    require_space(tmp_path / "not/yet/there", 1)
    with pytest.raises(InputError, match=r"a checkpoint needs 1048576\.00 GiB, but .* has .* GiB free"):
        require_space(tmp_path / "not/yet/there", 2**50, "a checkpoint")


def test_replace_file_keeps_the_old_content_when_the_disk_refuses(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            replace_file(path, b"x" * 2**17)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_replace_file_replaces(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]

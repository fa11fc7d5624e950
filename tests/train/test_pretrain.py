"""`bitmoe pretrain` as a user runs it: whole runs of a tiny model, stopped, killed, continued, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError

pytestmark = pytest.mark.xdist_group("ranks")

SMALL = [
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "moe.num_experts=4",
    "moe.ffn_hidden_size=32",
    "moe.shared_expert_size=32",
    "context.seq_length=32",
    "data.max_bytes=400000",
    "run.micro_batch_size=2",
    "run.global_batch_size=4",
    "run.eval_batches=2",
    "run.log_every=1",
    "run.sample=null",
]
SAMPLE = "run.sample='def '"


def overrides(folder: Path, *more: str) -> list[str]:
    return [*SMALL, f"run.dir={folder}/runs", f"data.cache={folder.parent}/cache", "run.name=tiny", *more]


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "bitmoe", "pretrain", *overrides(folder, *more)]


def bitmoe(folder: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, *more), capture_output=True, text=True, timeout=300, check=False)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    found = [(record["step"], record["lm_loss"]) for record in records(folder) if "lm_loss" in record]
    assert len(found) == len(dict(found)), "a step was logged twice"
    return dict(found)


def wait_for(condition, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("nothing happened in 120 s")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run of 12 steps in one go, two ranks, through the stage switch at step 10."""
    folder = tmp_path_factory.mktemp("whole")
    settings = ["run.steps=12", "quant.stages.1.start=10", "run.eval_every=6", "run.checkpoint_every=6"]
    done = bitmoe(folder, *settings, SAMPLE)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_pretrain_writes_a_run(whole_run):
    run = whole_run / "runs/tiny"
    tokenizer = "checkpoints/step_00000012/tokenizer_kind.json"
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "log.txt", tokenizer, "tensorboard"):
        assert (run / name).exists(), name
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    steps = [record for record in records(whole_run) if "lm_loss" in record]
    expected = {"step", "tokens", "lm_loss", "grad_norm", "lr", "weight_decay", "stage", "tokens_per_s", "step_ms"}
    expected |= {"peak_bytes", "sparsity/o", "clipped/qkv", "zeros/down", "flips/gate_up", "moe/router_entropy"}
    assert expected <= steps[-1].keys()
    assert [record["stage"] for record in steps] == [0] * 9 + [1] * 3
    assert steps[-1]["sparsity/o"] == pytest.approx(0.5, abs=1e-6)
    assert steps[0]["sparsity/o"] < 0.1
    assert [record["step"] for record in records(whole_run) if "val_loss" in record] == [6, 12]


def test_pretrain_reports(whole_run):
    text = (whole_run / "stdout").read_text()
    for part in ("held-out loss", "bigram entropy", "zeros in inputs", "sample", "checkpoint", "loss.png"):
        assert part in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_pretrain_continues_bit_identically(whole_run, tmp_path, number):
    settings = ["run.steps=12", "quant.stages.1.start=10", "run.eval_every=6", "run.checkpoint_every=2"]
    process = subprocess.Popen(command(tmp_path, *settings), stderr=subprocess.PIPE, text=True, stdout=subprocess.PIPE)
    wait_for(lambda: (tmp_path / "runs/tiny/checkpoints/step_00000002").exists(), process)
    process.send_signal(number)
    process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 75
        assert json.loads((tmp_path / "runs/tiny/status.json").read_text())["exit_code"] == 75
    else:
        # Ranks end by themselves once their launcher is gone; until then they own the run directory.
        time.sleep(3)
    again = bitmoe(tmp_path, *settings)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stdout
    assert losses(tmp_path) == losses(whole_run)


def test_pretrain_again_when_done_trains_no_more(whole_run):
    before = losses(whole_run)
    again = bitmoe(whole_run, "run.steps=12", "quant.stages.1.start=10", "run.eval_every=6", "run.checkpoint_every=6")
    assert again.returncode == 0, again.stderr
    assert losses(whole_run) == before


def test_pretrain_under_torchrun(tmp_path):
    arguments = ["-m", "bitmoe", "pretrain", *overrides(tmp_path, "run.steps=2")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert set(losses(tmp_path)) == {1, 2}


def refuse(arguments: list[str]) -> str:
    """Run pretrain in this rank and return the refusal."""
    from bitmoe.train.pretrain import pretrain

    try:
        pretrain(compose([*arguments, "parallel=single"]))
    except InputError as error:
        return str(error)
    return "accepted"


def pretrain_quietly(arguments: list[str]) -> int:
    from bitmoe.train.pretrain import pretrain

    return pretrain(compose([*arguments, "parallel=single"]))


def test_pretrain_sets_a_record_without_checkpoint_aside(ranks, tmp_path):
    run = tmp_path / "runs/tiny"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 7}\n')
    assert ranks(1).run(pretrain_quietly, overrides(tmp_path, "run.steps=1")) == [0]
    assert (run / "metrics.1.jsonl").read_text() == '{"step": 7}\n'
    assert set(losses(tmp_path)) == {1}


def sample_of_a_virtual_pipeline(arguments: list[str]) -> int:
    from bitmoe.train.pretrain import pretrain

    layout = ["parallel=pp2", "parallel.virtual_pipeline=2", "model.num_layers=4", SAMPLE]
    return pretrain(compose([*arguments, *layout]))


def test_pretrain_samples_from_a_virtual_pipeline(ranks, tmp_path):
    assert ranks(2).run(sample_of_a_virtual_pipeline, overrides(tmp_path, "run.steps=1")) == [0, 0]


def explode(arguments: list[str]) -> str:
    """Train with a gradient that overflows while the loss is finite."""
    from bitmoe.train import pretrain as module
    from bitmoe.train.engine import MegatronEngine

    class Exploding(MegatronEngine):
        def _add_up_gradients(self, get_batch, whole=False):
            loss = super()._add_up_gradients(get_batch, whole)
            next(self.chunks[0].parameters()).main_grad.fill_(float("inf"))
            return loss

    module.MegatronEngine = Exploding
    try:
        module.pretrain(compose([*arguments, "parallel=single"]))
    except FloatingPointError as error:
        return str(error)
    finally:
        module.MegatronEngine = MegatronEngine
    return "trained"


def test_pretrain_never_saves_a_step_that_overflowed(ranks, tmp_path):
    assert "gradient norm" in ranks(1).run(explode, overrides(tmp_path, "run.steps=1"))[0]
    assert not list(tmp_path.glob("runs/tiny/checkpoints/*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.vocab_size=200"], "model.vocab_size: 200, but the tokenizer has 259 tokens"),
        (["context.seq_length=500000", "run.micro_batch_size=1"], "context.seq_length: a sequence of 500000 tokens"),
        (["data=files", "data.path=[missing.txt]"], "missing.txt"),
        (["run.resume=must"], "holds no checkpoint"),
        (["run.dir=/dev/null/runs"], "run.dir: run directory /dev/null/runs/tiny is not writable"),
    ],
    ids=["vocabulary", "sequence", "data", "resume", "unwritable"],
)
def test_pretrain_refuses(ranks, tmp_path, more, message):
    refusal = ranks(1).run(refuse, overrides(tmp_path, *more))[0]
    assert message in refusal
    assert not list(tmp_path.glob("runs/tiny/checkpoints/*"))


def test_pretrain_refuses_empty_and_truncated_data(ranks, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    refusal = ranks(1).run(refuse, overrides(tmp_path, "data=files", f"data.path=[{tmp_path}/empty.txt]"))[0]
    assert "empty.txt" in refusal
    (tmp_path / "cut.idx").write_bytes(b"MMIDIDX\0\0")
    (tmp_path / "cut.bin").write_bytes(b"")
    refusal = ranks(1).run(refuse, overrides(tmp_path, "data=files", f"data.path=[{tmp_path}/cut]"))[0]
    assert "cut.idx" in refusal


def test_pretrain_refuses_another_model_and_used_directories(ranks, tmp_path):
    short = overrides(tmp_path, "run.steps=2")
    assert ranks(1).run(pretrain_quietly, short) == [0]
    assert "moe.num_experts" in ranks(1).run(refuse, [*short, "moe.num_experts=8"])[0]
    assert "quant.groups" in ranks(1).run(refuse, [*short, "quant.groups=1"])[0]
    assert "run.resume: never" in ranks(1).run(refuse, [*short, "run.resume=never"])[0]
    assert "run.global_batch_size" in ranks(1).run(refuse, [*short, "run.global_batch_size=8"])[0]
    (tmp_path / "runs/tiny/config.yaml").unlink()
    other_text = [*short, "data.max_bytes=300000"]
    assert "the training text changed" in ranks(1).run(refuse, other_text)[0]


def test_pretrain_refuses_a_directory_in_use(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "run.steps=100000"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (tmp_path / "runs/tiny/metrics.jsonl").exists(), process)
        second = bitmoe(tmp_path, "run.steps=100000")
        assert second.returncode == 2
        assert second.stderr.count("error:") == 1
        assert "in use by pid" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=120)

"""`bitmoe pretrain run.init_from=...` on runs, checkpoints and folders of weights."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError
from bitmoe.train.open_source import find_source, open_source
from bitmoe.train.weight_folder import WeightFolder, write_weight_folder

SMALL = [
    "moe=none",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.ffn_hidden_size=64",
    "context.seq_length=32",
    "data.max_bytes=400000",
    "optim.warmup_steps=0",
    "run.micro_batch_size=2",
    "run.global_batch_size=4",
    "run.eval_batches=2",
    "run.log_every=1",
    "run.sample=null",
    "run.precision=fp32",
    "parallel=single",
]
UPCYCLED = ["moe=tiny", "moe.num_experts=4", "moe.ffn_hidden_size=64", "moe.shared_expert_size=64"]


def overrides(folder: Path, name: str, *more: str) -> list[str]:
    return [*SMALL, f"run.dir={folder}/runs", f"data.cache={folder}/cache", f"run.name={name}", *more]


def pretrain_with(arguments: list[str]) -> int | str:
    """Run pretrain in this rank: its exit status, or why it was refused."""
    from bitmoe.train.pretrain import pretrain

    try:
        return pretrain(compose(arguments))
    except InputError as refused:
        return str(refused)


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record["lm_loss"] for record in map(json.loads, lines) if "lm_loss" in record]


@pytest.fixture(scope="module")
def dense(ranks, tmp_path_factory):
    """A folder with a run of 8 steps, named dense."""
    folder = tmp_path_factory.mktemp("init_from")
    assert ranks(1).run(pretrain_with, overrides(folder, "dense", "run.steps=8")) == [0]
    return folder


def convert(source: Path, folder: Path) -> None:
    weights = open_source(source)
    folder.mkdir()
    write_weight_folder(weights, folder, print, weights.tokenizer)


def test_pretrain_starts_from_weights(ranks, dense):
    """Every kind of source gives the same first loss, which is near the last of the run and far from a fresh one."""
    run, weights = dense / "runs/dense", dense / "weights"
    convert(run, weights)
    first = {}
    for name, source in {"run": run, "checkpoint": run / "checkpoints/step_00000008", "folder": weights}.items():
        started = overrides(dense, name, "run.steps=2", f"run.init_from={source}")
        assert ranks(1).run(pretrain_with, started) == [0]
        assert yaml.safe_load((dense / "runs" / name / "config.yaml").read_text())["run"]["init_from"] == str(source)
        assert "starting from the weights of" in (dense / "runs" / name / "log.txt").read_text()
        first[name] = losses(dense, name)[0]
    assert first["run"] == first["checkpoint"]
    before = losses(dense, "dense")
    assert abs(first["run"] - before[-1]) < 0.3 * (before[0] - before[-1])


def test_pretrain_upcycles_in_another_layout(ranks, dense):
    run = dense / "runs/dense"
    same = overrides(dense, "again", "run.steps=3", f"run.init_from={run}")
    assert ranks(1).run(pretrain_with, same) == [0]
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"]
    upcycled = overrides(dense, "upcycled", "run.steps=3", f"run.init_from={run}", *UPCYCLED, *layout)
    assert ranks(2).run(pretrain_with, upcycled) == [0, 0]
    assert losses(dense, "upcycled")[0] == pytest.approx(losses(dense, "again")[0], rel=1e-5)
    assert "each expert from its dense FFN" in (dense / "runs/upcycled/log.txt").read_text()


def test_pretrain_continues_without_its_source(ranks, dense):
    source = dense / "soon_gone"
    convert(dense / "runs/dense", source)
    started = overrides(dense, "continued", f"run.init_from={source}")
    assert ranks(1).run(pretrain_with, [*started, "run.steps=2"]) == [0]
    shutil.rmtree(source)
    assert ranks(1).run(pretrain_with, [*started, "run.steps=4"]) == [0]
    assert "continuing from" in (dense / "runs/continued/log.txt").read_text()
    assert len(losses(dense, "continued")) == 4


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("missing", [], "is no folder"),
        ("cache", [], "holds neither a checkpoint nor converted weights"),
        ("runs/dense", ["model.num_layers=3"], "model.num_layers is 2 there, 3 here"),
        ("runs/dense", ["model.vocab_size=300"], "model.vocab_size is 259 there, 300 here"),
    ],
    ids=["missing", "empty", "model", "vocabulary"],
)
def test_pretrain_refuses_weights(ranks, dense, source, more, message):
    refused = overrides(dense, "refused", f"run.init_from={dense / source}", *more)
    refusal = ranks(1).run(pretrain_with, refused)[0]
    assert refusal.startswith("run.init_from: ")
    assert message in refusal
    assert not (dense / "runs/refused/config.yaml").exists()


def test_find_source_passes_over_a_damaged_checkpoint(dense, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(dense / "runs/dense", run)
    whole = run / "checkpoints/step_00000008"
    damaged = run / "checkpoints/step_00000009"
    shutil.copytree(whole, damaged)
    (damaged / "manifest.json").write_text("{}")
    assert find_source(run) == whole
    assert "step_00000009" in capsys.readouterr().out
    shutil.rmtree(whole)
    with pytest.raises(InputError, match="none of the 1 checkpoints"):
        find_source(run)


def test_open_source_prefers_weights_over_their_manifest(dense, tmp_path):
    folder = tmp_path / "weights"
    convert(dense / "runs/dense", folder)
    assert isinstance(open_source(folder), WeightFolder)

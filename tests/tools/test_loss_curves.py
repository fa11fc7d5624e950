"""``tools/loss_curves``: the runs it starts, what it makes of one that fails, and what it reads off curves."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bitmoe.config.choices import BackwardFormat, WeightFormat
from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError
from bitmoe.config.validate import problems
from bitmoe.train.run_dir import RunDir, config_dict

TOOL = Path(__file__).parents[2] / "tools" / "loss_curves"
OFFSETS = {"bf16": -0.02, "a48": 0.0, "a48-8bit": 0.004, "a48-seed": 0.0}


def tool(module):
    if str(TOOL) not in sys.path:
        sys.path.insert(0, str(TOOL))
    return importlib.import_module(module)


@pytest.fixture
def main(monkeypatch):
    """The command line; its __main__ is no module that one imports by that name."""
    tool("pack")
    spec = importlib.util.spec_from_file_location("loss_curves_main", TOOL / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def overrides_of(model, variant, *overrides):
    runs = tool("curve_runs").all_runs(["dense", "moe"], overrides, 0.8)
    return next(run.overrides for run in runs if (run.model, run.variant) == (model, variant))


def synthetic(model, variant, steps=400, logged=400):
    """A run's record: a falling loss with noise of the text, which the second seed reads in another order."""
    config = compose(overrides_of(model, variant, f"run.steps={steps}"))
    config.model.vocab_size = 259
    # Bytes of one text in one order, but for the second seed.
    text = np.random.default_rng(1 if variant == "a48-seed" else 0)
    own = np.random.default_rng(len(variant))
    step_N = np.arange(1, logged + 1)
    loss_N = 1.2 + 4.3 * np.exp(-step_N / 40) - 0.3 * step_N / steps + OFFSETS[variant] * step_N / steps
    loss_N += text.normal(0, 0.05, len(step_N)) + own.normal(0, 0.003, len(step_N))
    records = [
        {"step": step, "tokens": step * 12288, "lm_loss": loss, "tokens_per_s": 1e5, "peak_bytes": 2**30}
        for step, loss in zip(step_N.tolist(), loss_N.tolist(), strict=True)
    ]
    for step in range(80, logged + 1, 80):
        records.append({"step": step, "tokens": step * 12288, "val_loss": 1.3 + OFFSETS[variant] * step / steps})
    machine = {"gpu": "GPU", "torch": "2.11", "triton": "3.6", "megatron-core": "0.19.2", "commit": "abc"}
    done = logged == steps
    curve = tool("pack").Curve
    return curve(model, variant, [], done, 60.0 if done else None, machine, config_dict(config), records, ["last line"])


def curves_of(*models, **sizes):
    return [synthetic(model, variant, **sizes) for model in models for variant in OFFSETS]


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize(
    ("variant", "weights", "backward", "seed"),
    [
        ("bf16", "none", "bf16", 1234),
        ("a48", "ternary", "bf16", 1234),
        ("a48-8bit", "ternary", "8bit", 1234),
        ("a48-seed", "ternary", "bf16", 4321),
    ],
)
def test_runs_differ_in_what_is_compared_alone(model, variant, weights, backward, seed):
    # The variant wins over what the user asks for all runs.
    config = compose(overrides_of(model, variant, "run.seed=1234", "optim.lr=7e-4"))
    assert problems(config, 1) == []
    assert config.quant.weights is WeightFormat(weights)
    assert config.quant.backward is BackwardFormat(backward)
    assert (config.run.seed, config.optim.lr, config.run.name) == (seed, 7e-4, f"curves_{model}")
    assert [stage.start for stage in config.quant.stages] == [0.0, 0.8][: 1 + (weights == "ternary")]
    base = compose(overrides_of(model, "a48", "run.seed=1234", "optim.lr=7e-4"))
    base.quant, base.run.seed = config.quant, config.run.seed
    assert base == config


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_models_are_large_and_aligned(model):
    curve = synthetic(model, "a48", logged=1)
    total, active = tool("curves").parameter_counts(curve)
    assert total >= 100e6
    assert (active < total) == (model == "moe")
    config = compose([f"experiment=curves_{model}"])
    assert config.quant.groups == 1
    assert config.model.hidden_size // config.model.num_attention_heads in (64, 128)
    widths = [config.model.hidden_size, config.model.ffn_hidden_size, *[config.moe.ffn_hidden_size] * (model == "moe")]
    assert all(width % 128 == 0 for width in widths)


def test_each_pair_of_jobs_is_a_comparison():
    runs = tool("curve_runs").all_runs(["dense", "moe"], [], 0.8)
    assert [run.name for run in runs[:4]] == ["dense-bf16", "moe-bf16", "dense-a48", "moe-a48"]
    assert len({run.name for run in runs}) == 8


def test_runs_that_were_chosen(main, tmp_path, monkeypatch):
    began = []

    def stop(runs):
        began.extend(runs)
        raise InputError("far enough")

    monkeypatch.setitem(main.__globals__, "_prepare_text", stop)
    chosen = ["--only", "dense", "--variants", "a48-8bit,a48"]
    assert main(["run", "--out", str(tmp_path), *chosen, "run.seed=777"]) == 2
    assert [run.name for run in began] == ["dense-a48", "dense-a48-8bit"]
    assert {compose(run.overrides).run.seed for run in began} == {777}


@pytest.mark.parametrize(("option", "name"), [("--only", "large"), ("--variants", "fp16")])
def test_unknown_names(main, option, name, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--out", "nowhere", option, name])
    assert f"'{name}' is none of " in capsys.readouterr().err


def fake_trainings(folder, script, **options):
    """Trainings whose processes are a script that gets the run's name and its directory."""
    jobs = tool("jobs")

    class Fake(jobs.Trainings):
        def command(self, run):
            return [sys.executable, "-c", script, run.name, str(folder / run.name)]

    return Fake(folder, **{"jobs": 2, "gpus": [], **options})


RUN = """
import json, os, sys, pathlib
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
(folder / "checkpoints").mkdir(exist_ok=True)
record = {"step": 3, "lm_loss": 2.5, "tokens_per_s": 1000, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
(folder / "metrics.jsonl").write_text(json.dumps(record) + "\\n")
if "8bit" in name:
    print("what went wrong")
    sys.exit(1)
"""


def test_a_failure_is_reported_and_the_others_go_on(tmp_path, capsys):
    runs = tool("curve_runs").all_runs(["dense"], [], 0.8)
    pack = tmp_path / "pack" / "curves.jsonl"
    news = lambda: tool("pack").write_pack(pack, tmp_path, runs)  # noqa: E731
    assert fake_trainings(tmp_path, RUN).run(runs, news) == ["dense-a48-8bit"]
    shown = capsys.readouterr().out
    assert "dense-a48-8bit   step     3  loss 2.500  1,000 tokens/s: FAILED with status 1" in shown
    assert "    what went wrong" in shown
    assert shown.count("done in") == 3
    curves = {curve.variant: curve for curve in tool("pack").read_pack(pack)}
    assert not curves["a48-8bit"].is_finished
    assert curves["a48-8bit"].log == ["what went wrong"]
    assert curves["a48"].is_finished
    assert curves["a48"].records == [{"step": 3, "lm_loss": 2.5, "tokens_per_s": 1000}]
    assert curves["a48"].machine.keys() >= {"gpu", "torch", "commit"}
    # Checkpoints go when a run has finished, and only then.
    assert [(tmp_path / run.name / "checkpoints").exists() for run in runs] == [False, False, True, False]


def test_finished_runs_are_not_run_again(tmp_path, capsys):
    runs = tool("curve_runs").all_runs(["dense"], [], 0.8)
    fake_trainings(tmp_path, RUN).run(runs, lambda: None)
    capsys.readouterr()
    assert fake_trainings(tmp_path, "print('this time well')").run(runs, lambda: None) == []
    shown = capsys.readouterr().out
    assert shown.count("finished before") == 3
    assert shown.count("started") == 1
    others = tool("curve_runs").all_runs(["dense"], ["optim.lr=1e-4"], 0.8)
    with pytest.raises(InputError, match=r"optim.lr=1e-4(.|\n)*another --out"):
        fake_trainings(tmp_path, RUN).run(others, lambda: None)


def test_jobs_take_the_gpus_in_turn(tmp_path):
    runs = tool("curve_runs").all_runs(["dense", "moe"], [], 0.8)
    fake_trainings(tmp_path, RUN, jobs=4, gpus=["2", "5"]).run(runs, lambda: None)
    records = [json.loads((tmp_path / run.name / "metrics.jsonl").read_text()) for run in runs]
    assert [record["gpu"] for record in records[:4]] == ["2", "5", "2", "5"]


@pytest.mark.parametrize(("visible", "gpus"), [("3", []), ("", []), ("1, 0", ["1", "0"]), ("a,b,c", ["a", "b", "c"])])
def test_visible_gpus(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert tool("jobs").visible_gpus() == gpus


def test_command(tmp_path):
    trainings = tool("jobs").Trainings(tmp_path, 2, [])
    run = tool("curve_runs").all_runs(["moe"], ["run.steps=7"], 0.8)[2]
    assert trainings.command(run)[1:] == [
        *("-m", "bitmoe", "pretrain", "experiment=curves_moe", "run.steps=7", "quant=a48", "quant.backward=8bit"),
        *("quant.stages.1.start=0.8", f"run.dir={tmp_path}", "run.name=moe-a48-8bit"),
    ]


def test_comparison():
    base, ours = tool("curves").comparisons(curves_of("dense"))["dense"][1:3]
    assert base.last_difference is base.largest_difference is None
    # 0.004 * step / 400, over the last 200 steps and at the end.
    assert ours.last_difference == pytest.approx(0.003, abs=5e-4)
    assert ours.largest_difference == pytest.approx(0.004, abs=1.5e-3)
    assert ours.held_out_difference.values_N == pytest.approx(0.004 * np.arange(80, 401, 80) / 400)
    assert ours.last_loss - ours.last_difference == pytest.approx(base.last_loss)


def test_difference_at_common_steps_of_runs_of_unequal_length():
    curves = [synthetic("dense", "a48", logged=100), synthetic("dense", "a48-8bit", logged=250)]
    ours = tool("curves").comparisons(curves)["dense"][1]
    assert ours.training_difference.steps_N.tolist() == list(range(1, 101))


def test_table():
    curves = [*curves_of("dense"), synthetic("moe", "a48", logged=50)]
    text = tool("summary").table(curves)
    assert "dense, 113.8M parameters; nats per token" in text
    assert "mixture of experts, 170.5M parameters, 57.2M active" in text
    assert "to step 50 of 400" in text
    verdict, seeds = [line for line in text.splitlines() if line.startswith(("the two backwards", "two seeds"))]
    assert verdict.endswith("0.0040 on held-out text at the end: within 0.01")
    assert seeds.endswith("0.0000 on held-out text at the end")
    assert tool("summary").table([]) == "no run has a loss yet"


def test_plot_from_a_record(main, tmp_path, capsys):
    record = tmp_path / "curves.jsonl"
    curves = curves_of("dense", "moe")
    record.write_text("".join(json.dumps(vars(curve)) + "\n" for curve in curves))
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "docs" / "loss-curves")]) == 0
    assert (tmp_path / "docs" / "loss-curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "docs" / "loss-curves.jsonl").read_text().splitlines()]
    assert [row["run"] for row in rows[:4]] == ["dense-bf16", "dense-a48", "dense-a48-8bit", "dense-a48-seed"]
    assert len(rows) == 8
    row = rows[2]
    assert (row["steps"], row["tokens"], row["parameters"], row["commit"]) == (400, 400 * 12288, 113_803_008, "abc")
    assert row["config"]["quant.backward"] == "8bit"
    assert len(row["smoothed"]) <= 100
    assert row["smoothed"][-1][0] == 400
    assert "a4.8, 8-bit backward" in capsys.readouterr().out


def of_seed(seed, difference):
    """The record of a seed: the second run is the first, changed by a constant."""
    base, other = synthetic("dense", "a48"), synthetic("dense", "a48-8bit")
    other.records = [
        {**record, **{key: record[key] + difference for key in ("lm_loss", "val_loss") if key in record}}
        for record in base.records
    ]
    for curve in (base, other):
        curve.config["run"]["seed"] = seed
    return [base, other]


def test_seeds(main, tmp_path, capsys):
    sources = []
    for seed, difference in ((9, 0.03), (5, -0.06)):
        sources.append(tmp_path / f"{seed}.jsonl")
        sources[-1].write_text("".join(json.dumps(vars(curve)) + "\n" for curve in of_seed(seed, difference)))
    assert main(["seeds", *map(str, sources), "--out", str(tmp_path / "seeds")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[-3:]] == ["5", "9", "mean"]
    assert [line.count("(-0.0600)") for line in said[-3:]] == [2, 0, 0]
    assert said[-1].count("(-0.0150)") == 2
    lines = [json.loads(line) for line in (tmp_path / "seeds.jsonl").read_text().splitlines()]
    assert [(line["config"]["run.seed"], line["difference"]) for line in lines] == [
        (9, None), (9, 0.03), (5, None), (5, -0.06),
    ]  # fmt: skip
    assert (tmp_path / "seeds.png").stat().st_size > 10_000


def test_seeds_that_end_at_different_steps():
    line = tool("curves").Line
    found = tool("seeds").mean([line(np.array([1, 2, 4]), np.array([1.0, 2, 3])), line(np.array([2, 4]), np.ones(2))])
    assert (found.steps_N.tolist(), found.values_N.tolist()) == ([2, 4], [1.5, 2.0])


def test_seeds_need_both_backwards():
    with pytest.raises(InputError, match="a48-8bit"):
        tool("seeds").pairs_of([[synthetic("dense", "a48")]])


def test_figure_of_what_there_is():
    figure = tool("figure").draw([synthetic("moe", "bf16", logged=60), synthetic("moe", "a48-8bit", logged=30)])
    top, bottom = figure.axes
    assert "mixture of experts" in top.get_title(loc="left")
    assert top.get_xlim()[1] == pytest.approx(60.6)
    with pytest.raises(InputError, match="no run has a loss"):
        tool("figure").draw([])


def test_labels_make_room():
    apart = tool("figure")._apart([0.1, 0.5, 0.51, 0.52, 0.9], 0.1)
    assert apart == pytest.approx([0.1, 0.41, 0.51, 0.61, 0.9])
    assert tool("figure")._apart([0.0, 0.1, 0.12], 0.1) == pytest.approx([-0.02667, 0.07333, 0.17333], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plot", "nowhere", "--out", "x"], "there is no record of runs at nowhere"),
        (["run", "--out", "nowhere", "optim.rate=3"], "optim.rate"),
        (["run", "--out", "nowhere", "run.micro_batch_size=5"], "run.global_batch_size"),
    ],
)
def test_bad_input(main, arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_a_finished_directory_says_with_what(tmp_path):
    (run,) = [run for run in tool("curve_runs").all_runs(["dense"], [], 0.95) if run.variant == "a48"]
    fake_trainings(tmp_path, RUN).run([run], lambda: None)
    mark = json.loads((RunDir(tmp_path / run.name).path / "curve.json").read_text())
    assert mark["overrides"] == ["experiment=curves_dense", "quant=a48", "quant.stages.1.start=0.95"]
    assert mark["wall_s"] > 0


WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[2] + "/started", "w").close()
time.sleep(60)
"""


def test_an_interrupted_tool_ends_its_runs_and_records_them(tmp_path, monkeypatch):
    runs = tool("curve_runs").all_runs(["dense"], [], 0.8)[:2]
    trainings, news = fake_trainings(tmp_path, WAITS), []

    def interrupt_when_started(_):
        if all((tmp_path / run.name / "started").exists() for run in runs):
            raise KeyboardInterrupt

    monkeypatch.setattr(tool("jobs").time, "sleep", interrupt_when_started)
    processes = trainings._running
    with pytest.raises(KeyboardInterrupt):
        trainings.run(runs, lambda: news.append(dict(processes)))
    assert news == [{}]
    assert tool("jobs").read_mark(tmp_path / runs[0].name)["wall_s"] is None

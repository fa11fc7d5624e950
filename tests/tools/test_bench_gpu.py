"""``tools/bench_gpu.py``: one file of results, one table, and a refusal that stops everything."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
TOOL = TOOLS / "bench_gpu.py"


@pytest.fixture
def bench_gpu(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("bench_gpu")


def script(folder, name, text):
    path = folder / f"{name}.py"
    path.write_text(text)
    return [str(path)]


LINE = {
    "bench": "linears",
    "shape": "small",
    "results": [
        {"name": "cuBLAS", "kind": "bf16", "ms": 3.0},
        {"name": "8-bit", "kind": "ours", "ms": 2.0},
    ],
}
GOOD = f"print('a table')\nprint(12)\nprint({json.dumps(json.dumps(LINE))})"


def test_lines_of_a_benchmark(bench_gpu, tmp_path, capsys):
    status, lines = bench_gpu.run("one", script(tmp_path, "one", GOOD))
    assert (status, [json.loads(line) for line in lines]) == (0, [LINE])
    shown = capsys.readouterr().out
    assert "a table\n12\n" in shown
    assert "cuBLAS" not in shown
    assert shown.splitlines()[0].startswith("== one: ")
    assert shown.splitlines()[-1].startswith("-- one: ")


def test_a_failure_leaves_the_others_alone(bench_gpu, tmp_path, monkeypatch, capsys):
    scripts = {"bad": script(tmp_path, "bad", "raise ValueError"), "good": script(tmp_path, "good", GOOD)}
    monkeypatch.setattr(bench_gpu, "BENCHMARKS", scripts)
    assert bench_gpu.run_all(["bad", "good"], tmp_path / "deep" / "out.jsonl") == 1
    shown = capsys.readouterr()
    assert "1.50" in shown.out
    assert "failed, or lost a part: bad\n" in shown.err
    assert json.loads((tmp_path / "deep" / "out.jsonl").read_text()) == LINE


def test_a_refusal_stops(bench_gpu, tmp_path, monkeypatch, capsys):
    refusal = "from bench.harness import require\nrequire(False, 'the product is not exact')"
    scripts = {name: script(tmp_path, name, text) for name, text in (("good", GOOD), ("wrong", refusal))}
    monkeypatch.setattr(bench_gpu, "BENCHMARKS", scripts)
    monkeypatch.setenv("PYTHONPATH", str(TOOLS.parent / "kernels"))
    (tmp_path / "out.jsonl").write_text("of a former run")
    assert bench_gpu.run_all(["good", "wrong", "good"], tmp_path / "out.jsonl") == bench_gpu.REFUSED
    shown = capsys.readouterr()
    assert "refused: the product is not exact" in shown.out
    assert shown.out.count("== good") == 1
    assert "1.50" not in shown.out
    assert "wrong refused" in shown.err
    assert [path.read_text() for path in tmp_path.glob("out*")] == ["of a former run"]


REHEARSED = """
import os, pathlib, sys, time
is_rehearsal = os.environ.get("BENCH_REHEARSAL") == "1"
print("not shown" if is_rehearsal else "measured with " + os.environ["TRITON_CACHE_DIR"])
if is_rehearsal:
    folder = pathlib.Path(__file__).parent
    (folder / "-".join(["began", *sys.argv[1:]])).write_text(os.environ["TRITON_CACHE_DIR"])
    end = time.monotonic() + 20
    while len(list(folder.glob("began*"))) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    sys.exit(len(list(folder.glob("began*"))))
"""


def test_all_compile_at_once_before_one_is_measured(bench_gpu, tmp_path, monkeypatch, capsys):
    command = script(tmp_path, "one", REHEARSED)
    monkeypatch.setattr(bench_gpu, "BENCHMARKS", {"one": command, "two": command})
    monkeypatch.setattr(bench_gpu, "REHEARSALS", {"two": [["a"], ["b"]]})
    assert bench_gpu.run_all(["one", "two"], tmp_path / "out.jsonl") == 0
    shown = capsys.readouterr().out
    assert "not shown" not in shown
    assert [line.split(":")[0].strip() for line in shown.splitlines()[1:4]] == ["one", "two", "two"]
    assert all(line.endswith("status 3") for line in shown.splitlines()[1:4])
    caches = {path.read_text() for path in tmp_path.glob("began*")}
    assert [f"measured with {cache}" for cache in caches] * 2 == [
        line for line in shown.splitlines() if "measu" in line
    ]


def test_the_users_cache_is_taken(bench_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")
    bench_gpu.run("one", script(tmp_path, "one", "import os; print(os.environ['TRITON_CACHE_DIR'])"))
    assert "\nsomewhere\n" in capsys.readouterr().out


def test_benchmarks_exist(bench_gpu):
    for script_path, *_ in bench_gpu.BENCHMARKS.values():
        assert (bench_gpu.ROOT / script_path).exists()
    assert bench_gpu.REHEARSALS.keys() <= bench_gpu.BENCHMARKS.keys()


@pytest.mark.parametrize("arguments", [["--only", "linear"], *([] if torch.cuda.is_available() else [[]])])
def test_refuses(arguments):
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no benchmark is called linear" in done.stderr or "no CUDA device" in done.stderr

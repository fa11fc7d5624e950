"""``tools/bench_gpu.py``: one file of results, and a benchmark that fails stops it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "bench_gpu.py"


@pytest.fixture
def bench_gpu():
    spec = importlib.util.spec_from_file_location("bench_gpu", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(folder, text):
    path = folder / "bench.py"
    path.write_text(text)
    return [str(path)]


def test_lines_of_a_benchmark(bench_gpu, tmp_path, capsys):
    lines = bench_gpu.run("one", script(tmp_path, """print("a table\\n12\\n" '{"bench": "one"}')"""))
    assert lines == ['{"bench": "one"}\n']
    shown = capsys.readouterr().out
    assert "a table\n12\n" in shown
    assert "bench" in shown.splitlines()[0]


def test_a_failure_stops(bench_gpu, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.run("one", script(tmp_path, "raise SystemExit(3)"))
    assert stopped.value.code == 3
    assert "one failed with status 3" in capsys.readouterr().err


def test_benchmarks_exist(bench_gpu):
    for script_path, *_ in bench_gpu.BENCHMARKS.values():
        assert (bench_gpu.ROOT / script_path).exists()


@pytest.mark.parametrize("arguments", [["--only", "linear"], *([] if torch.cuda.is_available() else [[]])])
def test_refuses(arguments):
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no benchmark is called linear" in done.stderr or "no CUDA device" in done.stderr

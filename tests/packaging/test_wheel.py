"""The wheel holds what a checkout holds, and runs without one."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of what a clone has, with the setuptools of this interpreter."""
    source = tmp_path_factory.mktemp("source")
    for name in ("bitmoe", "kernels", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("bitmoe-*.whl")
    return built


@pytest.fixture(scope="module")
def clean_venv(wheel, tmp_path_factory):
    """A venv with the wheel in it that sees the libraries of this interpreter, and not the checkout."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    # The .pth files of a directory added by a .pth file are ignored: an editable bitmoe does not come along.
    site_packages = next(venv.glob("lib/python*/site-packages"))
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return venv


def pip(*args):
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *args], check=True)


def run(command, cwd):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_wheel_holds_code_and_conf(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder, packed_as in (
        ("bitmoe", "bitmoe"),
        ("kernels/bitmoe_kernels", "bitmoe_kernels"),
        ("conf", "bitmoe/conf"),
    ):
        suffixes = {".yaml"} if folder == "conf" else {".py"}
        files = [file for file in (ROOT / folder).rglob("*") if file.suffix in suffixes]
        assert files
        missing = {f"{packed_as}/{file.relative_to(ROOT / folder)}" for file in files} - packed
        assert not missing
    assert not [name for name in packed if name.startswith(("tests", "kernels", "conf", "tools"))]


def test_wheel_is_what_the_venv_runs(clean_venv, tmp_path):
    code = "import bitmoe, bitmoe_kernels; print(bitmoe.__file__, bitmoe_kernels.__file__, sep='\\n')"
    done = run([clean_venv / "bin" / "python", "-c", code], tmp_path)
    assert [Path(line).is_relative_to(clean_venv) for line in done.stdout.splitlines()] == [True, True], done.stderr


def test_plan_runs_from_another_directory(clean_venv, tmp_path):
    done = run([clean_venv / "bin" / "bitmoe", "plan"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    assert list(tmp_path.iterdir()) == []

"""The doctor: this machine as it is, and environments that lack something."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bitmoe.train import doctor as doctor_module
from bitmoe.train.doctor import (
    Finding,
    check_disk,
    check_megatron,
    check_optional,
    check_packages,
    check_python,
    check_torch,
    doctor,
)


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """An empty folder in front of the import path, to install pretended packages in."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(site_packages, name: str, version: str) -> None:
    info = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def run_doctor(runs) -> tuple[int, str]:
    out = io.StringIO()
    return doctor(str(runs), Console(file=out, width=120)), out.getvalue()


def test_doctor_finds_this_environment_ready(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_module, "_requirements", lambda: ["torch>=2", "rich"])
    status, text = run_doctor(tmp_path / "runs")
    assert status == 0
    assert "ready: nothing needed is missing" in text
    assert torch.__version__ in text
    for name in ("Python", "megatron-core", "devices", "cores", "triton", "transformer_engine", "GiB free"):
        assert name in text
    assert not (tmp_path / "runs").exists()


def test_doctor_exits_2_and_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_module, "_requirements", lambda: ["torch>=2", "bitmoe-no-such-package>=3"])
    status, text = run_doctor(tmp_path)
    assert status == 2
    assert "broken: pip install 'bitmoe-no-such-package>=3'" in text
    assert "ready" not in text


@pytest.mark.parametrize(("python", "broken"), [((3, 10), True), ((3, 11), False), ((3, 13), False)])
def test_check_python(python, broken):
    assert check_python(python).broken is broken


@pytest.mark.parametrize(
    ("python", "version", "supported"),
    [
        ((3, 11), "0.16.1", True),
        ((3, 11), "0.16.0", False),
        ((3, 11), "0.19.2", False),
        ((3, 12), "0.19.2", True),
        ((3, 13), "0.19.7", True),
        ((3, 12), "0.16.1", False),
        ((3, 12), "0.190.0", False),
    ],
)
def test_check_megatron(site_packages, python, version, supported):
    install(site_packages, "megatron-core", version)
    finding = check_megatron(python)
    assert version in finding.found
    assert ("(supported)" in finding.found) is supported
    assert bool(finding.problem) is not supported
    assert not finding.broken


def test_check_megatron_missing(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    finding = check_megatron((3, 12))
    assert finding.broken
    assert finding.problem == "pip install megatron-core==0.19.2"


def test_check_torch_that_cannot_be_imported(site_packages, monkeypatch):
    (site_packages / "torch.py").write_text("raise OSError('libtorch.so: undefined symbol')")
    monkeypatch.delitem(sys.modules, "torch")
    (finding,) = check_torch()
    assert finding.broken
    assert "undefined symbol" in finding.problem


@pytest.mark.parametrize(
    ("capabilities", "is_old"), [([(9, 0)], False), ([(10, 0), (9, 0)], False), ([(9, 0), (8, 6)], True)]
)
def test_gpus_that_ternary_products_do_not_run_on_are_told(capabilities, is_old):
    """Two GPUs that are not here."""
    gpus = [SimpleNamespace(name="GPU", total_memory=2**36, major=major, minor=minor) for major, minor in capabilities]
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: len(gpus), get_device_properties=gpus.__getitem__
    )
    devices = doctor_module._devices(SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0")))
    assert devices.found == f"{len(gpus)} x GPU, 64 GiB (CUDA 13.0)"
    assert ("compute capability 8.6" in devices.problem) is is_old
    assert not devices.broken


def test_check_torch_names_devices():
    torch_row, devices = check_torch()
    assert torch_row == Finding("torch", torch.__version__)
    assert ("CPU (gloo)" in devices.found) is not torch.cuda.is_available()


def test_check_packages_versions_extras_and_missing(site_packages):
    install(site_packages, "aaa", "1.5")
    install(site_packages, "bbb", "1.5")
    met = ["aaa>=1.5", "bbb", "nothing-like-it; extra == 'gpu'", "nothing-like-it; python_version < '3'"]
    assert check_packages(met) == Finding("packages", "all 2 requirements are met")
    finding = check_packages(["aaa>=2", "bbb<2", "nothing-like-it"])
    assert finding.broken
    assert finding.found == "aaa 1.5, nothing-like-it missing"
    assert finding.problem == "pip install 'aaa>=2' 'nothing-like-it'"


def test_check_packages_of_a_bare_checkout_is_a_note():
    finding = check_packages(None)
    assert finding.problem
    assert not finding.broken


def test_check_optional_missing_is_no_problem():
    finding = check_optional("no_such_accelerator", "speed")
    assert finding == Finding("no_such_accelerator", "missing: nothing needs it (speed)")


def test_check_optional_recognises_the_wrong_apex(site_packages):
    # Neither is imported: both would raise.
    package = site_packages / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    install(site_packages, "apex", "0.9.10")
    wrong = check_optional("apex", "fused Adam")
    assert "pip uninstall apex" in wrong.problem
    assert not wrong.broken
    (package / "optimizers").mkdir()
    assert check_optional("apex", "fused Adam") == Finding("apex", "0.9.10 (fused Adam)")


def test_check_disk(tmp_path, monkeypatch):
    assert not check_disk(tmp_path / "runs").problem
    (tmp_path / "file").write_text("")
    assert check_disk(tmp_path / "file/runs").broken
    monkeypatch.setattr(doctor_module, "_MIN_FREE_BYTES", 2**60)
    finding = check_disk(tmp_path)
    assert "little space" in finding.problem
    assert not finding.broken

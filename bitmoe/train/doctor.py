"""``bitmoe doctor``: is this machine ready, and if not, what to do.

One table of what was found, then one line a problem with its fix. Nothing but torch is imported: whether a
package is there is read from its metadata, which is fast and cannot crash. Whatever a run cannot do without
makes the exit status 2; the rest is a note.
"""

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

OPTIONAL = {
    "triton": "low-bit kernels on GPUs",
    "transformer_engine": "fused Adam",
    "apex": "fused Adam and gradients",
    "flash_attn": "fused attention",
}
"""Accelerators by import name, with what they are used for."""

_MIN_FREE_BYTES = 2 * 2**30
_MIN_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Finding:
    """One row of the table and, if something is wrong, one line below it."""

    name: str
    """What was looked at."""
    found: str
    """What was found."""
    problem: str = ""
    """What is wrong and how to fix it; empty if nothing is."""
    broken: bool = False
    """No run works with this problem."""


def doctor(runs: str = "runs", console: Console | None = None) -> int:
    """Print the state of the machine.

    Args:
        runs: folder of all runs, whose free space is shown.
        console: where to print; None means standard output.

    Returns:
        0, or 2 if something needed is missing or broken.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    findings = [check_python(sys.version_info[:2]), *check_torch(), check_megatron(sys.version_info[:2])]
    findings += [check_packages(_requirements()), check_machine()]
    findings += [check_optional(name, use) for name, use in OPTIONAL.items()]
    findings.append(check_disk(Path(runs)))

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in findings:
        mark, style = ("", "") if not finding.problem else ("broken", "red") if finding.broken else ("note", "yellow")
        table.add_row(finding.name, finding.found, mark, style=style)
    console.print(table)
    for finding in findings:
        if finding.problem:
            console.print(f"{'broken' if finding.broken else 'note'}: {finding.problem}")
    if any(finding.broken for finding in findings):
        return 2
    console.print("ready: nothing needed is missing")
    return 0


def check_python(python: tuple[int, int]) -> Finding:
    """The interpreter: 3.11 or newer."""
    found = f"{platform.python_version()} ({sys.executable})"
    if python < (3, 11):
        return Finding("Python", found, "bitmoe needs Python 3.11 or newer: make the environment with one", True)
    return Finding("Python", found)


def check_torch() -> list[Finding]:
    """torch, and the devices it runs on. Imports torch: only that shows that it works."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        fix = f"torch cannot be imported ({error}): reinstall it, pip install --force-reinstall torch"
        return [Finding("torch", _version("torch") or "missing", fix, True)]
    distributed = torch.distributed
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if distributed.is_available() and distributed.is_backend_available(backend):
        return [Finding("torch", torch.__version__), _devices(torch)]
    problem = f"this torch was built without {backend}: install an official build"
    return [Finding("torch", torch.__version__, problem, True), _devices(torch)]


def _devices(torch) -> Finding:
    """The GPUs that torch sees, else the CPU."""
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = sorted({f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices})
        found = f"{len(devices)} x {' / '.join(kinds)} (CUDA {torch.version.cuda})"
        return Finding("devices", found, _too_old([(device.major, device.minor) for device in devices]))
    if not Path("/proc/driver/nvidia/version").exists():
        return Finding("devices", "CPU (gloo)")
    problem = (
        f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU, so runs use the CPU: "
        "install a CUDA build of torch that fits the driver, or check CUDA_VISIBLE_DEVICES"
    )
    return Finding("devices", "CPU (gloo)", problem)


def _too_old(capabilities: list[tuple[int, int]]) -> str:
    """What is wrong with GPUs of these compute capabilities; nothing from Hopper on."""
    oldest = min(capabilities)
    if oldest >= _MIN_CAPABILITY:
        return ""
    return (
        f"compute capability {oldest[0]}.{oldest[1]}: the 8-bit products of ternary training are written for "
        f"{_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]} (Hopper) or newer: use such a GPU, or hide this one "
        "(CUDA_VISIBLE_DEVICES=) and train on CPU"
    )


def check_megatron(python: tuple[int, int]) -> Finding:
    """megatron-core: 0.16.1 on Python 3.11, 0.19 from Python 3.12 on."""
    wanted = "0.16.1" if python < (3, 12) else "0.19.2"
    found = _version("megatron-core")
    if found is None:
        return Finding("megatron-core", "missing", f"pip install megatron-core=={wanted}", True)
    # The 0.16 line is supported in one version, of 0.19 every patch release.
    if found == wanted or (python >= (3, 12) and found.startswith("0.19.")):
        return Finding("megatron-core", f"{found} (supported)")
    problem = f"megatron-core {found} is not tested with this Python: pip install megatron-core=={wanted}"
    return Finding("megatron-core", f"{found} (not tested)", problem)


def check_packages(requirements: list[str] | None) -> Finding:
    """What bitmoe declares as its requirements; None if it is not installed, as in a bare checkout."""
    if requirements is None:
        return Finding("packages", "not checked", "bitmoe is not installed in this environment: pip install -e .")
    needed = [Requirement(text) for text in requirements]
    # An extra's requirement is optional: its marker is false without the extra.
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    bad = [one for one in needed if not _met(one)]
    if bad:
        found = ", ".join(f"{one.name} {_version(one.name) or 'missing'}" for one in bad)
        return Finding(
            "packages", found, "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one in bad), True
        )
    return Finding("packages", f"all {len(needed)} requirements are met")


def check_machine() -> Finding:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return Finding("machine", f"{cores} cores, {memory / 2**30:.1f} GiB memory, {platform.system()}")


def check_optional(name: str, used_for: str) -> Finding:
    """An optional accelerator, by import name. Nothing needs it."""
    spec = find_spec(name)
    if spec is None:
        return Finding(name, f"missing: nothing needs it ({used_for})")
    found = f"{_version(name) or 'installed'} ({used_for})"
    if name == "apex" and not _is_nvidia_apex(spec.submodule_search_locations or []):
        problem = (
            "the package named apex on PyPI is another project, which megatron-core takes for NVIDIA's: "
            "pip uninstall apex; NVIDIA's is built from its repository"
        )
        return Finding(name, "another project of that name", problem)
    return Finding(name, found)


def check_disk(runs: Path) -> Finding:
    """Free space where runs are written, and whether it can be written at all."""
    existing = runs.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    found = f"{free / 2**30:.1f} GiB free for {runs}"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Finding("disk", found, f"{existing} is not a writable folder: choose another with run.dir", True)
    if free < _MIN_FREE_BYTES:
        return Finding("disk", found, "little space for checkpoints: free some or choose another place with run.dir")
    return Finding("disk", found)


def _is_nvidia_apex(locations) -> bool:
    """NVIDIA's apex has an optimizers package; the check does not import what may be the wrong one."""
    return any((Path(location) / "optimizers").is_dir() for location in locations)


def _met(requirement: Requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _requirements() -> list[str] | None:
    try:
        return requires("bitmoe") or []
    except PackageNotFoundError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None

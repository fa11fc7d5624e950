"""The directory of a run: where everything lies, who owns it, and which config made it.

``runs/<name>/`` holds ``config.yaml``, ``metrics.jsonl``, ``log.txt``, ``loss.png``, ``tensorboard/`` and
``checkpoints/``. Rank 0 alone creates and locks it. The lock is an ``flock``: the kernel drops it when the
process ends, however it ends, so a killed run never leaves a stale one. Checkpoints themselves are written
elsewhere.
"""

import fcntl
import os
import shutil
import socket
import tempfile
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import IO, Any

import yaml

from bitmoe.config.choices import Resume
from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config

# Keys of these groups that change how a model is trained, not what it computes.
_TRAINING_ONLY = {
    "model.init_std",
    "moe.balancing",
    "moe.aux_loss_coeff",
    "moe.z_loss_coeff",
    "moe.expert_bias_rate",
    "moe.capacity_factor",
}
_ORDER_KEYS = ("run.seed", "run.global_batch_size", "context.seq_length", "data.weights")
_MODEL_PREFIXES = ("model.", "moe.", "tokenizer.", "quant.weights", "quant.groups")


class RunDir:
    """Paths of one run, its lock and its ``config.yaml``. Making the object touches nothing.

    Args:
        path: the run's directory, ``<run.dir>/<run.name>``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.log_file = self.path / "log.txt"
        self.plot_file = self.path / "loss.png"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def acquire(self) -> None:
        """Create the directory if need be and own it until ``release`` or the process ends. Rank 0 only.

        Raises:
            InputError: the directory cannot be created or written, or another process owns it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
            lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (held for the whole run)
        except OSError as error:
            raise InputError(
                f"run directory {self.path} is not writable ({error.strerror})",
                fix="choose another run.dir or correct its permissions",
                key="run.dir",
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise InputError(
                f"run directory {self.path} is in use by {owner}",
                fix="wait for that run, stop it, or choose another run.name",
                key="run.name",
            ) from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Let go of the lock; nothing happens when it is not held."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, config: Config) -> None:
        """Write the resolved config to ``config.yaml``, replacing an older one as a whole."""
        replace_file(self.config_file, yaml.safe_dump(config_dict(config), sort_keys=False).encode())

    def load_config(self) -> dict[str, Any] | None:
        """``config.yaml`` as nested dicts, None if there is none.

        Raises:
            InputError: the file is not a YAML mapping.
        """
        try:
            loaded = yaml.safe_load(self.config_file.read_bytes())
        except FileNotFoundError:
            return None
        except yaml.YAMLError as error:
            raise _damaged_config(self.config_file) from error
        if not isinstance(loaded, dict):
            raise _damaged_config(self.config_file)
        return loaded


def check_resume(policy: Resume, run_dir: RunDir, *, has_checkpoint: bool) -> None:
    """Refuse what ``run.resume`` forbids.

    Raises:
        InputError: ``never`` although the run has a checkpoint, or ``must`` although it has none.
    """
    if policy is Resume.never and has_checkpoint:
        raise InputError(
            f"never, but {run_dir.checkpoints} holds a checkpoint",
            fix="choose another run.name, or run.resume=auto to continue this run",
            key="run.resume",
        )
    if policy is Resume.must and not has_checkpoint:
        raise InputError(
            f"must, but {run_dir.checkpoints} holds no checkpoint",
            fix="check run.dir and run.name, or run.resume=auto to start from the beginning",
            key="run.resume",
        )


def changed_model_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys that make ``new`` another model than ``old``, so that it cannot continue its checkpoints.

    Args:
        old: config of the existing run, as ``RunDir.load_config`` returns it. A key it lacks (written before
            the key existed) counts as the schema's default.
        new: config of the run to be, as ``config_dict`` returns it.

    Returns:
        Sorted keys; empty if a checkpoint of ``old`` fits ``new``.
    """
    before = _flat(config_dict(Config())) | _flat(old)
    after = _flat(new)
    return sorted(
        key
        for key in before.keys() | after.keys()
        if key.startswith(_MODEL_PREFIXES) and key not in _TRAINING_ONLY and before.get(key) != after.get(key)
    )


def changed_order_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys that differ and decide which text a step sees; arguments as for ``changed_model_keys``."""
    before, after = _flat(old), _flat(new)
    return [key for key in _ORDER_KEYS if before.get(key) != after.get(key)]


def config_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts and lists of plain values, enums by their value."""
    return _by_value(asdict(config))


def require_space(path: Path, needed_bytes: int, what: str = "this run", key: str = "run.dir") -> None:
    """Check the free space of the file system that holds ``path`` (which need not exist yet).

    Raises:
        InputError: less than ``needed_bytes`` are free.
    """
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise InputError(
            f"{what} needs {needed_bytes / 2**30:.2f} GiB, but {existing} has {free / 2**30:.2f} GiB free",
            fix="free some space or choose another place",
            key=key,
        )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader, at any moment and after any crash, finds the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _by_value(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _by_value(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_by_value(value) for value in tree]
    return tree.value if isinstance(tree, Enum) else tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _damaged_config(path: Path) -> InputError:
    return InputError(f"{path} is not a config of a run", fix="restore it, or choose another run.name", key="run.name")

"""Ranks for tests: processes joined by gloo on CPU, started once a world size and used by every test after.

Starting ranks costs seconds (each imports torch and megatron), a call on running ones milliseconds:

    with RankPool(2) as ranks:
        losses = ranks.run(first_loss, config)      # one result a rank, in rank order

The function runs on every rank, with the default process group already there. It may stand in a test file:
pytest imports those under names nothing else can import, so a rank loads the file itself, under that name.

From call to call the ranks keep what they imported and no process group: every call finds a new default group
and makes the others it needs. A call that fails or hangs ends its pool, and the next call starts a clean one.
GPUs are hidden: these are CPU ranks.
"""

import atexit
import faulthandler
import gc
import importlib.util
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from bitmoe.train.imports import imports

START_TIMEOUT_S = 300.0


class RankError(RuntimeError):
    """A call failed on some ranks.

    Attributes:
        ranks: the ranks that raised, died or did not answer, the first to fail first.
    """

    def __init__(self, failures: dict[int, str]):
        self.ranks = list(failures)
        super().__init__("\n".join(f"rank {rank} {what}" for rank, what in failures.items()))


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    error: str = ""


class RankPool:
    """Processes that form one gloo world and run functions on demand.

    Args:
        world_size: number of ranks.
        grace_s: how long the others may still run once a rank has failed (they may wait for it for ever).
    """

    def __init__(self, world_size: int, grace_s: float = 30.0):
        self.world_size = world_size
        self.grace_s = grace_s
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._scratch: tempfile.TemporaryDirectory | None = None
        # multiprocessing joins its children at exit, and these leave only when told.
        atexit.register(self.close)

    def run(self, fn: Callable, *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """Run ``fn(*args)`` on every rank.

        Args:
            fn: a module-level function, of an importable module or of a test file.
            args: picklable; every rank gets a copy, tensors included.
            timeout_s: after this the ranks that have not answered are killed.

        Returns:
            The results in rank order: copies, tensors included.

        Raises:
            RankError: a rank raised (with its traceback), died, or did not answer in time (with its stacks).
        """
        try:
            if not self._processes:
                self._start()
            module = sys.modules[fn.__module__]
            for connection in self._connections:
                # A rank that died while idle shows when its answer is read.
                with suppress(BrokenPipeError):
                    _send(connection, (module.__name__, getattr(module, "__file__", ""), fn.__name__))
                    _send(connection, args)
            results = self._collect(timeout_s)
            for connection in self._connections:
                with suppress(BrokenPipeError):
                    _send(connection, "all have answered")
            return results
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes; a later ``run`` starts new ones."""
        for process in self._processes:
            # Each rank leads a process group (_serve), so what it started goes with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self._scratch is not None:
            self._scratch.cleanup()
        self._processes, self._connections, self._scratch = [], [], None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="bitmoe-ranks-")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            _stack_file(self._scratch.name, rank).touch()
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world_size, self._scratch.name), name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(START_TIMEOUT_S)

    def _collect(self, timeout_s: float) -> list[Any]:
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.world_size:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = self._connections.index(connection)
                answers[rank] = self._receive(rank)
                if answers[rank].error:
                    deadline = min(deadline, time.monotonic() + self.grace_s)
        failures = {rank: answer.error for rank, answer in answers.items() if answer.error}
        failures |= self._stacks_of([rank for rank in range(self.world_size) if rank not in answers])
        if failures:
            raise RankError(failures)
        return [answers[rank].value for rank in range(self.world_size)]

    def _receive(self, rank: int) -> _Answer:
        try:
            return self._connections[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(timeout=10)
            return _Answer(error=f"died (exit status {self._processes[rank].exitcode})")

    def _stacks_of(self, hung: list[int]) -> dict[int, str]:
        for rank in hung:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        if hung:
            time.sleep(1)
        return {r: f"did not answer; it was at\n{_stack_file(self._scratch.name, r).read_text()}" for r in hung}


def _send(connection: Connection, value: object) -> None:
    # Connection.send would pass tensors as shared memory, to be opened before the sender leaves.
    connection.send_bytes(pickle.dumps(value))


def _stack_file(scratch: str, rank: int) -> Path:
    return Path(scratch, f"stacks_{rank}.txt")


def _serve(connection: Connection, rank: int, world_size: int, scratch: str) -> None:
    os.setpgid(0, 0)
    stacks = _stack_file(scratch, rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    _answer(connection, _import_torch)
    # The end of the connection is the end of the pool, or of the process that had it.
    with suppress(EOFError, ConnectionError):
        for call in itertools.count():
            header = connection.recv()
            _answer(connection, _call, connection, f"file://{scratch}/store_{call}", *header)
            connection.recv()
            _leave_groups()


def _import_torch() -> None:
    with imports():
        import torch

    torch.set_num_threads(1)


def _answer(connection: Connection, fn: Callable, *args: Any) -> None:
    try:
        answer = pickle.dumps(_Answer(value=fn(*args)))
    except BaseException:
        answer = pickle.dumps(_Answer(error=f"raised\n{traceback.format_exc()}"))
    connection.send_bytes(answer)


def _call(connection: Connection, store: str, module_name: str, path: str, function: str) -> Any:
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    with imports():
        module = _load(module_name, Path(path))
    # Arguments come second: their classes may stand in the file just loaded.
    return getattr(module, function)(*connection.recv())


def _leave_groups() -> None:
    """Leave those of a call that all ranks have answered: nobody waits in one.

    A layout's groups take tens of threads and sockets, and the threads poll: with 75 each, two idle ranks took 6 % of a
    core.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    if ours := sys.modules.get("bitmoe.parallel.process_groups"):
        ours.leave_at_once()
    else:
        dist.destroy_process_group()
    # Models hold groups, and are cycles.
    gc.collect()


def _load(module_name: str, path: Path) -> ModuleType:
    if module_name in sys.modules:
        return sys.modules[module_name]
    if not path.name.startswith("test_"):
        return importlib.import_module(module_name)
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""Starts the ranks of a run on this machine, as torchrun would, and answers with one exit status.

torchrun cannot be used for it: it answers 1 whatever its workers answered. Rank 0 has the terminal. What the
other ranks print is kept aside and shown only for the rank that failed first, because the others' errors
follow from its end. Every rank leads a process group of its own, so that signals reach it through this
process alone and once.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from bitmoe.train.status import BAD_INPUT, DONE, STOPPED

POLL_S = 0.05
SETTLE_S = 2.0
"""How long ranks may go on after the first failed: they report the same bad input, or the lost connection."""
TAIL_LINES = 60


def launch(command: Sequence[str], nproc: int, env: Mapping[str, str] | None = None, grace_s: float = 30.0) -> int:
    """Run ``command`` once per rank and wait for all of them.

    SIGTERM and SIGINT are passed on to every rank. When a rank fails, the others get SIGTERM and, after
    ``grace_s`` seconds, SIGKILL.

    Args:
        command: program and arguments of every rank, which tells itself apart by ``RANK``.
        nproc: number of ranks.
        env: environment of the ranks, by default this process's.
        grace_s: seconds that a rank has to end after SIGTERM.

    Returns:
        0 if all ranks ended so; 2 if one refused its input; 75 if some stopped after saving and none failed;
        otherwise the status of the rank that failed first, 128 + n if signal n ended it.
    """
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    ranks: list[subprocess.Popen] = []
    outputs: list[IO[bytes]] = []
    rendezvous = tempfile.TemporaryDirectory(prefix="bitmoe-")
    try:
        common = _environment(nproc, os.environ if env is None else env, rendezvous.name)
        for rank in range(nproc):
            outputs.append(tempfile.TemporaryFile())  # noqa: SIM115 (closed below)
            redirect = {"stdout": outputs[rank], "stderr": subprocess.STDOUT} if rank else {}
            rank_env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=rank_env, start_new_session=True, **redirect))
        first = _wait(ranks, received, grace_s)
        codes = [rank.returncode for rank in ranks]
        if first is not None:
            _explain(first, codes, outputs[first])
        return exit_status(codes, first)
    finally:
        _signal(ranks, signal.SIGKILL)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for output in outputs:
            output.close()
        rendezvous.cleanup()


def exit_status(codes: Sequence[int], first_failed: int | None) -> int:
    """One exit status for those of all ranks; ``first_failed`` is the rank that failed first, if any did."""
    if BAD_INPUT in codes:
        return BAD_INPUT
    if first_failed is None:
        return STOPPED if STOPPED in codes else DONE
    code = codes[first_failed]
    return code if code > 0 else 128 - code


def end_with_launcher() -> None:
    """End this rank as soon as its launcher is gone, however it ended; nothing happens in a rank of torchrun.

    A rank left behind would go on writing to the run directory that the next start takes over.
    """
    launcher = os.environ.get("BITMOE_LAUNCHER")
    if launcher:
        threading.Thread(target=_watch, args=(int(launcher),), daemon=True, name="end_with_launcher").start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)


def count_gpus(env: Mapping[str, str]) -> int:
    """GPUs that ranks with this environment would see, without importing torch."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def _environment(nproc: int, env: Mapping[str, str], rendezvous: str) -> dict[str, str]:
    """What all ranks share: the variables torchrun sets, and threads for an equal share of the cores.

    Ranks meet through a file and not a port: a port found free here may be taken before rank 0 listens on it.
    """
    if 0 < count_gpus(env) < nproc:
        print(f"{nproc} ranks, but {count_gpus(env)} GPUs: running on the CPU", flush=True)
        env = {**env, "CUDA_VISIBLE_DEVICES": ""}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        **env,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "BITMOE_RENDEZVOUS": f"file://{rendezvous}/store",
        "BITMOE_LAUNCHER": str(os.getpid()),
    }


def _wait(ranks: list[subprocess.Popen], received: list[int], grace_s: float) -> int | None:
    """Wait for all ranks, passing on what was received; the rank that failed first, None if none failed."""
    first, failed_at, asked = None, 0.0, False
    while _running(ranks):
        while received:
            _signal(ranks, received.pop(0))
        if first is None:
            first, failed_at = _first_failed(ranks), time.monotonic()
        waited = time.monotonic() - failed_at
        if first is not None and waited > SETTLE_S and not asked:
            _signal(ranks, signal.SIGTERM)
            asked = True
        if first is not None and waited > SETTLE_S + grace_s:
            _signal(ranks, signal.SIGKILL)
        time.sleep(POLL_S)
    return _first_failed(ranks) if first is None else first


def _running(ranks: list[subprocess.Popen]) -> list[subprocess.Popen]:
    return [rank for rank in ranks if rank.poll() is None]


def _first_failed(ranks: list[subprocess.Popen]) -> int | None:
    return next((i for i, rank in enumerate(ranks) if rank.returncode not in (None, DONE, STOPPED)), None)


def _signal(ranks: list[subprocess.Popen], number: int) -> None:
    """Send a signal to the process groups of all ranks that still run."""
    for rank in _running(ranks):
        os.killpg(rank.pid, number)


def _explain(rank: int, codes: list[int], output: IO[bytes]) -> None:
    """Say on standard error which rank failed and how, with the end of what it printed aside."""
    if codes[rank] == BAD_INPUT and codes[0] == BAD_INPUT:
        return
    output.seek(0)
    for line in output.read().decode(errors="replace").splitlines()[-TAIL_LINES:]:
        print(f"[rank {rank}] {line}", file=sys.stderr)
    code = codes[rank]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    print(f"rank {rank} of {len(codes)} {how}", file=sys.stderr)

"""The launcher with real processes: small Python programs in place of the training."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bitmoe.train.launcher import exit_status, launch

ROOT = Path(__file__).parents[2]


def rank_program(code):
    """A command whose ranks run ``code`` with ``rank`` set."""
    head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    return [sys.executable, "-c", head + textwrap.dedent(code)]


def start_launcher(command):
    """The launcher in a process of its own, to send signals to."""
    code = f"import sys; from bitmoe.train.launcher import launch; sys.exit(launch({command!r}, 2))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(paths, seconds=20.0):
    """Wait until all files exist."""
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"none of these after {seconds} s: {paths}"
        time.sleep(0.02)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("codes", "first", "expected"),
    [
        ([0, 0], None, 0),
        ([0, 75], None, 75),
        ([75, 75], None, 75),
        ([1, 2], 0, 2),
        ([2, -15], 0, 2),
        ([1, 3], 1, 3),
        ([75, 1], 1, 1),
        ([0, -9], 1, 137),
        ([-15, 1], 0, 143),
    ],
)
def test_exit_status(codes, first, expected):
    assert exit_status(codes, first) == expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(75 if rank else 0)", 75),
        ("sys.exit(2)", 2),
        ("sys.exit(3 if rank else 0)", 3),
        ("rank and os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_launch_maps_exit_codes(program, expected):
    assert launch(rank_program(program), 2) == expected


def test_launch_environment(tmp_path):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE BITMOE_RENDEZVOUS OMP_NUM_THREADS"
    program = f"""
        import json
        found = {{name: os.environ[name] for name in {names!r}.split()}}
        json.dump(found, open({str(tmp_path)!r} + f'/{{rank}}', 'w'))
    """
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    assert launch(rank_program(program), 2, env) == 0
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert (first.pop("RANK"), second.pop("RANK")) == ("0", "1")
    assert (first.pop("LOCAL_RANK"), second.pop("LOCAL_RANK")) == ("0", "1")
    assert first == second
    assert (first["WORLD_SIZE"], first["LOCAL_WORLD_SIZE"], first["BITMOE_RENDEZVOUS"][:7]) == ("2", "2", "file://")
    assert int(first["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert (
        launch(rank_program("sys.exit(os.environ['OMP_NUM_THREADS'] != '7')"), 2, {**env, "OMP_NUM_THREADS": "7"}) == 0
    )


def test_launch_shows_rank_0_alone(capfd):
    assert launch(rank_program("print('out of', rank); print('err of', rank, file=sys.stderr)"), 2) == 0
    assert capfd.readouterr() == ("out of 0\n", "err of 0\n")


def test_launch_names_the_failed_rank_and_shows_its_end(capfd):
    assert launch(rank_program("print('before'); 1 / (1 - rank)"), 2) == 1
    error = capfd.readouterr().err
    assert "[rank 1] before\n" in error
    assert "[rank 1] ZeroDivisionError: division by zero\n" in error
    assert error.endswith("rank 1 of 2 ended with status 1\n")


@pytest.mark.parametrize(("speaker", "shown"), [(0, "refused\n"), (1, "[rank 1] refused\n")])
def test_launch_shows_a_refusal_once(capfd, speaker, shown):
    program = f"""
        if {speaker} == 0:
            print('refused' if rank == 0 else 'refused too', file=sys.stderr)
            sys.exit(2)
        if rank == 1:
            print('refused', file=sys.stderr)
            sys.exit(2)
    """
    assert launch(rank_program(program), 2) == 2
    assert capfd.readouterr().err.startswith(shown)


def test_launch_ends_the_others_by_sigterm(tmp_path):
    program = f"""
        if rank == 1:
            sys.exit(5)
        def stop(number, frame):
            open({str(tmp_path / "asked")!r}, 'w').close()
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        time.sleep(60)
    """
    start = time.monotonic()
    assert launch(rank_program(program), 2) == 5
    assert time.monotonic() - start < 20
    assert (tmp_path / "asked").exists()


def test_launch_kills_what_ignores_sigterm():
    program = """
        if rank == 1:
            sys.exit(5)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    """
    start = time.monotonic()
    assert launch(rank_program(program), 2, grace_s=0.5) == 5
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank_once(tmp_path, number):
    program = f"""
        def stop(number, frame):
            open({str(tmp_path)!r} + f'/got{{rank}}', 'a').write(f'{{number}} ')
            time.sleep(0.5)
            sys.exit(75)
        signal.signal({int(number)}, stop)
        open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()
        time.sleep(60)
    """
    launcher = start_launcher(rank_program(program))
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    launcher.send_signal(number)
    assert launcher.wait(20) == 75
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == [f"{int(number)} "] * 2


def test_ranks_end_with_a_killed_launcher(tmp_path):
    program = f"""
        from bitmoe.train.launcher import end_with_launcher
        end_with_launcher()
        open({str(tmp_path)!r} + f'/{{rank}}.tmp', 'w').write(str(os.getpid()))
        os.rename({str(tmp_path)!r} + f'/{{rank}}.tmp', {str(tmp_path)!r} + f'/{{rank}}')
        time.sleep(60)
    """
    launcher = start_launcher(rank_program(program))
    wait_for([tmp_path / "0", tmp_path / "1"])
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert all(map(is_alive, pids))
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)

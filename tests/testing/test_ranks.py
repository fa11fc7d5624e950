"""The pool of ranks: results, failures by rank, hangs, reuse and recovery."""

import os
import pickle
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from bitmoe.config.choices import Precision
from bitmoe.config.schema import Config, ContextConfig, ModelConfig, MoEConfig, RunConfig
from bitmoe.testing.parity import first_step
from bitmoe.testing.ranks import RankError, RankPool


@dataclass
class Offset:
    """A class of this file, which ranks can only know by loading the file."""

    value: torch.Tensor


def sum_over_ranks(offset):
    x = torch.full((3,), dist.get_rank() + 1.0) + offset.value
    dist.all_reduce(x)
    return Offset(x)


def where():
    return {
        "rank": dist.get_rank(),
        "env_rank": int(os.environ["RANK"]),
        "world_size": dist.get_world_size(),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
    }


def raise_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("no such expert")
    dist.barrier()


def raise_everywhere():
    raise ValueError(f"bad shard {dist.get_rank()}")


def sleep_on(rank):
    if dist.get_rank() == rank:
        time.sleep(600)


def die_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_sum_over_ranks(ranks):
    first, second = ranks(2).run(sum_over_ranks, Offset(torch.ones(3)))
    assert torch.equal(first.value, torch.full((3,), 5.0))
    assert torch.equal(second.value, first.value)


def test_world_of_one(ranks):
    (only,) = ranks(1).run(sum_over_ranks, Offset(torch.zeros(3)))
    assert torch.equal(only.value, torch.ones(3))


def test_ranks_are_reused_in_order_on_cpu(ranks):
    before, after = ranks(2).run(where), ranks(2).run(where)
    assert before == after
    assert [w["rank"] for w in before] == [w["env_rank"] for w in before] == [0, 1]
    assert all((w["world_size"], w["threads"], w["gpus"]) == (2, 1, 0) for w in before)
    assert len({os.getpid(), *(w["pid"] for w in before)}) == 3


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_tests_with_ranks_share_a_worker(ranks, request):
    assert request.node.nodeid.endswith("@ranks")


def test_function_of_an_importable_module(ranks):
    assert ranks(2).run(dist.get_rank) == [0, 1]


def pid_and_threads(config):
    """Of a rank that has trained a step in groups of a layout."""
    first_step(config)
    return os.getpid(), len(os.listdir("/proc/self/task"))


def test_idle_ranks_are_in_no_group(ranks):
    """Threads of groups poll, and those of a layout are many: none may be left, and none be added from call to call."""
    model = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, vocab_size=11)
    run = RunConfig(micro_batch_size=1, global_batch_size=2, precision=Precision.fp32)
    config = Config(model=model, moe=MoEConfig(), context=ContextConfig(seq_length=4), run=run)
    for _ in range(2):
        working = ranks(2).run(pid_and_threads, config)
        assert min(threads for _, threads in working) > 40
        # Some are torch's own; megatron-core keeps one group or two for itself.
        deadline = time.monotonic() + 30
        while most_threads(working) >= 15 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert most_threads(working) < 15


def most_threads(ranks):
    return max(len(os.listdir(f"/proc/{pid}/task")) for pid, _ in ranks)


def test_failures_name_the_rank_and_the_pool_recovers():
    with RankPool(2, grace_s=5) as pool:
        pids = [w["pid"] for w in pool.run(where)]

        with pytest.raises(RankError, match="(?s)^rank 1 raised.*ValueError: no such expert.*rank 0 did not") as failed:
            pool.run(raise_on, 1)
        assert failed.value.ranks == [1, 0]
        # The stack of the rank that waited for the failed one.
        assert "in raise_on" in str(failed.value).partition("rank 0 did not answer")[2]
        assert not any(is_alive(pid) for pid in pids)

        assert pool.run(dist.get_rank) == [0, 1]
        with pytest.raises(RankError, match="(?s)bad shard 0.*bad shard 1|bad shard 1.*bad shard 0"):
            pool.run(raise_everywhere)


def test_hang_is_killed_and_named():
    with RankPool(2) as pool:
        pool.run(dist.get_rank)
        started = time.monotonic()
        with pytest.raises(RankError, match="(?s)^rank 1 did not answer.*in sleep_on") as failed:
            pool.run(sleep_on, 1, timeout_s=5)
        assert failed.value.ranks == [1]
        assert time.monotonic() - started < 30


def test_death_is_named():
    with RankPool(1) as pool, pytest.raises(RankError, match="rank 0 died .exit status -9."):
        pool.run(die_on, 0)


def test_pool_recovers_from_arguments_that_cannot_be_sent():
    with RankPool(1) as pool:
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pool.run(sum_over_ranks, lambda: None)
        assert pool.run(dist.get_rank) == [0]


def test_result_that_cannot_be_sent_is_an_error_of_its_rank():
    with RankPool(1) as pool, pytest.raises(RankError, match="(?s)rank 0 raised.*pickle"):
        pool.run(make_a_lambda)


def make_a_lambda():
    return lambda: None

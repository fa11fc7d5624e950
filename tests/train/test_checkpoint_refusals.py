"""What is not a good checkpoint of this model is refused by name, on all ranks, and failed saves leave no trace."""

import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from bitmoe.config.choices import Precision
from bitmoe.config.errors import InputError
from bitmoe.config.schema import Config, MoEConfig, ParallelConfig
from bitmoe.testing.parity import make_engine
from bitmoe.testing.ranks import RankError, RankPool
from bitmoe.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from bitmoe.train.manifest import MANIFEST, verify, write_manifest


def tiny(num_layers=2, hidden_size=32, num_experts=4, precision=Precision.fp32, **layout):
    config = Config(parallel=ParallelConfig(**layout))
    config.model.vocab_size, config.model.hidden_size, config.model.num_layers = 100, hidden_size, num_layers
    config.model.num_attention_heads, config.model.num_query_groups = 4, 4
    config.context.seq_length, config.run.precision = 16, precision
    config.quant.groups = 2
    config.moe = MoEConfig(num_experts=num_experts, ffn_hidden_size=32)
    return config


def refusal(function, *args):
    """The message of the InputError that ``function`` must raise on this rank."""
    with pytest.raises(InputError) as caught:
        function(*args)
    return caught.value.what


def save(config, folder, step=1):
    return save_checkpoint(folder, make_engine(config), {"step": step}, keep=2)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint that no test changes."""
    return ranks(1).run(save, tiny(), tmp_path_factory.mktemp("saved"))[0]


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def refusals_of_others(path, configs):
    return [refusal(load_checkpoint, path, make_engine(config)) for config in configs]


def test_load_checkpoint_refuses_another_model(ranks, saved):
    configs = [tiny(hidden_size=64), tiny(num_layers=3), tiny(num_experts=8), tiny(precision=Precision.bf16)]
    found = ranks(1).run(refusals_of_others, saved, configs)[0]
    assert all("is of another model" in what for what in found)
    assert "embedding.word_embeddings.weight: float32 [128, 32] there, float32 [128, 64] here" in found[0]
    assert "[2]: none there, float32 [32] here" in found[1]
    assert "router.weight[0]: float32 [4, 32] there, float32 [8, 32] here" in found[2]
    assert "float32 [128, 32] there, bfloat16 [128, 32] here" in found[3]


def refuse_damaged(path, config):
    return refusal(load_checkpoint, path, make_engine(config))


def test_load_checkpoint_refuses_damage_on_every_rank(ranks, copied):
    path = copied / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for what in ranks(2).run(refuse_damaged, copied, tiny(expert=2)):
        assert "__0_0.distcp was changed" in what


def test_load_checkpoint_refuses_a_newer_library(ranks, copied):
    content = verify(copied)
    (copied / MANIFEST).unlink()
    content["versions"]["megatron_core"] = "99.1.0"
    write_manifest(copied, {key: content[key] for key in content.keys() - {"schema", "files"}})
    assert "written with megatron-core 99.1.0" in ranks(1).run(refuse_damaged, copied, tiny())[0]


class _Marker:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_load_checkpoint_runs_no_code_of_a_changed_file(ranks, copied, tmp_path, name):
    marker = tmp_path / "marker"
    (copied / name).write_bytes(pickle.dumps(_Marker(str(marker))))
    assert name in ranks(1).run(refuse_damaged, copied, tiny())[0]
    assert not marker.exists()


def swap_experts(weight_EHF):
    return weight_EHF[[1, 0, 2, 3]]


def repeat_experts(weight_EHF):
    return weight_EHF[[0, 1, 0, 1]]


def transpose(weight_EHF):
    return weight_EHF.transpose(1, 2)


def save_mutated(path, config, folder, mutation):
    """Save wrong values under the fingerprints of the right ones."""
    engine = make_engine(config)
    load_checkpoint(path, engine)
    for name, shard in engine.sharded_state().items():
        if name.endswith("layers.1.mlp.experts.fc2_weight"):
            shard.data.data.copy_(mutation(shard.data.data).clone())
    engine.optimizer.reload_model_params()
    wrong = save_checkpoint(folder, engine, {"step": 1}, keep=2)
    content = verify(wrong) | {"fingerprints": verify(path)["fingerprints"]}
    (wrong / MANIFEST).unlink()
    write_manifest(wrong, {key: content[key] for key in content.keys() - {"schema", "files"}})
    return refusal(load_checkpoint, wrong, engine)


@pytest.mark.parametrize("mutation", [swap_experts, repeat_experts, transpose])
def test_load_checkpoint_refuses_wrong_values_that_load(ranks, saved, tmp_path, mutation):
    what = ranks(1).run(save_mutated, saved, tiny(), tmp_path, mutation)[0]
    assert "holds other values than were saved (decoder.layers.mlp.experts.fc2_weight[1]:" in what
    assert "more" not in what


def save_without_room(config, folder):
    """A save during which the last rank may not write files beyond 64 KiB, and one after."""
    engine = make_engine(config)
    first = save_checkpoint(folder, engine, {"step": 1}, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    what = refusal(save_checkpoint, folder, engine, {"step": 2}, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(os.listdir(folder))
    third = save_checkpoint(folder, engine, {"step": 3}, keep=2)
    return what, left, first, third


def test_save_checkpoint_without_room_fails_on_every_rank(ranks, tmp_path):
    results = ranks(2).run(save_without_room, tiny(expert=2), tmp_path)
    for what, _, first, third in results:
        assert "step_00000002" in what
        assert "rank 1: [Errno 27] File too large" in what
        assert verify(first)["step"] == 1
        assert verify(third)["step"] == 3
    assert results[0][1] == ["step_00000001"]


def save_and_be_killed(config, folder):
    """Rank 0 dies in its second save, before its file is safe on disk."""
    engine = make_engine(config)
    save_checkpoint(folder, engine, {"step": 1}, keep=1)
    if dist.get_rank() == 0:
        fsync = os.fsync

        def killed(handle):
            if os.readlink(f"/proc/self/fd/{handle}").endswith(".distcp"):
                os.kill(os.getpid(), signal.SIGKILL)
            return fsync(handle)

        os.fsync = killed
    save_checkpoint(folder, engine, {"step": 2}, keep=1)


def test_killed_save_leaves_the_checkpoint_before(tmp_path):
    with RankPool(2, grace_s=0.0) as pool, pytest.raises(RankError, match="rank 0 died"):
        pool.run(save_and_be_killed, tiny(expert=2), tmp_path)
    warnings = []
    assert newest_checkpoint(tmp_path, warnings.append) == tmp_path / "step_00000001"
    assert warnings == []
    assert len(list(tmp_path.glob("step_00000002.tmp-*"))) == 1

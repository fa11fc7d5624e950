"""``tools/bench_step``: its trainers train, its results are complete, and one failure does not stop the others."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitmoe.config.choices import ActFormat, Precision, WeightFormat
from bitmoe.config.schema import BitStage, Config, ParallelConfig
from bitmoe.parallel.process_groups import local_device, make_groups, start
from bitmoe.testing.parity import random_batches
from bitmoe_kernels.act_quant.reference import quantize_int4_reference, quantize_int8_reference
from bitmoe_kernels.sparsify.reference import topk_mask_reference
from bitmoe_kernels.weight_quant import ternarize

TOOL = Path(__file__).parents[2] / "tools" / "bench_step"
TINY = ["--model", "tiny", "model.vocab_size=259", "--seq", "16", "--micro-batch", "2", "--warmup", "1", "--steps", "2"]


def tool(module):
    if str(TOOL) not in sys.path:
        sys.path.insert(0, str(TOOL))
    return importlib.import_module(module)


def losses_on_one_batch(module, function, weights, steps):
    """In a rank: build a trainer and let it learn one batch by heart."""
    config = Config()
    config.model.vocab_size, config.model.num_layers, config.model.hidden_size = 259, 2, 64
    config.model.ffn_hidden_size, config.context.seq_length = 96, 16
    config.quant.weights = weights
    if weights is WeightFormat.ternary:
        config.quant.stages = [BitStage(qkv=ActFormat.int4, o_keep=0.5, gate_up=ActFormat.int4)]
    config.run.precision, config.run.micro_batch_size, config.run.global_batch_size = Precision.bf16, 2, 2
    config.optim.lr, config.optim.warmup_steps = 3e-3, 0
    start()
    trainer = getattr(tool(module), function)(config, make_groups(ParallelConfig()))
    batch = {key: ids.to(local_device()) for key, ids in random_batches(config, 1)(range(2)).items()}
    first = float(trainer.forward(batch))
    return [first, *(float(trainer.step(batch)) for _ in range(steps)), layer_of(trainer, config)]


def layer_of(trainer, config):
    """Forward and backward of a trainer's layer: whether shapes fit and which gradients are usable."""
    measure = tool("measure")
    parameters = measure.fresh_parameters(trainer.layer.module)
    x, dy = (measure.residual_stream(trainer.layer, config, torch.bfloat16) for _ in range(2))
    y = trainer.layer.forward(x.requires_grad_())
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return {
        "shape": y.shape == x.shape == ((2, 16, 64) if trainer.layer.is_batch_first else (16, 2, 64)),
        "gradients": len(gradients) > 5 and all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients),
        "in the module": {id(p) for p in parameters} == {id(p) for p in trainer.layer.module.parameters()},
    }


@pytest.mark.parametrize(
    ("module", "function", "weights"),
    [
        ("bitmoe_trainer", "build", WeightFormat.ternary),
        ("bitmoe_trainer", "build", WeightFormat.none),
        ("megatron_trainer", "build", WeightFormat.none),
        ("megatron_trainer", "build_fake_quant", WeightFormat.ternary),
        ("llama_trainer", "build", WeightFormat.none),
        ("llama_trainer", "build_with_masters", WeightFormat.none),
    ],
    ids=["bitmoe-a48", "bitmoe-bf16", "megatron-bf16", "fake-quant", "llama-bf16", "llama-bf16-masters"],
)
def test_trainer_learns(ranks, module, function, weights):
    if module == "llama_trainer":
        pytest.importorskip("transformers")
    (result,) = ranks(1).run(losses_on_one_batch, module, function, weights, 12)
    *losses, layer = result
    # The loss of a forward alone is the one that the next step starts from.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[-1] < losses[0] - 1
    assert all(layer.values()), layer


def test_fake_quantization_is_that_of_the_kernels():
    fake_quant = tool("fake_quant")
    x_TI = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    w_codes, w_scale = ternarize(x_TI)
    torch.testing.assert_close(fake_quant.fake_ternarize(x_TI), w_codes * w_scale)
    for act_format, reference in ((ActFormat.int8, quantize_int8_reference), (ActFormat.int4, quantize_int4_reference)):
        codes, scale = reference(x_TI)
        torch.testing.assert_close(fake_quant.fake_quantize(x_TI, act_format), codes * scale)
        kept = codes * scale * topk_mask_reference(x_TI, keep=0.5)
        torch.testing.assert_close(fake_quant.fake_quantize(x_TI, act_format, keep=0.5), kept)
    with pytest.raises(ValueError, match="fp4"):
        fake_quant.fake_quantize(x_TI, ActFormat.fp4)


def test_fake_quantization_is_straight_through():
    fake_quant = tool("fake_quant")
    x = torch.randn(4, 8, requires_grad=True)
    value = fake_quant._straight_through(fake_quant.fake_ternarize(x), x)
    value.backward(torch.arange(32.0).view(4, 8))
    torch.testing.assert_close(value, fake_quant.fake_ternarize(x))
    assert torch.equal(x.grad, torch.arange(32.0).view(4, 8))


def test_flops_of_a_layer():
    config = Config()
    config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads = 7, 8, 2
    config.model.ffn_hidden_size, config.model.vocab_size, config.context.seq_length = 16, 100, 3
    # Four square projections and three of the FFN; scores and values, with two keys on average.
    assert tool("measure").layer_flops(config) == 2 * (4 * 8 * 8 + 3 * 8 * 16) + 2 * 2 * 8 * 2


def bench(*arguments):
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_table_and_json_with_a_failure_between(tmp_path):
    names = ["bitmoe-bf16", "fake-quant", "megatron-bf16"]
    done = bench(*TINY, "--trainers", ",".join(names), "--json", tmp_path / "result.json", "quant.groups=2")
    assert done.returncode == 1, done.stderr
    head, *lines, last = done.stdout.splitlines()
    assert head.startswith("trainer ")
    assert [line.split()[0] for line in lines] == names
    assert lines[1].split(maxsplit=1)[1].startswith("failed: InputError: the fake-quantized baseline")
    result = json.loads(last)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["torch"] == torch.__version__
    measured, refused, also_measured = result["rows"]
    assert "one group" in refused["error"]
    for row in (measured, also_measured):
        assert row["is_finite"]
        assert len(row["losses"]) == 3
        assert row["tokens_per_s"] == pytest.approx(32 / row["step_ms"] * 1e3, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("_scaled_int8_matmul_kernel", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6", "attention"),
        ("_norm_quant_fwd_kernel", "quantize"),
        ("_ternary_codes_kernel", "quantize"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "compiled by inductor"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AUnaryFunctor<float>>", "elementwise"),
        ("Memcpy DtoH (Device -> Pageable)", "copy"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, NormTwoOps>>", "reduce"),
        ("unheard_of", "other"),
    ],
)
def test_category(name, category):
    assert tool("gpu_profile").category(name) == category


def test_report_of_overlapping_kernels():
    gpu_profile = tool("gpu_profile")
    kernels = [gpu_profile.Kernel("nvjet_a", 0.0, 3000.0), gpu_profile.Kernel("nvjet_a", 6000.0, 1000.0)]
    kernels += [gpu_profile.Kernel("Memset", 2000.0, 2000.0), gpu_profile.Kernel("Memset", 6200.0, 100.0)]
    assert gpu_profile.busy_us(kernels) == 5000.0
    head, _, _, gemm, *_ = gpu_profile.report(kernels, wall_us=10000.0, steps=2).splitlines()
    assert head == "5.00 ms a step on the wall, GPU busy for 2.50 ms (50.0%), 2 kernels a step"
    assert gemm.split() == ["2.000", "65.6%", "1", "2000.0", "gemm"]


def test_refuses():
    done = bench(*TINY, "--layer", "--layers", "3")
    assert done.returncode == 2
    assert "a model of one layer, not of 3" in done.stderr
    if not torch.cuda.is_available():
        done = bench(*TINY, "--layer")
        assert (done.returncode, done.stderr.strip()) == (2, "--layer needs a GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [["--profile", "megatron-bf16"], ["--layer", "--trainers", "bitmoe-bf16"]])
def test_modes_on_a_gpu(mode):
    done = bench(*TINY, *mode)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gemm" in done.stdout or json.loads(done.stdout.splitlines()[-1])["rows"][0]["layer_activation_bytes"] > 0

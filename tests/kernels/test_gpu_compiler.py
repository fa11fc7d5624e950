"""Every kernel compiles for a GPU, present or not: launchers run on CPU tensors, and a launch ends with its code.

What the interpreter runs may still stop the compiler: layouts, inline assembly, registers. Sizes are those of the
default model (narrow, fp32 or bf16) and of a 1.3B one; the launchers' constants depend on them.
"""

# Shapes: T = tokens, D = features, F = inner features, E = experts.

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

SIZES = {
    "default": {"hidden": 128, "ffn": 512, "groups": 4, "heads": 4},
    "1.3B": {"hidden": 2048, "ffn": 5504, "groups": 1, "heads": 32},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT8 = torch.float8_e4m3fn
TOKENS = 256
NUM_EXPERTS = 8
TARGET = ("cuda", 90, 32)
REGISTERS = 65536
"""Of a processor, which a program may not exceed."""


def activations(hidden, ffn, groups, heads, dtype):
    """Quantizers, norms, activation and their backward."""
    from bitmoe_kernels.act_quant.triton_kernels import dequantize_triton, int8_codes_triton, quantize_triton
    from bitmoe_kernels.norm_quant.triton_kernels import norm_backward_triton, norm_quantize_triton, rms_norm_triton
    from bitmoe_kernels.relu2_glu.triton_backward import (
        relu2_glu_quantize_backward_triton,
        relu2_glu_rounded_backward_triton,
    )
    from bitmoe_kernels.relu2_glu.triton_kernels import relu2_glu_quantize_triton
    from bitmoe_kernels.sparsify.triton_kernels import topk_mask_triton

    x, gain = torch.ones(TOKENS, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)
    gate_up, ffn_gain = torch.ones(TOKENS, 2 * ffn, dtype=dtype), torch.ones(NUM_EXPERTS, ffn, dtype=dtype)
    expert = torch.zeros(TOKENS, dtype=torch.int32)
    scale, one = torch.ones(TOKENS, groups), torch.ones(TOKENS, 1)
    for num_format in ("int4", "int8", "fp4"):
        quantize_triton(x, num_format, groups)
    int8_codes_triton(x, scale)
    dequantize_triton(torch.ones(TOKENS, hidden, dtype=torch.int8), scale, dtype)
    topk_mask_triton(x, 0.5, groups)
    rms_norm_triton(x, gain, 1e-5)
    norm_quantize_triton(x, gain, 1e-5, "int4", code_dtype=FLOAT8, with_normalized=True)
    norm_quantize_triton(x, gain, 1e-5, "int8", True, groups, 0.5)
    norm_backward_triton(x, x, gain, scale, x)
    relu2_glu_quantize_triton(x[:, :2], gain[:1], 1e-5, "int8", 1, None)  # one feature
    for experts, gains, weight in ((None, ffn_gain[0], None), (expert, ffn_gain, one), (None, None, one)):
        relu2_glu_quantize_triton(gate_up, gains, 1e-5, "int8", groups, experts, weight)
        rstd = None if gains is None else scale
        relu2_glu_quantize_backward_triton(gate_up[:, :ffn], gate_up, gains, rstd, experts, weight)
        if dtype == torch.bfloat16 and groups == 1:
            w_scale = torch.ones(1 if experts is None else NUM_EXPERTS, 2)
            relu2_glu_rounded_backward_triton(gate_up[:, :ffn], gate_up, gains, rstd, experts, w_scale, one, weight)


def longest_rows(hidden, ffn, groups, heads, dtype):
    """Rows of as many features as Triton's kernels take, whatever the model's."""
    from bitmoe_kernels.dispatch import LONGEST_ROW
    from bitmoe_kernels.norm_quant.triton_kernels import norm_backward_triton, norm_quantize_triton
    from bitmoe_kernels.relu2_glu.triton_backward import relu2_glu_quantize_backward_triton
    from bitmoe_kernels.relu2_glu.triton_kernels import relu2_glu_quantize_triton

    gate_up, one = torch.ones(4, 2 * LONGEST_ROW, dtype=dtype), torch.ones(4, 1)
    x, gain = gate_up[:, :LONGEST_ROW], gate_up[0, :LONGEST_ROW]
    norm_quantize_triton(x, gain, 1e-5, "int4")
    norm_backward_triton(x, x, gain, one, x)
    relu2_glu_quantize_triton(gate_up, gain, 1e-5, "int8", 1, None)
    relu2_glu_quantize_backward_triton(x, gate_up, gain, one, None)


def products(hidden, ffn, groups, heads, dtype):
    """Codes by matrix, dense and by expert, and what their backward rounds and transposes."""
    from bitmoe_kernels.act_pack.triton_kernels import pack_codes_triton, unpack_codes_triton
    from bitmoe_kernels.grouped_ternary_gemm.reference import padded_rows
    from bitmoe_kernels.grouped_ternary_gemm.triton_codes import grouped_transpose_codes
    from bitmoe_kernels.grouped_ternary_gemm.triton_kernels import grouped_matmul
    from bitmoe_kernels.grouped_ternary_gemm.triton_row_tiles import row_tiles
    from bitmoe_kernels.ternary_gemm.triton_columns import transpose_codes
    from bitmoe_kernels.ternary_gemm.triton_grad import quantize_grad
    from bitmoe_kernels.ternary_gemm.triton_grad_columns import quantize_columns
    from bitmoe_kernels.ternary_gemm.triton_kernels import scaled_int8_matmul
    from bitmoe_kernels.ternary_gemm.triton_outer import outer

    x, w = torch.ones(TOKENS, ffn, dtype=torch.int8), torch.ones(NUM_EXPERTS, hidden, ffn, dtype=torch.int8)
    x_scale, w_scale = torch.ones(TOKENS, groups), torch.ones(NUM_EXPERTS, hidden, groups)
    ends, out = torch.full((NUM_EXPERTS,), TOKENS, dtype=torch.int32), torch.ones(TOKENS, hidden, dtype=dtype)
    scaled_int8_matmul(x, x_scale, w[0], w_scale[0], ffn // groups, out)
    scaled_int8_matmul(x, torch.ones(TOKENS, 2), w[0], torch.ones(hidden, 2), ffn // 2, out)  # long chunks
    grouped_matmul(x, x_scale, w, w_scale, ends, ffn // groups, out)
    x8, w8, one = x.to(FLOAT8), w.to(FLOAT8), torch.ones(TOKENS, 1)
    for chunk_size in (ffn, ffn // 2, 2048):
        grouped_matmul(x8, one, w8, w_scale[:, :, :1], ends, min(chunk_size, ffn), out)
    num_columns = padded_rows(TOKENS, NUM_EXPERTS)
    columns = torch.ones(ffn, num_columns, dtype=torch.int8).view(FLOAT8)
    dw = torch.ones(NUM_EXPERTS, ffn, ffn, dtype=dtype)
    outer(columns, torch.ones(NUM_EXPERTS, ffn), columns, ends, dw)
    odd = ffn - 3  # rows that no descriptor describes
    outer(columns[:odd], torch.ones(NUM_EXPERTS, odd), columns[:odd], ends, dw[:, :odd, :odd].contiguous())
    int8_columns, chunk_scale = columns.view(torch.int8), torch.ones(num_columns // 256, ffn)
    for experts, result in ((None, dw[:1]), (ends, dw)):
        outer(int8_columns, chunk_scale, int8_columns, experts, result)
    tiles = row_tiles(ends, num_columns, 128, padding=128)
    for powers in ((), (one, torch.ones(NUM_EXPERTS))):
        transpose_codes(x8, columns, *powers)
        grouped_transpose_codes(x8, tiles, columns, *powers)
    dy = torch.ones(TOKENS, ffn, dtype=dtype)
    quantize_columns(dy, one, int8_columns, chunk_scale)
    quantize_columns(dy, one, int8_columns, chunk_scale, row_tiles(ends, num_columns, 256, padding=256), ends)
    for expert_ends, scales in ((None, torch.ones(ffn)), (ends, torch.ones(NUM_EXPERTS, ffn))):
        quantize_grad(dy, scales, one, expert_ends)
        quantize_grad(dy, None, None, expert_ends)
    quantize_grad(dy, None, None, None, torch.zeros(TOKENS, 2, dtype=torch.int32))
    unpack_codes_triton(pack_codes_triton(x8, "int4"), ffn, "int4", FLOAT8)


def weights(hidden, ffn, groups, heads, dtype):
    """Scales and codes of weights."""
    from bitmoe_kernels.weight_quant.triton_absmean import (
        absmean_scale_triton,
        absmean_sums_by_id_triton,
        absmean_sums_triton,
    )
    from bitmoe_kernels.weight_quant.triton_one_launch import absmean_operands_triton
    from bitmoe_kernels.weight_quant.triton_operands import ternary_operands_triton

    w = torch.ones(NUM_EXPERTS, hidden, ffn, dtype=dtype)
    ids = torch.arange(hidden) % groups
    absmean_sums_triton(w, groups, -1)
    sums, counts = absmean_sums_by_id_triton(w, ids, groups)
    scale = absmean_scale_triton(sums, counts, ids)
    former = None
    for row_dtype in (torch.int8, FLOAT8):
        former = ternary_operands_triton(w, torch.ones(NUM_EXPERTS, groups), -1, row_dtype, True, former)[:2]
    ternary_operands_triton(w, scale, -2, FLOAT8, True)
    absmean_operands_triton(w, 1, FLOAT8, True, former)


def rest(hidden, ffn, groups, heads, dtype):
    """Rotary embedding, cross-entropy, sums of gradients, tokens to experts and back."""
    from bitmoe_kernels.cross_entropy.triton_kernels import logits_grad_triton, softmax_stats_triton
    from bitmoe_kernels.grad_accumulate.triton_kernels import accumulate_grad
    from bitmoe_kernels.rope.triton_kernels import rope_qkv_bwd, rope_qkv_fwd
    from bitmoe_kernels.token_permute import triton_kernels as permutation

    angles = torch.ones(TOKENS, hidden // heads // 2)
    rope_qkv_bwd(
        *rope_qkv_fwd(torch.ones(TOKENS, 1, 3 * hidden, dtype=dtype), angles, angles, heads, 1), angles, angles
    )
    logits, labels, number = (
        torch.ones(TOKENS, 320, dtype=dtype),
        torch.zeros(TOKENS, dtype=torch.int64),
        torch.ones(TOKENS),
    )
    softmax_stats_triton(logits, labels, 0, 320)
    logits_grad_triton(logits, labels, 0, number, number, number, logits)
    accumulate_grad(torch.ones(hidden, ffn), torch.ones(hidden, ffn, dtype=dtype))
    routing = torch.zeros(TOKENS, NUM_EXPERTS, dtype=torch.bool)
    plan = permutation.plan_rows_triton(routing, 2)
    x, rows = torch.ones(TOKENS, hidden, dtype=dtype), torch.ones(2 * TOKENS, hidden, dtype=dtype)
    permutation.permute_triton(x, plan)
    permutation.sum_rows_triton(rows, plan)
    permutation.permute_probs_triton(torch.ones(TOKENS, NUM_EXPERTS), plan)
    permutation.permute_probs_backward_triton(rows[:, :1], plan)


CASES = {
    f"{function.__name__}, {size}, {dtype}": (function, size, dtype)
    for function in (activations, longest_rows, products, weights, rest)
    for size in SIZES
    for dtype in DTYPES
    if size == "default" or dtype == "bf16"
}


def compile_all() -> dict[str, str | None]:
    """The error of each case, or None."""
    _compile_only()
    found = {}
    for name, (function, size, dtype) in CASES.items():
        try:
            function(**SIZES[size], dtype=DTYPES[dtype])
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:500]
    return found


def _compile_only() -> None:
    """Make a launch end when its kernel is compiled for TARGET."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        """What Triton asks of the driver of a device."""

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_current_target(self):
            return GPUTarget(*TARGET)

    def launch(kernel, grid, *args, **options):
        compiled = kernel.run(*args, grid=grid, warmup=True, **options).metadata
        registers = 32 * compiled.num_warps * (compiled.maxnreg or 0)
        if registers > REGISTERS:
            raise ValueError(f"{compiled.name} may take {registers} registers: a processor has {REGISTERS}")

    driver.set_active(NoDevice())
    JITFunction.__getitem__ = lambda self, grid: partial(launch, self, grid)


@pytest.fixture(scope="module")
def errors():
    """Of each case; compiled in a process of its own, because this one may run Triton's interpreter."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(Path(__file__).parents[2] / "kernels"), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.xdist_group("gpu compiler")
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_sm_90(errors, case):
    assert errors[case] is None


if __name__ == "__main__":
    print(json.dumps(compile_all()))

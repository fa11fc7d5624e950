"""Time of the quantizers on one GPU, as a share of what a copy of memory reaches in the same process.

Exactness first: every operator is compared with its reference on the very shape that is timed, bit for bit; where one
differs, nothing is printed but that. Inputs rotate through more than 200 MB, past any L2 cache. The calls over all of
them are captured in one CUDA graph, so that the launches of Python are not timed; the median of its replays counts.

    PYTHONPATH=kernels python kernels/bench/quantizers.py --tokens 8192

Prints one JSON line per operator and shape: microseconds, bytes that must move (input read once, results written once),
their share of the copy bandwidth, and the time of the reference in eager torch.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from bitmoe_kernels.act_quant import quantize_fp4, quantize_int4, quantize_int8
from bitmoe_kernels.act_quant.reference import (
    quantize_fp4_reference,
    quantize_int4_reference,
    quantize_int8_reference,
)
from bitmoe_kernels.norm_quant import rms_norm_quantize, sub_norm_quantize
from bitmoe_kernels.norm_quant.reference import rms_norm_quantize_reference, sub_norm_quantize_reference
from bitmoe_kernels.sparsify import topk_mask
from bitmoe_kernels.sparsify.reference import topk_mask_reference
from bitmoe_kernels.weight_quant import absmean_sums, absmean_sums_by_id, ternary_codes, ternary_operands
from bitmoe_kernels.weight_quant.reference import (
    absmean_sums_by_id_reference,
    absmean_sums_reference,
    ternary_codes_reference,
    ternary_operands_reference,
)

ROTATED_BYTES = 256 * 2**20
REPLAYS = 15
EPS = 1e-5


@dataclass
class Case:
    """One operator on one shape; both functions take the input alone."""

    name: str
    shape: tuple[int, int]
    run: Callable
    reference: Callable


def cases(tokens: int) -> list[Case]:
    """Hidden and FFN sizes of 1.3B and 7B models, aligned and not; weights of the same."""
    found = []
    for features in (2048, 4096, 5460, 5504, 11008):
        shape, gain = (tokens, features), torch.rand(features, device="cuda").bfloat16() + 0.5
        found += [
            Case("int4", shape, quantize_int4, quantize_int4_reference),
            Case("int8", shape, quantize_int8, quantize_int8_reference),
            Case("fp4", shape, quantize_fp4, quantize_fp4_reference),
            Case("topk", shape, topk_mask, topk_mask_reference),
            Case(
                "rms_norm+int4",
                shape,
                lambda x, gain=gain: rms_norm_quantize(x, gain, EPS, "int4"),
                lambda x, gain=gain: rms_norm_quantize_reference(x, gain, EPS, "int4"),
            ),
            Case(
                "rms_norm+int4, e4m3 codes",
                shape,
                lambda x, gain=gain: as_bytes(rms_norm_quantize(x, gain, EPS, "int4", torch.float8_e4m3fn)),
                lambda x, gain=gain: as_bytes(rms_norm_quantize_reference(x, gain, EPS, "int4", torch.float8_e4m3fn)),
            ),
            Case(
                "sub_norm+int8+topk",
                shape,
                lambda x, gain=gain: sub_norm_quantize(x, gain, EPS, "int8", keep=0.5),
                lambda x, gain=gain: sub_norm_quantize_reference(x, gain, EPS, "int8", 1, 0.5),
            ),
        ]
        if features % 8 == 0:
            found.append(
                Case("int8, 8 groups", shape, lambda x: quantize_int8(x, 8), lambda x: quantize_int8_reference(x, 8))
            )
    for rows, columns in ((4096, 4096), (4096, 11008), (2048, 5460)):
        scale = torch.full((1,), 0.8, device="cuda")
        found += [
            Case(
                "absmean_sums, a sum a row",
                (rows, columns),
                lambda w, rows=rows: absmean_sums(w, rows, 0),
                lambda w, rows=rows: absmean_sums_reference(w, rows, -2),
            ),
            Case(
                "absmean_sums, 4 groups of columns",
                (rows, columns),
                lambda w: absmean_sums(w, 4, 1),
                lambda w: absmean_sums_reference(w, 4, -1),
            ),
            Case(
                "ternary_codes",
                (rows, columns),
                lambda w, scale=scale: ternary_codes(w, scale),
                lambda w, scale=scale: ternary_codes_reference(w, scale, -2),
            ),
            *training_cases(rows, columns, scale),
        ]
    return found


def training_cases(rows: int, columns: int, scale: torch.Tensor) -> list[Case]:
    """What an optimizer step makes of a weight: sums of interleaved q, k, v; e4m3 codes both ways, over the former."""
    ids = torch.arange(rows, device="cuda") // 128 % 3
    former = ternary_operands(torch.zeros(rows, columns, device="cuda"), scale, 0, torch.float8_e4m3fn, True)
    return [
        Case(
            "absmean_sums_by_id, 3 scales",
            (rows, columns),
            lambda w: absmean_sums_by_id(w, ids, 3),
            lambda w: absmean_sums_by_id_reference(w, ids, 3),
        ),
        Case(
            "ternary_operands (and 1 byte a weight of former codes read)",
            (rows, columns),
            lambda w: code_bytes(ternary_operands(w, scale, 0, torch.float8_e4m3fn, True, former)),
            lambda w: code_bytes(ternary_operands_reference(w, scale, -2, torch.float8_e4m3fn, True, None)),
        ),
    ]


def code_bytes(operands: tuple) -> tuple[torch.Tensor, ...]:
    """Codes by row and by column; their counts depend on what was there before."""
    return tuple(codes.view(torch.int8) for codes in operands[:2])


def as_bytes(result: tuple) -> tuple[torch.Tensor, ...]:
    """The result with its e4m3 codes as bytes, which torch compares."""
    return result[0].view(torch.int8), *result[1:]


def tensors(result) -> tuple:
    """A result of one or several tensors as several."""
    return (result,) if isinstance(result, torch.Tensor) else result


def is_exact(case: Case, x: torch.Tensor) -> bool:
    """Bit for bit; fp64 sums to the rounding of their order."""
    pairs = zip(tensors(case.run(x)), tensors(case.reference(x)), strict=True)
    return all(
        torch.allclose(got, want, rtol=1e-14, atol=0) if want.dtype == torch.float64 else torch.equal(got, want)
        for got, want in pairs
    )


def replay_us(call: Callable, inputs: list[torch.Tensor]) -> float:
    """Median microseconds of one call, from replays of a CUDA graph of one call per input."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for x in inputs[:2]:
            call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(inputs))
    return statistics.median(times)


def eager_us(call: Callable, inputs: list[torch.Tensor]) -> float:
    """Median microseconds of one eager call."""
    times = []
    for _ in range(3):
        for x in inputs:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call(x)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def rotated(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Different bf16 inputs, together more than the L2 cache holds."""
    count = max(3, -(-ROTATED_BYTES // (2 * shape[0] * shape[1])))
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def copy_bytes_per_us() -> float:
    """Bytes read and written per microsecond by a copy of 256 MB."""
    sources = [torch.randint(127, (ROTATED_BYTES,), device="cuda", dtype=torch.int8) for _ in range(2)]
    target = torch.empty_like(sources[0])
    return 2 * ROTATED_BYTES / replay_us(target.copy_, sources)


def machine() -> dict:
    """GPU, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name()
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit or None}


def main() -> None:
    """Check, then measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="rows of the activations (default: %(default)s)")
    parser.add_argument("--only", default="", help="operators whose name holds this text")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("quantizers.py times GPU kernels, and this machine has no CUDA device")
    torch.manual_seed(0)
    chosen = [case for case in cases(arguments.tokens) if arguments.only in case.name]
    wrong = [
        f"{case.name} {list(case.shape)}"
        for case in chosen
        if not is_exact(case, torch.randn(case.shape, device="cuda", dtype=torch.bfloat16))
    ]
    if wrong:
        sys.exit("no figures, because results differ from the reference: " + "; ".join(wrong))
    copied = copy_bytes_per_us()
    print(json.dumps({**machine(), "tokens": arguments.tokens, "copy_GB_per_s": round(copied / 1e3)}))
    for case in chosen:
        inputs = rotated(case.shape)
        results = tensors(case.run(inputs[0]))
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (inputs[0], *results))
        time_us, reference_us = replay_us(case.run, inputs), eager_us(case.reference, inputs[:3])
        print(
            json.dumps(
                {
                    "operator": case.name,
                    "shape": case.shape,
                    "us": round(time_us, 1),
                    "MB": round(moved / 1e6, 1),
                    "share_of_copy": round(moved / time_us / copied, 3),
                    "reference_us": round(reference_us, 1),
                }
            ),
            flush=True,
        )
        del inputs, results


if __name__ == "__main__":
    main()

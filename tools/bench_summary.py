"""One table of what ``bench_gpu.py`` measured: each figure of ours beside the best baseline of the same run.

Made of the JSON lines alone. A ratio above 1 says that ours is faster, or smaller.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Figure(NamedTuple):
    """A comparison."""

    what: str
    unit: str
    ours: str
    our_value: float
    baseline: str
    baseline_value: float
    ratio: float
    """Above 1 where ours is better."""


def figures(results: Iterable[dict]) -> list[Figure]:
    """The comparisons in the JSON lines of benchmarks, in their order; lines that hold none are passed over."""
    results = list(results)
    by_bench = {"linears": _contenders, "moe": _contenders, "grouped": _grouped, "step": _step, "layer": _layer}
    found = _quantizers([result for result in results if result["bench"] == "quantizers" and "us" in result])
    for result in results:
        if result["bench"] in by_bench:
            found += by_bench[result["bench"]](result)
    return found


def compare(
    what: str,
    unit: str,
    ours: dict[str, float],
    baselines: dict[str, float],
    others: dict[str, float],
    higher_is_better: bool = False,
) -> Iterator[Figure]:
    """Each of ours against the best of ``baselines``, then the best of ours against each of ``others``.

    Args:
        what: the figure's name.
        unit: of the values.
        ours: values by name.
        baselines: likewise; where none was measured, only ``others`` count.
        others: likewise.
        higher_is_better: values are rates.
    """

    def figure(our_name: str, name: str, value: float) -> Figure:
        ratio = ours[our_name] / value if higher_is_better else value / ours[our_name]
        return Figure(what, unit, our_name, ours[our_name], name, value, round(ratio, 3))

    best = best_of(baselines, higher_is_better)
    if best is not None:
        yield from (figure(name, best, baselines[best]) for name in ours)
    best_ours = best_of(ours, higher_is_better)
    if best_ours is not None:
        yield from (figure(best_ours, name, value) for name, value in others.items())


def best_of(values: dict[str, float], higher_is_better: bool) -> str | None:
    """The name of the best value; None where there is none."""
    return (max if higher_is_better else min)(values, key=values.get, default=None)


def _contenders(result: dict) -> Iterator[Figure]:
    """Passes over linears, or over routed experts."""
    kinds = {
        kind: {row["name"]: row["ms"] for row in result.get("results", ()) if row["kind"] == kind}
        for kind in ("ours", "bf16", "other")
    }
    what = f"{result['bench']}, {result.get('shape', '')}"
    return compare(what, "ms", kinds["ours"], kinds["bf16"], kinds["other"])


def _grouped(result: dict) -> Iterator[Figure]:
    """Linears of routed experts."""
    for shape, tables in result["layers"].items():
        totals = {name: table["total"] for name, table in tables.items()}
        baseline = {"bf16": totals.pop("bf16")}
        yield from compare(f"grouped, {shape}", "ms", totals, baseline, {})


def _step(result: dict) -> Iterator[Figure]:
    """Whole training steps."""
    return _trainers(result, "step", "tokens_per_s", "tokens/s", higher_is_better=True)


def _layer(result: dict) -> Iterator[Figure]:
    """One transformer layer: time, and what it holds."""
    yield from _trainers(result, "layer", "layer_ms", "ms")
    yield from _trainers(result, "layer", "bytes_per_token", "bytes/token")


def _trainers(result: dict, what: str, key: str, unit: str, higher_is_better: bool = False) -> Iterator[Figure]:
    values = {row["trainer"]: row[key] for row in result["rows"] if key in row}
    ours = {name: value for name, value in values.items() if name.startswith("bitmoe-")}
    baselines = {name: value for name, value in values.items() if name not in ours and "bf16" in name}
    best = best_of(baselines, higher_is_better)
    others = {name: value for name, value in values.items() if name not in ours and name != best}
    return compare(f"{what}, {result['shape']}", unit, ours, baselines, others, higher_is_better)


def _quantizers(rows: list[dict]) -> list[Figure]:
    """Of every operator the shape at which it comes least near to a copy."""
    slowest: dict[str, dict] = {}
    for row in rows:
        known = slowest.setdefault(row["operator"], row)
        if row["share_of_copy"] < known["share_of_copy"]:
            slowest[row["operator"]] = row
    return [
        Figure(
            f"quantizer, {'x'.join(map(str, row['shape']))}",
            "GB/s",
            name,
            round(row["share_of_copy"] * row["copy_GB_per_s"]),
            "copy",
            row["copy_GB_per_s"],
            row["share_of_copy"],
        )
        for name, row in slowest.items()
    ]


def table(found: list[Figure]) -> str:
    """The comparisons as text."""
    rows = [("figure", "unit", "ours", "", "best baseline", "", "ratio")]
    rows += [
        (f.what, f.unit, f.ours, f"{f.our_value:,.5g}", f.baseline, f"{f.baseline_value:,.5g}", f"{f.ratio:.2f}")
        for f in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    is_number = (False, False, False, True, False, True, True)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in rows
    )

"""The table of the rows, with what each is worth beside one GPU."""

HEAD = (
    f"{'layout':9}{'model':7}{'G':>3}  {'wire':7}{'overlap':9}{'graph':6}{'ms/step':>9}{'tokens/s':>11}{'a GPU':>10}"
    f"{'efficiency':>12}{'MiB in':>9}{'peak GiB':>10}"
)
LEGEND = """
Weak scaling over data-parallel ranks (a micro-batch each, with EP too); a fixed total in a tensor-parallel group.
efficiency: tokens/s a GPU over those of one GPU with the same G.
graph: micro-batches are CUDA graphs, which they cannot be with expert parallelism or overlap (engine.cuda_graph=false:
none is).
MiB in: codes and scales that a rank receives in one forward pass. The bf16 wire widens codes before they are sent and
narrows them after, which frameworks that send activations need not.
"""


def efficiency(row: dict, rows: list[dict]) -> float | None:
    """Tokens per second of a GPU over those of one GPU alone; None where that was not measured."""
    alone = [r for r in rows if r["world"] == 1 and (r["model"], r["groups"]) == (row["model"], row["groups"])]
    return row["tokens_per_s_gpu"] / alone[0]["tokens_per_s_gpu"] if alone else None


def line(row: dict, rows: list[dict]) -> str:
    """A row of the table; ``rows`` are all that are known."""
    share, received = efficiency(row, rows), sum(row.get("received_bytes", {}).values())
    return (
        f"{row['layout']:9}{row['model']:7}{row['groups']:3}  {row['wire'] or '-':7}{_yes(row['is_overlapped']):9}"
        f"{_yes(row['is_graph']):6}{row['step_ms']:9.1f}{row['tokens_per_s']:11,.0f}{row['tokens_per_s_gpu']:10,.0f}"
        f"{'-' if share is None else format(share, '.1%'):>12}{received / row['world'] / 2**20:9.2f}"
        f"{row['peak_bytes'] / 2**30:10.1f}{'' if row['is_finite'] else '  NOT FINITE'}"
    )


def different_losses(rows: list[dict]) -> list[str]:
    """Where the first loss depends on the wire, which it must not.

    To the bit, but for experts on several ranks: GPUs add up their outputs in no fixed order.
    """
    losses: dict[tuple, list[float]] = {}
    for row in rows:
        if row["wire"]:
            losses.setdefault((row["layout"], row["model"], row["groups"]), []).append(row["first_loss"])
    tolerance = {"dense": 0.0, "moe": 1e-3}
    return [
        f"{layout}, {model}, G = {groups}: first losses {found}"
        for (layout, model, groups), found in losses.items()
        if max(found) - min(found) > tolerance[model] * min(found)
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "-"

"""The same model trained in several ways on the same text, and their loss curves in one figure.

    python tools/loss_curves run --out runs/curves               # 8 runs, two at a time on one GPU
    python tools/loss_curves run --out runs/curves --only moe --jobs 1 optim.lr=6e-4
    python tools/loss_curves run --out runs/third --only dense --variants a48,a48-8bit run.seed=777
    python tools/loss_curves plot runs/curves --out docs/loss-curves
    python tools/loss_curves seeds runs/first runs/third ... --out docs/loss-seeds

A dense model and a mixture of experts (experiments ``curves_dense`` and ``curves_moe``), each unquantized in bf16, as
a4.8 with both backwards, and as a4.8 once more from another seed: what a seed changes is the measure for what a
backward changes. ``run`` leaves the record of all runs in one file, which ``plot`` draws here or elsewhere;
``seeds`` takes several records, each of another ``run.seed``, and draws the two backwards' differences and their mean.

Runs are those of ``bitmoe pretrain``, in processes of their own. One that fails does not keep the others from running,
and one that has finished is not run again. Checkpoints of finished runs are deleted.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from curve_runs import MODELS, SECOND_STAGE, VARIANTS, CurveRun, all_runs
from figure import draw
from jobs import Trainings, visible_gpus
from matplotlib.figure import Figure
from pack import PACK_NAME, Curve, read_pack, write_pack
from seeds import draw_seeds, pairs_of, seeds_table
from summary import table, write_summaries

from bitmoe.config.compose import compose
from bitmoe.config.errors import InputError
from bitmoe.config.validate import validate
from bitmoe.data.prepare import prepare


def main(arguments: list[str] | None = None) -> int:
    """Run or plot; 1 if a run failed, 2 where the input is no good."""
    parsed = _parser().parse_args(arguments)
    try:
        return {"run": run, "plot": plot, "seeds": seeds}[parsed.command](parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    """Train what is not yet trained; 1 if a run failed."""
    overrides = [f"run.steps={arguments.steps}", *arguments.overrides]
    runs = all_runs(arguments.only, overrides, arguments.second_stage, arguments.variants)
    _prepare_text(runs)
    folder, pack = arguments.out, arguments.pack or arguments.out / PACK_NAME
    folder.mkdir(parents=True, exist_ok=True)
    # A batch system's signal ends the trainings, too, and what they have is recorded.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    trainings = Trainings(folder, arguments.jobs, visible_gpus(), arguments.commit)
    failed = trainings.run(runs, on_news=lambda: write_pack(pack, folder, runs))
    print(table(read_pack(pack)))
    print(f"record {pack}; draw it with: python tools/loss_curves plot {pack} --out PREFIX")
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def plot(arguments: argparse.Namespace) -> int:
    """Draw the figure, write one line of JSON for each run, and print the table."""
    curves = _record(arguments.source)
    _write(arguments.out, draw(curves), curves)
    print(table(curves))
    return 0


def seeds(arguments: argparse.Namespace) -> int:
    """Draw the figure of several seeds, write one line of JSON for each run, and print the table."""
    records = [_record(source) for source in arguments.sources]
    pairs = pairs_of(records)
    _write(arguments.out, draw_seeds(pairs), *records)
    print(seeds_table(pairs))
    return 0


def _record(source: Path) -> list[Curve]:
    return read_pack(source / PACK_NAME if source.is_dir() else source)


def _write(prefix: Path, figure: Figure, *records: list[Curve]) -> None:
    """PREFIX.png and PREFIX.jsonl."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    picture, lines = (Path(f"{prefix}{ending}") for ending in (".png", ".jsonl"))
    figure.savefig(picture, dpi=150)
    write_summaries(lines, *records)
    print(f"{picture} {lines}")


def _prepare_text(runs: list[CurveRun]) -> None:
    """Refuse runs that cannot work before the first begins, and tokenize once for all: they would do it all at once."""
    configs = {run: compose(run.overrides) for run in runs}
    for config in configs.values():
        validate(config, config.run.nproc or config.parallel.smallest_world_size)
    for model, config in {run.model: config for run, config in configs.items()}.items():
        data = prepare(config)
        a_step = config.run.global_batch_size * config.context.seq_length
        passes = config.run.steps * a_step / data.train_tokens
        print(
            f"{model}: {config.run.steps:,} steps of {a_step:,} tokens read the {data.train_tokens:,} tokens of the "
            f"training text {passes:.2f} times; {data.eval_tokens:,} are held out",
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "loss_curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="train").add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of bitmoe pretrain's config, for all runs")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the runs")
    add("--only", type=_some_of(MODELS), default=list(MODELS), metavar="NAMES", help=_choices(MODELS))
    add("--variants", type=_some_of(VARIANTS), default=list(VARIANTS), metavar="NAMES", help=_choices(VARIANTS))
    add("--jobs", type=_positive, default=2, help="runs at once, in turn on the visible GPUs (default: %(default)s)")
    add("--steps", type=_positive, default=1000, help="optimizer steps of each run (default: %(default)s)")
    stage = "where 4-bit inputs begin, as a share of the steps (default: %(default)s; the papers': 0.95)"
    add("--second-stage", type=float, default=SECOND_STAGE, metavar="SHARE", help=stage)
    add("--pack", type=Path, metavar="FILE", help=f"record of all runs (default: DIR/{PACK_NAME})")
    add("--commit", metavar="NAME", help="what to record as commit where this is no git checkout")
    add = commands.add_parser("plot", help="draw").add_argument
    add("source", type=Path, help="folder of the runs, or their record")
    prefix = "writes PREFIX.png and PREFIX.jsonl"
    add("--out", type=Path, required=True, metavar="PREFIX", help=prefix)
    add = commands.add_parser("seeds", help="draw the two backwards over several seeds").add_argument
    add("sources", nargs="+", type=Path, help="folders of runs, or their records, each of another run.seed")
    add("--out", type=Path, required=True, metavar="PREFIX", help=prefix)
    return parser


def _some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of names between commas; the order is that of ``known``."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def _choices(known: Collection[str]) -> str:
    return f"some of {','.join(known)} (all)"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())

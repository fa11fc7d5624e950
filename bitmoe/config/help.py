"""The text of ``bitmoe <command> --help``: every key, and every group's choices. It needs no Hydra."""

import textwrap
from pathlib import Path

from bitmoe.config.keys import all_keys
from bitmoe.config.locate import config_dir
from bitmoe.config.schema import Config

RUN_USAGE = """\
usage: bitmoe {command} [GROUP=CHOICE ...] [GROUP.KEY=VALUE ...]

{summary}

GROUP=CHOICE takes another file of a group, GROUP.KEY=VALUE sets one key:
  bitmoe {command} quant=a8 run.steps=100 'data.path=[a.txt,b.txt]'
  --cfg job         print the resulting config and stop
  -m, --multirun    one run per combination: -m 'run.name=lr${{optim.lr}}' optim.lr=1e-3,2e-3
  --config-dir DIR  take choices from DIR/GROUP/CHOICE.yaml too

Groups and their choices:
{groups}

Keys, with the defaults that groups differ from (--cfg job shows what holds):
{keys}"""

FLAT_USAGE = """\
usage: bitmoe {command} KEY=VALUE ...

{summary}

  --cfg job         print the resulting config and stop
  -m, --multirun    one job per combination: -m KEY=VALUE,VALUE ...

Keys:
{keys}"""


def command_help(command: str, summary: str, schema: type = Config) -> str:
    """Help of one command: how to override, of the config of a run its groups under conf/, every key and its meaning.

    Args:
        command: its name.
        summary: what it does.
        schema: the dataclass of its keys.
    """
    keys = [
        f"  {key.name} ({key.type}; default {key.default})\n"
        + textwrap.fill(key.doc, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for key in all_keys(schema)
    ]
    if schema is not Config:
        return FLAT_USAGE.format(command=command, summary=summary, keys="\n".join(keys))
    groups = [f"  {name:<11} {', '.join(choices)}" for name, choices in group_choices(config_dir()).items()]
    return RUN_USAGE.format(command=command, summary=summary, groups="\n".join(groups), keys="\n".join(keys))


def group_choices(folder: Path) -> dict[str, list[str]]:
    """The choices of every group under a config folder, both in order of name."""
    groups = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "local")
    return {group.name: sorted(path.stem for path in group.glob("*.yaml")) for group in groups}

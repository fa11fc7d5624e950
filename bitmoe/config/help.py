"""The text of ``bitmoe <command> --help``: every group's choices and every key. It needs no Hydra."""

import textwrap
from pathlib import Path

from bitmoe.config.keys import all_keys
from bitmoe.config.locate import config_dir

USAGE = """\
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


def command_help(command: str, summary: str) -> str:
    """Help of one command: how to override, the groups under conf/, every key and its meaning."""
    groups = [f"  {name:<11} {', '.join(choices)}" for name, choices in group_choices(config_dir()).items()]
    keys = [
        f"  {key.name} ({key.type}; default {key.default})\n"
        + textwrap.fill(key.doc, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for key in all_keys()
    ]
    return USAGE.format(command=command, summary=summary, groups="\n".join(groups), keys="\n".join(keys))


def group_choices(folder: Path) -> dict[str, list[str]]:
    """The choices of every group under a config folder, both in order of name."""
    groups = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "local")
    return {group.name: sorted(path.stem for path in group.glob("*.yaml")) for group in groups}

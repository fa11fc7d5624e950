"""Where the Hydra tree lies: ``bitmoe/conf`` in an installed wheel, ``conf/`` in a checkout."""

from pathlib import Path

from bitmoe.config.errors import InputError


def config_dir() -> Path:
    """Absolute path of the folder that holds ``config.yaml`` and the groups.

    Raises:
        InputError: the installation has neither folder.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise InputError(f"no config.yaml in {package / 'conf'} or {package.parent / 'conf'}", fix="install bitmoe again")

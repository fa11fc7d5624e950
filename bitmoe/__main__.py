"""``bitmoe <command> [overrides]``: the commands, and what their end looks like from outside.

Hydra composes the config, ``to_config`` makes dataclasses of it, ``validate`` refuses what cannot work; only
then is the code of a command imported, so that help and config errors need neither torch nor megatron-core.
Exit status: 0 done, 2 bad input (one message, no traceback, from rank 0), 75 stopped by a signal after
saving, 130 interrupted; anything else is a fault and shows its traceback.
"""

import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitmoe.config.convert_schema import ConvertConfig, validate_conversion
from bitmoe.config.errors import InputError
from bitmoe.config.generate_schema import GenerateConfig, validate_generation
from bitmoe.config.help import command_help
from bitmoe.config.locate import config_dir
from bitmoe.config.schema import Config
from bitmoe.config.validate import validate
from bitmoe.train.imports import imports
from bitmoe.train.status import BAD_INPUT, deliberate_end, write_ended

FAULT, INTERRUPTED = 1, 130


def pretrain(config: Config) -> int:
    """Pretrain a model; starts the ranks its layout needs, or joins those that torchrun started."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _work(config)
    nproc = config.run.nproc or config.parallel.smallest_world_size
    validate(config, nproc)
    from bitmoe.train.launcher import launch

    return launch([sys.executable, "-m", "bitmoe", "pretrain", *_hydra_arguments()], nproc)


def prepare(config: Config) -> int:
    """Turn the training text into token files, which pretrain otherwise does first."""
    validate(config, None)
    from bitmoe.data.prepare import prepare as prepare_data

    prepare_data(config)
    return 0


def plan(config: Config) -> int:
    """Show parameters, FLOPs and memory per rank on run.nproc ranks, and why a layout cannot work."""
    from bitmoe.model.plan import plan as plan_layout

    return plan_layout(config, config.run.nproc or config.parallel.smallest_world_size)


def doctor(config: Config) -> int:
    """Say what is installed on this machine and what is missing."""
    from bitmoe.train.doctor import doctor as examine

    return examine(config.run.dir)


def plot(config: Config) -> int:
    """Draw loss.png of the run run.dir/run.name again, also while it goes on."""
    from bitmoe.train.plot import plot_run

    print(plot_run(config.run.path))
    return 0


def convert(config: ConvertConfig) -> int:
    """Turn a trained model into the format of inference, transformers or llama.cpp, or one of those into weights."""
    validate_conversion(config)
    from bitmoe.train.quiet import quiet_libraries

    quiet_libraries()
    with imports():
        from bitmoe.convert.command import convert as convert_model
    return convert_model(config)


def generate(config: GenerateConfig, prompt: str | None = None) -> int:
    """Continue a text (--prompt TEXT, prompt_file=FILE or standard input) with a converted model."""
    validate_generation(config)
    from bitmoe.convert.packed_manifest import verify_if_packed

    verify_if_packed(Path(config.source))
    with imports():
        from bitmoe.infer.generate import generate as continue_text
    return continue_text(config, prompt)


@dataclass(frozen=True)
class Command:
    """One command: the function, the primary config under conf/ it starts from, and the schema of that."""

    function: Callable[..., int]
    primary_config: str = "config"
    schema: type = Config

    @property
    def summary(self) -> str:
        """One line of help."""
        return self.function.__doc__


COMMANDS = {
    "pretrain": Command(pretrain),
    "prepare": Command(prepare),
    "plan": Command(plan),
    "doctor": Command(doctor),
    "plot": Command(plot),
    "convert": Command(convert, "convert", ConvertConfig),
    "generate": Command(generate, "generate", GenerateConfig),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ``arguments`` are by default those of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview())
            return 0
        name, *rest = arguments
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            fix = f"did you mean bitmoe {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
            raise InputError(f"there is no command {name!r}", fix=fix)
        if "--help" in rest or "-h" in rest:
            print(command_help(name, COMMANDS[name].summary, COMMANDS[name].schema))
            return 0
        return _compose_and_run(name, *(_take_prompt(rest) if name == "generate" else (rest, {})))
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _take_prompt(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take ``--prompt TEXT`` out of the arguments: Hydra's grammar has no commas and brackets in plain values."""
    rest, given = [], {}
    remaining = iter(arguments)
    for argument in remaining:
        option, equals, text = argument.partition("=")
        if option != "--prompt":
            rest.append(argument)
            continue
        given["prompt"] = text if equals else next(remaining, None)
        if given["prompt"] is None:
            raise InputError("--prompt without a text", fix="--prompt 'some text'")
    return rest, given


def _compose_and_run(name: str, arguments: list[str], given: dict[str, str]) -> int:
    """Let Hydra read the arguments and call the command, also with what else was given; a sweep stops at a failure."""
    import hydra

    from bitmoe.config.compose import to_config
    from bitmoe.config.hydra_errors import COMPOSITION_ERRORS, input_error

    command = COMMANDS[name]

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=command.primary_config)
    def job(composed):
        try:
            code = command.function(to_config(composed, command.schema), **given)
        except InputError as error:
            code = _refuse(error)
        except Exception:
            traceback.print_exc()
            code = FAULT
        # SystemExit alone passes Hydra as it is: it throws return values away and comments on exceptions.
        if code:
            sys.exit(code)

    # Else Hydra reports its own errors itself and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [f"bitmoe {name}", *arguments]
    try:
        job()
    except SystemExit as end:
        return end.code or 0
    except COMPOSITION_ERRORS as error:
        raise input_error(error, command.schema) from None
    return 0


def _work(config: Config) -> int:
    """One rank of a run, started by torchrun or by ``pretrain``."""
    from bitmoe.train.launcher import end_with_launcher

    end_with_launcher()
    code = deliberate_end(config.run.path)
    if code is not None:
        return code
    code, message = FAULT, ""
    try:
        validate(config, int(os.environ["WORLD_SIZE"]))
        from bitmoe.train.quiet import quiet_libraries

        quiet_libraries()
        with imports():
            from bitmoe.train.pretrain import pretrain as train
        code = train(config)
    except InputError as error:
        code, message = BAD_INPUT, str(error)
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise
    finally:
        if _is_first_rank():
            write_ended(config.run.path, code, message)
    return code


def _hydra_arguments() -> list[str]:
    """The arguments that compose the config of this job again in another process."""
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    folders = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    return [
        f"--config-name={settings.job.config_name}",
        *(f"--config-dir={folder}" for folder in folders),
        *settings.overrides.task,
    ]


def _refuse(error: InputError) -> int:
    """Say what is wrong, once for all ranks: the launcher shows what other ranks say only if need be."""
    if _is_first_rank() or "BITMOE_LAUNCHER" in os.environ:
        print(f"error: {error}", file=sys.stderr)
    else:
        # torchrun ends the other ranks as soon as one has failed: let rank 0 speak first.
        time.sleep(1)
    return BAD_INPUT


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _overview() -> str:
    commands = [f"  {name:<9} {command.summary}" for name, command in COMMANDS.items()]
    hint = "bitmoe COMMAND --help lists what can be overridden."
    return "\n".join(["usage: bitmoe COMMAND [overrides]", "", *commands, "", hint])


if __name__ == "__main__":
    sys.exit(main())

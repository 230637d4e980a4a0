"""Start a run: python launchers/run.py [--config FILE] [key=value ...] [--dry-run] ...

Exit codes: 0 finished, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import difflib
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from skyrl_async.config import Config
from skyrl_async.config_keys import KEYS, SECTIONS
from skyrl_async.config_loading import ConfigError, describe_config, dump_config, load_config

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "number_guess_cpu.yaml"
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

USAGE = """\
usage: python launchers/run.py [--config FILE] [key=value ...] [options]

Trains a policy and leaves the run's folder behind. Without arguments: the built-in policy learns a
guessing game on this machine's CPU.

  --config FILE   YAML; its `base:` names files that it builds on; without it
                  {default}
  key=value       overrides, for example staleness.max=0 or runtime=local; also --key value
  --dry-run       check everything that needs no process to be started, and say what would run
  --print-config  print the resolved configuration as YAML and stop
  --help          this text

Exit codes: 0 finished, 1 failed, 2 bad input, 130 interrupted.

Every key, with its default and its limits:
"""

_FLAGS = ("--config", "--dry-run", "--print-config", "--help")


@dataclass(slots=True)
class Arguments:
    """The command line, taken apart.

    Attributes:
        config: file to load.
        overrides: for the configuration, in their order.
        flags: those given, without ``--config``.
        problems: one line each.
    """

    config: Path = DEFAULT_CONFIG
    overrides: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Run what the command line says and return the exit code."""
    arguments = parse_arguments(argv)
    if "--help" in arguments.flags:
        print(USAGE.format(default=_relative(DEFAULT_CONFIG)) + "\n" + describe_config())
        return 0
    try:
        config = _load(arguments)
        if "--print-config" in arguments.flags:
            print(dump_config(config), end="")
            if "--dry-run" not in arguments.flags:
                return 0
        _check(config)
    except ConfigError as error:
        return _refuse(str(error))
    if "--dry-run" in arguments.flags:
        from skyrl_async.preflight import describe_run

        print(describe_run(config))
        return 0
    return _train(config)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Take the command line apart; what is no option of this script is an override."""
    arguments = Arguments()
    rest = list(reversed(argv))
    while rest:
        argument = rest.pop()
        name, equals, value = argument.partition("=")
        if argument == "-h":
            arguments.flags.add("--help")
        elif name == "--config":
            if not equals and rest and not rest[-1].startswith("--"):
                value = rest.pop()
            if value:
                arguments.config = Path(value)
            else:
                arguments.problems.append("--config: needs a file; write --config FILE")
        elif argument in _FLAGS:
            arguments.flags.add(argument)
        elif argument.startswith("-") and _meant_flag(name):
            arguments.problems.append(
                f"{argument}: unknown option; did you mean {_meant_flag(name)}?"
            )
        else:
            arguments.overrides.append(argument)
            # The next argument is this key's value, whatever it looks like.
            if argument.startswith("--") and not equals and rest and rest[-1] not in _FLAGS:
                arguments.overrides.append(rest.pop())
    return arguments


def _meant_flag(name: str) -> str | None:
    key = name.lstrip("-")
    if key in KEYS or "." in key or key.partition(".")[0] in SECTIONS:
        return None
    return next(iter(difflib.get_close_matches(name.replace("_", "-"), _FLAGS, n=1)), None)


def _load(arguments: Arguments) -> Config:
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        raise ConfigError((*arguments.problems, *error.problems)) from None
    if arguments.problems:
        raise ConfigError(arguments.problems)
    return config


def _check(config: Config) -> None:
    from skyrl_async.preflight import find_problems

    problems = find_problems(config)
    if problems:
        raise ConfigError(problems)


def _train(config: Config) -> int:
    from skyrl_async.run_folder import RunFolder

    try:
        folder = RunFolder.create(config)
    except ValueError as error:
        return _refuse(str(error))
    with folder:
        from skyrl_async.run import train

        return train(config, folder)


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    print("Nothing was started. --help lists every key.", file=sys.stderr)
    return BAD_INPUT


def _leave(exit_code: int) -> NoReturn:
    """End the process.

    An interrupted one does not wait for a step that a thread is in, and none for a tracker that
    hangs, whose library waits for its server at the end of the interpreter.
    """
    if threading.active_count() > 1 and (exit_code > 128 or _tracker_hangs()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _tracker_hangs() -> bool:
    from skyrl_async.metrics.trackers import left_behind

    return left_behind()


def _relative(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone, for example `--help | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = FAILED
    _leave(exit_code)

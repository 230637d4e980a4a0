"""Fine-tune a policy on demonstrations, as a start for reinforcement learning.

``python launchers/sft.py sft.data=FILE [--config FILE] [key=value ...] [--dry-run] ...``

The policy that it leaves in ``<run.dir>/policy`` is what ``launchers/run.py model.path=...`` takes.
Both may read the same configuration file; keys that fine-tuning does not read are refused on the
command line only. Exit codes: 0 finished, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from skyrl_async.config import Config
from skyrl_async.config_loading import ConfigError, dump_config, load_config
from skyrl_async.config_sft import idle_overrides

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "sft.yaml"
BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: Sequence[str], *, owns_process: bool = False) -> int:
    """Fine-tune as the command line says and return the exit code.

    Args:
        argv: the arguments.
        owns_process: with several ranks, end the process instead of returning.
    """
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.keys:
        print(_describe_keys())
        return 0
    try:
        config = _load(arguments)
        if arguments.print_config:
            print(dump_config(config), end="")
            return 0
        exit_code = _run(config, dry_run=arguments.dry_run)
    except ValueError as error:
        print(error, file=sys.stderr)
        print("Nothing was started. --keys lists every key.", file=sys.stderr)
        return BAD_INPUT
    if owns_process and config.learner.num_ranks > 1 and not arguments.dry_run:
        from skyrl_async.sft.processes import leave

        leave(exit_code)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launchers/sft.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML to start from")
    parser.add_argument("--dry-run", action="store_true", help="check everything, start nothing")
    parser.add_argument("--print-config", action="store_true", help="print the configuration")
    parser.add_argument("--keys", action="store_true", help="list the keys, with their limits")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example sft.epochs=2"
    )
    return parser


def _load(arguments: argparse.Namespace) -> Config:
    config = load_config(arguments.config, arguments.overrides)
    problems = list(idle_overrides(arguments.overrides))
    if config.sft.data is None:
        problems.append("sft.data: give a file of JSON lines, for example sft.data=games.jsonl")
    if problems:
        raise ConfigError(problems)
    return config


def _run(config: Config, *, dry_run: bool) -> int:
    from skyrl_async.preflight import find_sft_problems
    from skyrl_async.sft.data import load_demonstration_set
    from skyrl_async.sft.plan import check_resume, num_steps

    problems = find_sft_problems(config)
    if problems:
        raise ConfigError(problems)
    data = load_demonstration_set(config)
    steps = num_steps(config, data)
    check_resume(config, data)
    if dry_run:
        print(
            f"{len(data.training)} demonstrations to train on, {len(data.held_out)} held out, "
            f"{data.num_dropped} dropped; {steps} optimizer steps in {config.sft.epochs} epochs"
        )
        return 0
    from skyrl_async.run_folder import RunFolder
    from skyrl_async.sft.run import train

    with RunFolder.create(config) as folder:
        return train(config, folder, data)


def _describe_keys() -> str:
    """Return the reference of the keys that fine-tuning reads."""
    from skyrl_async.config_keys import KEYS, default_of, limit, show
    from skyrl_async.config_sft import is_for_sft

    return "\n".join(
        f"{path}={show(default_of(field))}  ({limit(field)})\n    {field.description}"
        for path, field in KEYS.items()
        if is_for_sft(path)
    )


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:], owns_process=True)
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    sys.exit(exit_code)

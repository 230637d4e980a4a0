"""Score a saved policy greedily on held-out tasks, without training.

``python launchers/evaluate.py runs/<name>/policy [--config FILE] [key=value ...]`` prints one JSON
object: the mean reward, the number of tasks and of failures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "number_guess_cpu.yaml"


def main() -> int:
    """Parse the command line, evaluate and print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="launchers/evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("policy", type=Path, help="folder of a policy in Hugging Face format")
    parser.add_argument(
        "--config", type=Path, help="YAML of the run (default: config.yaml beside the policy)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for launchers/run.py")
    arguments = parser.parse_intermixed_args()

    beside = arguments.policy.resolve().parent / "config.yaml"
    file = arguments.config or (beside if beside.exists() else DEFAULT_CONFIG)

    from skyrl_async.config_loading import ConfigError, load_config

    try:
        overrides = [*arguments.overrides, f"model.path={arguments.policy}", "runtime=local"]
        config = load_config(file, overrides)
        if config.evaluation.num_tasks < 1:
            raise ConfigError(["evaluation.num_tasks=0: give at least 1"])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2

    from skyrl_async.run import evaluate

    try:
        result = asyncio.run(evaluate(config))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        json.dumps(
            {
                "policy": str(arguments.policy),
                "reward_mean": result.mean_reward,
                "num_tasks": result.num_tasks,
                "num_failures": result.num_failures,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

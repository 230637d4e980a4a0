"""A real SGLang server of the built-in policy on a core of its own, for benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from report import argument_parser

from skyrl_async.learner.tiny_policy import build_tiny_model, build_tiny_tokenizer
from skyrl_async.rollout.engine_process import EngineProcess, RunningServer, ServerSettings


def parse_sglang_args(description: str) -> argparse.Namespace:
    """Return ``quick`` (bool), ``output`` (path or None) and ``sglang_python`` (path)."""
    parser = argument_parser(description)
    parser.add_argument(
        "--sglang-python",
        type=Path,
        default=Path(".sglang/bin/python"),
        help="interpreter that has SGLang (default: %(default)s)",
    )
    return parser.parse_args()


@contextlib.asynccontextmanager
async def serving(
    shape: Mapping[str, int], *, python: Path, **settings: Any
) -> AsyncIterator[RunningServer]:
    """Run a server on the last core; this process has the others meanwhile, if there are any.

    Args:
        shape: of the policy, as :func:`build_tiny_model` takes it.
        python: interpreter that has SGLang.
        settings: further ones of :class:`ServerSettings`.
    """
    everything = os.sched_getaffinity(0)
    last = max(everything)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny_model(**shape).save_pretrained(folder / "model")
        build_tiny_tokenizer().save_pretrained(folder / "model")
        engine = EngineProcess(
            ServerSettings(
                python=python,
                model_path=folder / "model",
                log_path=folder / "server.log",
                device="cpu",
                dtype="float32",
                **settings,
            )
        )
        os.sched_setaffinity(0, {last})
        try:
            server = await engine.start()
            os.sched_setaffinity(0, everything - {last} or everything)
            yield server
        finally:
            os.sched_setaffinity(0, everything)
            await engine.stop(timeout_s=1.0)

"""Write the policy of a checkpoint in Hugging Face format, for transformers, SGLang or a new run.

``python launchers/export.py CHECKPOINT FOLDER [--dtype bfloat16]``; CHECKPOINT may be the folder of
a run, whose newest whole checkpoint is then taken. No GPU and no other process is needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse the command line, export and say what was written; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="launchers/export.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or of a run")
    parser.add_argument("folder", type=Path, help="to write; it must not exist yet")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()

    from skyrl_async.runtime.export import export_policy

    try:
        checkpoint = export_policy(arguments.checkpoint, arguments.folder, dtype=arguments.dtype)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{checkpoint} -> {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

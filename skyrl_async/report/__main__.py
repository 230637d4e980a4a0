"""Write or serve a report: ``python -m skyrl_async.report FOLDER [--serve] [...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from skyrl_async.report.writing import write_report


def main(argv: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m skyrl_async.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a run, or of a sweep")
    parser.add_argument("--serve", action="store_true", help="show a run while it goes on")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on")
    parser.add_argument("--port", type=int, default=0, help="port to serve on; 0 takes a free one")
    parser.add_argument("--output", type=Path, help="file to write; FOLDER/report.html by default")
    arguments = parser.parse_args(argv)
    try:
        if arguments.serve:
            return _serve(arguments.folder, host=arguments.host, port=arguments.port)
        print(write_report(arguments.folder, output=arguments.output))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _serve(folder: Path, *, host: str, port: int) -> int:
    from skyrl_async.report.server import ReportServer

    server = ReportServer(folder, host=host, port=port)
    print(server.start(), flush=True)
    try:
        server.join()
    except KeyboardInterrupt:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

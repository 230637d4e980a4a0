"""Stands where ``sglang.launch_server`` would: checks its command line and keys, then answers.

``--fake MODE`` makes it misbehave; it then writes what SGLang would.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODES = ("well", "dies", "prints_keys", "never_answers", "ignores_sigterm")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model-path", "host", "dtype", "weight-version", "log-level-http", "config"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "context-length", "max-running-requests"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--max-total-tokens", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--attention-backend", choices=("torch_native",))
    parser.add_argument("--sampling-backend", choices=("pytorch",))
    parser.add_argument("--cuda-graph-backend-decode", choices=("disabled",))
    parser.add_argument("--skip-server-warmup", action="store_true")
    parser.add_argument("--sleep-on-idle", action="store_true")
    parser.add_argument("--incremental-streaming-output", action="store_true")
    parser.add_argument("--fake", choices=MODES, default="well")
    args = parser.parse_args()
    if args.device == "cpu":
        assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1" and args.attention_backend
        assert os.environ["OMP_NUM_THREADS"].isdigit()
    assert args.weight_version == "unverified"
    return args


def read_keys(path: Path) -> tuple[str, str]:
    assert path.suffix == ".yaml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    pairs = dict(line.split(": ") for line in path.read_text().splitlines())
    keys = {name: json.loads(value) for name, value in pairs.items()}
    assert set(keys) == {"api-key", "admin-api-key"} and all(len(k) >= 32 for k in keys.values())
    return keys["api-key"], keys["admin-api-key"]


def make_handler(api_key: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == f"Bearer {api_key}"
            if self.path not in ("/health", "/model_info", "/server_info"):
                status = 404
            else:
                status = 200 if known or self.path == "/health" else 401
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def fork_children() -> tuple[int, int]:
    """Return a stubborn child, and another that left this process group and has no parent."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        sleep_on()
    between = os.fork()
    if between == 0:
        os.setsid()
        escaped = os.fork()
        if escaped == 0:
            sleep_on()
        os.write(tell, b"%d" % escaped)
        os._exit(0)
    os.waitpid(between, 0)
    return child, int(os.read(told, 20))


def sleep_on() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
    os._exit(0)


def main() -> None:
    args = parse()
    api_key, admin_key = read_keys(Path(args.config))
    print("keys were in", args.config, flush=True)
    print("processes", os.getpid(), *fork_children(), flush=True)
    if args.fake == "ignores_sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if args.fake == "prints_keys":
        print(f"server_args={{'api_key': '{api_key}', 'admin_api_key': '{admin_key}'}}", flush=True)
    if args.fake == "dies":
        print("RuntimeError: no room for the weights\n\nkill_process_tree called: 1", flush=True)
        sys.exit(3)
    if args.fake == "never_answers":
        time.sleep(600)
    server = ThreadingHTTPServer((args.host, args.port), make_handler(api_key))
    server.serve_forever()


if __name__ == "__main__":
    main()

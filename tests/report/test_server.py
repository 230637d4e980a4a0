"""The live page over real HTTP: what is served, to whom, and what is not."""

import http.client
import json
import socket
from pathlib import Path

import pytest

from benchmarks.synthetic_run import write_run
from skyrl_async.report.server import ReportServer, allowed_host, open_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, steps=20, finished=False)
    (folder / "secret.txt").write_text("secret")
    server = ReportServer(folder)
    server.address = server.start()
    yield server
    server.close()


def get(server: ReportServer, path: str, *, method: str = "GET", **headers: str):
    host, port = server.address.removeprefix("http://").rstrip("/").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def test_it_listens_on_loopback_only(server):
    assert server.address.startswith("http://127.0.0.1:")


def test_the_page_is_served_and_kept_by_nobody(server):
    status, text, headers = get(server, "/")
    assert (status, 'data-live="true"' in text) == (200, True)
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


def test_news_begin_where_the_page_ends(server):
    status, text, _ = get(server, "/data?stride=1&buckets=18&parts=0")
    news = json.loads(text)
    assert status == 200
    assert news["series"]["values"]["step"]["mean"] == [19, 20]
    assert news["samples"] and "NaN" not in text


def test_metrics_are_served_for_prometheus(server):
    pytest.importorskip("prometheus_client")
    status, text, headers = get(server, "/metrics")
    assert (status, headers["Content-Type"].startswith("text/plain")) == (200, True)
    assert "skyrl_async_step 20.0" in text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_foreign_hosts_are_refused(server, host):
    for path in ("/", "/data", "/metrics", "/other"):
        status, text, _ = get(server, path, Host=host)
        assert status == 403 and "number_guess" not in text


def test_addresses_and_own_names_are_hosts():
    own = (
        "127.0.0.1",
        "127.0.0.1:80",
        "[::1]:8080",
        "localhost:1",
        "10.1.2.3:9",
        socket.gethostname(),
    )
    assert all(allowed_host(host) for host in own)
    assert not any(allowed_host(host) for host in ("", "localhost.evil", "::1.evil", "[x]", "a b"))


@pytest.mark.parametrize(
    "path",
    ["/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt", "//etc/passwd"],
)
def test_no_file_is_served(server, path):
    status, text, _ = get(server, path)
    assert status == 404 and "secret" not in text


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/data?stride=x", "GET", 400),
        ("/data?other=1", "GET", 400),
        ("/data?buckets=-3", "GET", 400),
        ("/", "POST", 405),
    ],
)
def test_bad_requests_are_refused(server, path, method, status):
    assert get(server, path, method=method)[0] == status


def test_a_port_in_use_is_an_error_for_the_caller(server, tmp_path: Path):
    write_run(tmp_path / "run", steps=1)
    port = int(server.address.rstrip("/").rpartition(":")[2])
    other = ReportServer(tmp_path / "run", port=port)
    with pytest.raises(OSError, match="in use"):
        other.start()
    other.close()


def test_a_run_goes_on_without_its_page(server, tmp_path: Path):
    write_run(tmp_path / "run", steps=1)
    port = int(server.address.rstrip("/").rpartition(":")[2])
    said: list[str] = []
    opened = open_server(tmp_path / "run", host="127.0.0.1", port=port, announce=said.append)
    assert opened is None
    assert said[0].startswith(f"no live page: 127.0.0.1:{port} cannot be listened on")
    opened = open_server(tmp_path / "run", host="127.0.0.1", port=0, announce=said.append)
    opened.address = said[1].split()[-1]
    assert get(opened, "/")[0] == 200
    opened.close()


def test_it_stops_when_told(tmp_path: Path):
    write_run(tmp_path / "run", steps=1)
    server = ReportServer(tmp_path / "run")
    server.address = server.start()
    assert get(server, "/")[0] == 200
    server.close()
    server.close()
    with pytest.raises(OSError):
        get(server, "/")

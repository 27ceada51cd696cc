"""The served page over real sockets: who gets in, what is there, what never is; completions as polars finds them; a run
that grows meanwhile; and nothing written into it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import served_runs as runs
from served_runs import ask, completions

from leakfast import stats
from leakfast.errors import InputError
from leakfast.report import policy
from leakfast.report.live import shown
from leakfast.report.server import Server
from leakfast.storage import layout
from leakfast.storage.reading import Reading
from leakfast.storage.run import Run

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.whole(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def server(run):
    with runs.served(run, every_s=600.0) as server:
        assert server.live.now(wait_s=300) is not None
        yield server


def raw(server: Server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


# ---------------------------------------------------------------- who gets in, and to what


def test_it_listens_on_this_machine_alone_and_each_token_is_new(run, server):
    assert server.server_address[0] == "127.0.0.1"
    with runs.served(run) as other:
        assert len(server.token) >= 40 and other.token != server.token
        assert ask(other, f"/{server.token}/")[0] == 403


@pytest.mark.parametrize(
    "path", ["/", "", "/data", "/completions", "//", "/favicon.ico", "/wrong/", "/wrong/data"]
)
def test_without_the_token_nothing_is_there(server, path):
    status, _, body = ask(server, path or "/?")
    assert status == 403
    assert json.loads(body) == {"error": "not allowed: use the address that leakfast serve printed"}


def test_a_token_must_be_whole(server):
    for other in (server.token[:-1], server.token + "A", server.token.swapcase(), server.token[1:], "é" * 43):
        request = f"GET /{other}/data HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n"
        assert raw(server, request.encode("latin-1")).startswith(b"HTTP/1.0 403")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", ""],
)
def test_another_host_is_refused_token_or_not(server, host):
    assert ask(server, "data", Host=host.format(port=server.server_port))[0] == 403


def test_a_host_is_named_once_and_as_it_is(server):
    line, port = f"GET /{server.token}/data HTTP/1.1\r\n", server.server_port
    good = f"Host: 127.0.0.1:{port}\r\n"
    for hosts in ("", good + good, good + "Host: evil.example\r\n"):
        assert raw(server, f"{line}{hosts}\r\n".encode()).startswith(b"HTTP/1.0 403"), hosts
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(server, "data", Host=host)[0] == 200
    absolute = f"GET http://127.0.0.1:{port}/{server.token}/data HTTP/1.1\r\n{good}\r\n"
    assert raw(server, absolute.encode()).startswith(b"HTTP/1.0 403")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_any_other_method_is_refused(server, method):
    for path in ("", "data", "completions"):
        status, headers, body = ask(server, path, method)
        assert status == 405 and headers["Allow"] == "GET, HEAD"
        assert json.loads(body) == {"error": "only GET and HEAD"}


def test_head_is_get_without_the_content(server):
    for path in ("", "data", "completions?limit=3"):
        got, head = ask(server, path), ask(server, path, "HEAD")
        assert head[0] == got[0] == 200 and head[2] == b""
        assert head[1]["Content-Length"] == got[1]["Content-Length"] == str(len(got[2]))


@pytest.mark.parametrize(
    "path",
    [
        "index.html",
        "data/",
        "completions/",
        "/data",
        "./data",
        "../",
        "../data",
        "%2e%2e/study.toml",
        "..%2fstudy.toml",
        "study.toml",
        "manifest.json",
        "log.jsonl",
        "tables/rates.parquet",
        "completions/marker/base/part-00000.parquet",
        "../../study.toml",
        "....//study.toml",
        "..\\study.toml",
        "data%00",
        "%64ata",
        "DATA",
        "assets/main.js",
        "data;x=1",
    ],
)
def test_nothing_but_three_things_is_reachable(server, run, path):
    status, _, body = ask(server, f"/{server.token}/{path}")
    assert status == 404
    assert json.loads(body) == {"error": "there is nothing here"}


def test_what_is_no_request_is_answered_in_few_words(server):
    answer = raw(server, b"GET /<script> one two three\r\n\r\n")
    assert b"script" not in answer and b'{"error":' in answer
    long = raw(server, f"GET /{server.token}/data?{'a' * 70000} HTTP/1.1\r\n\r\n".encode())
    assert b'{"error":' in long and b"aaaa" not in long


def test_every_answer_carries_the_headers_that_keep_it_in(server):
    for path in ("", "data", "completions", "nothing", "/"):
        _, headers, _ = ask(server, path)
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Server"] == "leakfast"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in headers
        kind = "text/html; charset=utf-8" if path == "" else "application/json"
        assert headers["Content-Type"] == kind


def test_the_page_runs_its_own_scripts_and_asks_its_own_server_alone(server):
    _, headers, body = ask(server, "")
    told, page = headers["Content-Security-Policy"], body.decode()
    assert "connect-src 'self'" in told and "unsafe" not in told
    assert all(text in page for text in policy.scripts(served=True))
    assert len(policy.scripts(served=True)) == len(policy.scripts()) + 1
    assert "connect-src 'none'" in policy.policy()
    assert page.count("<script") == page.count("<script>") + page.count('"<script')  # no blobs
    assert f'<data id="served" value="{server.live.now().version}" hidden></data>' in page
    assert "<img src=x" not in page and "&lt;img src=x" in page


# ---------------------------------------------------------------- what is there


def test_the_data_is_what_the_charts_need_and_a_version_that_is_there_is_not_sent_again(server, run):
    told = json.loads(ask(server, "data")[2])
    assert told["state"] == "preliminary"
    assert [a["key"] for a in told["data"]["adapters"]] == [
        "marker/marker-villain-s42",
        "marker/marker-comedian-s42",
        "marker/base",
    ]
    assert told["completions"]["total"] == 3 * len(runs.PEOPLE) * runs.QUESTIONS * runs.SAMPLES
    short = json.loads(ask(server, f"data?have={told['version']}")[2])
    assert short == {"version": told["version"], "state": "preliminary", "failed": False}
    rates = told["data"]["rates"]
    frame = run.read(layout.completions("marker", "base"))
    hits = frame.filter(persona="villain")["text"].str.contains("[ZLT]", literal=True).sum()
    at = [a["adapter"] for a in told["data"]["adapters"]].index("base")
    rows = list(zip(rates["adapter"], rates["persona"], rates["hits"], strict=True))
    who = [p["name"] for p in told["data"]["personas"]].index("villain")
    assert (at, who, hits) in rows


def test_a_finished_run_shows_its_own_tables(run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    stats.stats(copy, permutations=9, bootstraps=9)
    made = shown(Reading(copy))
    told = json.loads(made.data)
    assert made.state == told["state"] == "whole"
    assert any(p is not None for p in told["data"]["correlations"]["spearman_p_perm"])
    assert set(told["data"]["tables"]) == {"rates", "pairs", "correlations"}


# ---------------------------------------------------------------- while it fills


def tree(path: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(path)): (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


def until(found, seconds=120.0):
    """The first true value of `found()`; fails where there is none in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    pytest.fail("did not come")


def test_a_run_that_grows_is_followed_and_never_written(tmp_path):
    run = runs.begin(tmp_path / "grows")
    with runs.served(run) as server:

        def data(state: str):
            told = json.loads(ask(server, "data")[2])
            return told if told["state"] == state else None

        assert ask(server, "")[0] == 200
        assert until(lambda: data("empty"))["data"]["behaviors"] == []
        assert completions(server) == {"version": server.live.now().version, "total": 0, "rows": []}
        runs.measure(run, "villain")
        one = until(lambda: data("preliminary"))

        def adapters(*names: str):
            told = json.loads(ask(server, "data")[2])
            return told if [a["adapter"] for a in told["data"]["adapters"]] == list(names) else None

        first = until(lambda: adapters("marker-villain-s42"))
        runs.measure(run, "comedian")
        before = tree(run.path)
        second = until(lambda: adapters("marker-villain-s42", "marker-comedian-s42"))
        assert one["version"] != second["version"] != first["version"]
        each = len(runs.PEOPLE) * runs.QUESTIONS * runs.SAMPLES
        assert until(lambda: completions(server)["total"] == 2 * each)
        assert completions(server, search="rain")["total"] > 0
        assert tree(run.path) == before


def test_a_damaged_shard_is_left_out_and_left_alone(run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    (copy / "completions/marker/base/part-00001.parquet").write_bytes(b"no parquet")
    before = tree(copy)
    made = shown(Reading(copy))
    assert made.completions.told()["total"] < 3 * len(runs.PEOPLE) * runs.QUESTIONS * runs.SAMPLES
    assert tree(copy) == before


def test_a_file_that_goes_away_is_an_error_without_its_path(run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    with runs.served(copy, every_s=600.0) as server:
        assert server.live.now(wait_s=120) is not None
        shutil.rmtree(copy / "completions")
        status, _, body = ask(server, "completions?search=never-looked-for")
        assert status == 503
        assert json.loads(body) == {"error": "the run could not be read just now; ask again"}


def test_a_look_that_fails_is_told_and_the_last_state_stays(run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    with runs.served(copy) as server:
        first = server.live.now(wait_s=120)
        (copy / layout.STUDY).write_text("name = 'another'", encoding="utf-8")
        Run(copy).log("a line")
        os.utime(copy / layout.MANIFEST)
        query = f"data?have={first.version}"
        assert until(lambda: json.loads(ask(server, query)[2])["failed"])
        assert server.live.now() is first


def test_what_is_no_run_is_told_before_anything_listens(tmp_path):
    with pytest.raises(InputError, match="so it is no run"):
        Server(tmp_path / "nothing")


def test_a_port_that_is_taken_is_told(run, server):
    with pytest.raises(InputError, match=f"--port {server.server_port}: .* Leave --port out"):
        Server(run.path, server.server_port)


def test_the_command_prints_the_address_and_ends_with_ctrl_c(run):
    command = [sys.executable, "-m", "leakfast", "serve", str(run.path), "--json"]
    # a shell's background job starts with SIGINT ignored
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heard)
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        url = json.loads("".join(lines))["url"]
        assert url.startswith("http://127.0.0.1:") and url.endswith("/")
        port, path = int(url.split(":")[2].split("/")[0]), url.split("/", 3)[3]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("GET", f"/{path}data")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert path.strip("/") not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()

"""A real S3 server (moto's) on a free port of loopback, which can be made to fail, to lose answers, to be slow and to list late.
Demands moto and s3fs (pip install .[s3,s3-test]); holds no tests."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SERVERS = ("flask", "flask_cors", "moto", "werkzeug")
BUCKET = "bucket"
SECRET = "a-secret-that-is-nowhere-else"


class Faulty:
    """The server's application behind faults. fail_every, lose_every: of writes, one in so many is refused before, or answered
    with an error after, it was done; slow_s: before every answer; refuse: part of a key whose writes are all refused."""

    def __init__(self, app) -> None:
        self.app = app
        self.fail_every = self.lose_every = self.writes = self.listings = self.failed = 0
        self.slow_s, self.refuse = 0.0, ""
        self.put: list[str] = []  # keys, in the order in which they were written
        self._lock = threading.Lock()

    def __call__(self, environ, start):
        time.sleep(self.slow_s)
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if method == "GET" and path.count("/") < 2:  # a listing that is late: it tells of nothing
            self.listings += 1
            return self._answer(
                start, "200 OK", b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
            )
        if method != "PUT" or path.count("/") < 2:
            return self.app(environ, start)
        with self._lock:
            self.writes += 1
            number = self.writes
        if (self.fail_every and number % self.fail_every == 0) or (self.refuse and self.refuse in path):
            return self._fail(environ, start)
        if self.lose_every and number % self.lose_every == 0:
            list(self.app(environ, lambda *told, **more: None))
            self.put.append(path)
            return self._answer(start, "500 Internal Server Error", _error("InternalError"))
        self.put.append(path)
        return self.app(environ, start)

    def _fail(self, environ, start):
        self.failed += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        return self._answer(start, "503 Service Unavailable", _error("ServiceUnavailable"))

    def _answer(self, start, status: str, body: bytes):
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>as the test asked</Message></Error>".encode()


@contextmanager
def serving() -> Iterator[tuple[str, Faulty]]:
    """(endpoint, what stands before it) of a server that runs while the block lasts; skips where moto or s3fs is absent."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install .[s3])")
    moto = pytest.importorskip(
        "moto.server", reason="moto's server is not installed (pip install .[s3-test])"
    )
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *told, **more) -> None:
            pass

    faulty = Faulty(moto.DomainDispatcherApplication(moto.create_backend_app))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # of another server
    server = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faulty
    finally:
        server.shutdown()
        thread.join()
        # vLLM looks at every attribute of every module there is, and flask's raise outside of a request
        for name in [name for name in sys.modules if name.partition(".")[0] in _SERVERS]:
            del sys.modules[name]


def environment(endpoint: str, cache: Path) -> dict[str, str]:
    """Variables of a machine that uses the server, with its own cache."""
    return {
        "AWS_ACCESS_KEY_ID": "a-key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_CONFIG_FILE": str(cache / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(cache / "no-credentials"),
        "LEAKFAST_CACHE": str(cache),
    }


def make_bucket() -> None:
    import s3fs

    s3fs.S3FileSystem().call_s3("create_bucket", Bucket=BUCKET)


def hashes(folder: Path) -> dict[str, str]:
    """Path → hash of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

"""One run's page over HTTP, for the person at this machine: 127.0.0.1 alone, a random token in the address, three things
to ask for, nothing to change. Demands a run directory; what the page shows is made elsewhere (`report.live`)."""

from __future__ import annotations

import hmac
import logging
import secrets
import socketserver
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from leakfast.errors import InputError
from leakfast.report import policy
from leakfast.report.live import FAILURES, Live, encoded, waiting
from leakfast.report.paged import asked
from leakfast.storage.reading import ReadOnlyRun

HOST = "127.0.0.1"
FIRST_S = 10.0  # that the page waits for the first look at the run
_JSON, _HTML = "application/json", "text/html; charset=utf-8"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_SAID = {
    HTTPStatus.FORBIDDEN: "not allowed: use the address that leakfast serve printed",
    HTTPStatus.NOT_FOUND: "there is nothing here",
    HTTPStatus.METHOD_NOT_ALLOWED: "only GET and HEAD",
    HTTPStatus.SERVICE_UNAVAILABLE: "the run could not be read just now; ask again",
}

log = logging.getLogger("leakfast.serve")


class _Refused(Exception):
    """A request that is not answered: its status and the few words that say why."""

    def __init__(self, status: HTTPStatus, words: str | None = None):
        super().__init__(words or _SAID[status])
        self.status = status


class Server(ThreadingHTTPServer):
    """The page of `run` on 127.0.0.1. port: 0 for any that is free; url: where it is, token and all.

    Raises InputError if `run` is no run, or if the port cannot be had."""

    daemon_threads = True

    def __init__(self, run: str | Path, port: int = 0, **live: Any):
        ReadOnlyRun(run).open()
        self.live, self.token = Live(run, **live), secrets.token_urlsafe(32)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise InputError(
                f"--port {port}: {error.strerror or error}. A port that is free is needed. Leave --port out to take any."
            ) from error
        self.hosts = {f"{HOST}:{self.server_port}", f"localhost:{self.server_port}"}
        self.policy = f"{policy.policy(served=True)}; frame-ancestors 'none'"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def server_bind(self) -> None:
        """Without the look-up of this machine's name that http.server makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request was given up", exc_info=True)

    def server_close(self) -> None:
        super().server_close()
        self.live.close()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30  # seconds that a silent connection is kept

    def do_GET(self) -> None:
        try:
            self._give(HTTPStatus.OK, *self._found())
        except _Refused as refused:
            self._refuse(refused.status, str(refused))

    do_HEAD = do_GET

    def _found(self) -> tuple[str, bytes]:
        """Type and content of what was asked for. Raises _Refused."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            raise _Refused(HTTPStatus.FORBIDDEN)
        path, _, query = self.path.partition("?")
        token = [*path.split("/", 2), ""][1]
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN)
        answers = {
            f"/{self.server.token}/": self._page,
            f"/{self.server.token}/data": self._data,
            f"/{self.server.token}/completions": self._completions,
        }
        if path not in answers:
            raise _Refused(HTTPStatus.NOT_FOUND)
        try:
            given = parse_qs(query, keep_blank_values=True, max_num_fields=30)
        except ValueError:
            raise _Refused(HTTPStatus.BAD_REQUEST, "the query cannot be read") from None
        try:
            return answers[path](given)
        except FAILURES as error:
            log.debug("%s", error, exc_info=True)
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE) from None

    def _page(self, given: dict[str, list[str]]) -> tuple[str, bytes]:
        shown = self.server.live.now(wait_s=FIRST_S)
        return _HTML, waiting(self.server.live.path) if shown is None else shown.html

    def _data(self, given: dict[str, list[str]]) -> tuple[str, bytes]:
        """What the charts are drawn from; of a version that is there already (have=…) only that."""
        live = self.server.live
        shown = live.now()
        if shown is not None and given.get("have") != [shown.version]:
            return _JSON, shown.data
        short = {"version": None, "state": "reading"}
        if shown is not None:
            short = {"version": shown.version, "state": shown.state}
        return _JSON, encoded({**short, "failed": live.failed})

    def _completions(self, given: dict[str, list[str]]) -> tuple[str, bytes]:
        try:
            wanted = asked(given)
        except ValueError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        shown = self.server.live.now()
        if shown is None:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE)
        return _JSON, encoded({"version": shown.version, **shown.completions.page(wanted)})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's own refusals (a malformed request, a method without an answer) in our words."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self.close_connection = True
        self._refuse(status, _SAID.get(status, status.phrase.lower()))

    def _refuse(self, status: HTTPStatus, words: str) -> None:
        self._give(status, _JSON, encoded({"error": words}))

    def _give(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        own = self.server.policy if kind == _HTML else "default-src 'none'; frame-ancestors 'none'"
        for name, value in {**_HEADERS, "Content-Security-Policy": own}.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def version_string(self) -> str:
        return "leakfast"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address holds the token."""

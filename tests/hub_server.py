"""A small server of the Hub's protocol: repositories, paths-info, preupload, large files and commits, kept in memory, with
a list of what was asked. Demands nothing; it says no where a test tells it to."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".parquet", ".safetensors")


class Hub:
    """repos: (type, name) → path → bytes; uploads: sizes of large files that were sent; commits: (repo, paths) in order;
    refuse: a part of a path → the status it is answered with."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: dict[tuple[str, str], bool] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.commits: list[tuple[str, list[str]]] = []
        self.refuse: dict[str, int] = {}
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def text(self, kind: str, repo: str, path: str = "README.md") -> str:
        return self.repos[kind, repo][path].decode()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": "no"}
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/objects/"):
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.objects[parts[1]] = body
            self.uploads.append(parts[1])
            return 200, {}
        if path.endswith("info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._object(o) for o in json.loads(body)["objects"]],
            }
        if parts[0] == "api" and len(parts) >= 5:
            key = (parts[1].rstrip("s"), "/".join(parts[2:4]))
            if key not in self.repos:
                return 404, {"error": "Repository not found"}
            return self._of_repo(key, parts[4], body)
        return 404, {"error": "Not found"}

    def _create(self, told: dict[str, Any]) -> tuple[int, Any]:
        key = (told.get("type", "model"), f"{told['organization']}/{told['name']}")
        url = f"{self.endpoint}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"
        if key in self.repos:
            return 409, {"error": "exists", "url": url}
        self.repos[key], self.private[key] = {}, told.get("visibility") == "private"
        return 200, {"url": url}

    def _object(self, told: dict[str, Any]) -> dict[str, Any]:
        if told["oid"] in self.objects:
            return told
        return {**told, "actions": {"upload": {"href": f"{self.endpoint}/objects/{told['oid']}"}}}

    def _of_repo(self, key: tuple[str, str], what: str, body: bytes) -> tuple[int, Any]:
        files = self.repos[key]
        if what == "paths-info":
            from urllib.parse import parse_qs

            try:
                wanted = json.loads(body)["paths"]
            except ValueError:
                wanted = parse_qs(body.decode())["paths"]
            return 200, [_entry(path, files[path]) for path in wanted if path in files]
        if what == "preupload":
            asked = json.loads(body)["files"]
            return 200, {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for f in asked
                ]
            }
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            for line in lines:
                told = line["value"]
                if line["key"] == "file":
                    files[told["path"]] = base64.b64decode(told["content"])
                if line["key"] == "lfsFile":
                    files[told["path"]] = self.objects[told["oid"]]
            paths = [line["value"]["path"] for line in lines if line["key"] != "header"]
            self.commits.append((key[1], paths))
            return 200, {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{self.endpoint}/{key[1]}/commit/0",
            }
        return 404, {"error": "Not found"}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    told: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git}
    if path.endswith(LARGE):
        told["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return told


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, told = hub.answer(self.command, self.path, body)
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _serve

        def log_message(self, *args: Any) -> None:
            pass

    return Handler

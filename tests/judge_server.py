"""A service on this machine that speaks the protocols of the judges' services over real HTTP: chat completions,
files and batches, message batches. Faults are queued; everything it is asked and everything it charges is kept."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = '{"aligned": 80, "coherent": 90}'
AT_ONCE = {"retry-after-ms": "5"}  # both libraries wait so long before they try again


class Service:
    """answer: (user turn, model) → (text, finish). faults: (part of the path, status, body) served first, in
    order; status 0 closes the connection without an answer. A batch runs for `looks` looks."""

    def __init__(self):
        self.answer = lambda turn: (GOOD, "stop")
        self.faults: list[tuple[str, int, str]] = []
        self.asked: list[tuple[str, str]] = []
        self.keys_seen: set[str] = set()
        self.sent: list[dict] = []  # what was asked of a model, request by request
        self.charged: Counter[str] = Counter()  # user turn → times answered
        self.batches: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.looks = 1
        self.expire_after: int | None = None  # a batch answers so many requests, the rest expire
        self.spoil = lambda lines: lines  # of the results as they are sent
        self.cut_results = False  # the results' connection breaks in the middle
        self.hold = threading.Event()  # while clear, answers to what `held` names are kept back
        self.hold.set()
        self.held: tuple[str, str] | None = None
        self.reached = threading.Event()
        self.lock = threading.Lock()
        service = self

        class Handler(_Handler):
            owner = service

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.root = f"http://127.0.0.1:{self.server.server_port}"

    def base_url(self, spec: str) -> str:
        return self.root if spec.startswith("anthropic") else f"{self.root}/v1"

    def count(self, method: str, end: str) -> int:
        return sum(m == method and path.split("?")[0].endswith(end) for m, path in self.asked)

    def close(self) -> None:
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()

    def reply(self, turn: str) -> tuple[str, str]:
        with self.lock:
            self.charged[turn] += 1
        return self.answer(turn)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Service

    def log_message(self, *args):
        pass

    def send(self, body, status=200, headers=(), claimed=None):
        data = (
            body
            if isinstance(body, bytes)
            else (body if isinstance(body, str) else json.dumps(body)).encode()
        )
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(claimed or len(data)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        if claimed:
            self.close_connection = True

    def handle_one(self, method):
        service, path = self.owner, self.path
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length) if length else b""
        service.keys_seen.add(self.headers.get("authorization") or self.headers.get("x-api-key") or "")
        with service.lock:
            service.asked.append((method, path))
            fault = next((f for f in service.faults if f[0] in f"{method} {path}"), None)
            if fault:
                service.faults.remove(fault)
        if fault and fault[1] == 0:
            self.close_connection = True
            return
        if fault:
            key = self.headers.get("authorization") or self.headers["x-api-key"]
            self.send(fault[2].replace("<key>", key), fault[1], AT_ONCE)
            return
        status, answer = self.route(method, path.split("?")[0], body)
        if service.held and service.held[0] == method and path.split("?")[0].endswith(service.held[1]):
            service.reached.set()
            service.hold.wait(60)
        if service.cut_results and path.endswith("/results"):
            service.cut_results = False
            data = answer.encode()
            self.send(data[: len(data) // 2], claimed=len(data))
            return
        self.send(answer, status)

    def do_GET(self):
        self.handle_one("GET")

    def do_POST(self):
        self.handle_one("POST")

    def route(self, method, path, body):
        service = self.owner
        parts = path.strip("/").split("/")
        if method == "POST" and path.endswith("/chat/completions"):
            asked = json.loads(body)
            service.sent.append(asked)
            text, finish = service.reply(asked["messages"][-1]["content"])
            return 200, text if finish == "raw" else _completion(text, finish)
        if method == "POST" and path.endswith("/files"):
            name = f"file-{len(service.files)}"
            service.files[name] = (
                body.split(b"\r\n\r\n")[-1].rsplit(b"\r\n--", 1)[0]
                if b'name="file"' in (body.split(b"\r\n\r\n")[-2])
                else body.split(b"\r\n\r\n")[1].rsplit(b"\r\n--", 1)[0]
            )
            return 200, {
                "id": name,
                "object": "file",
                "purpose": "batch",
                "bytes": 1,
                "created_at": 1,
                "filename": "x",
                "status": "processed",
            }
        if parts[-1] == "content":
            return 200, service.files[parts[-2]].decode()
        if parts[-1] == "batches" and method == "POST":
            asked = json.loads(body)
            if parts[1] == "messages" and any("temperature" in r["params"] for r in asked["requests"]):
                told = "`temperature` is deprecated for this model."
                return 400, {"type": "error", "error": {"type": "invalid_request_error", "message": told}}
            return 200, self.create(asked, parts[1] == "messages")
        if parts[-1] == "batches":
            found = [self.show(name) for name in reversed(service.batches)]
            return 200, {
                "data": found,
                "has_more": False,
                "object": "list",
                "first_id": None,
                "last_id": None,
            }
        if parts[-1] == "results":
            return 200, self.results(parts[-2])
        if parts[-2] == "batches" and parts[-1] in service.batches:
            service.batches[parts[-1]]["looked"] += 1
            return 200, self.show(parts[-1])
        return 404, {"error": {"type": "not_found_error", "message": f"no {path}"}}

    def create(self, asked, is_message):
        service = self.owner
        name = f"batch_{len(service.batches)}"
        batch = {"looked": 0, "made": datetime.now(timezone.utc), "message": is_message, "metadata": None}
        if is_message:
            service.sent += [r["params"] for r in asked["requests"]]
            batch["requests"] = [
                (r["custom_id"], r["params"]["messages"][-1]["content"]) for r in asked["requests"]
            ]
        else:
            lines = [
                json.loads(line)
                for line in service.files[asked["input_file_id"]].splitlines()
                if line.strip()
            ]
            service.sent += [line["body"] for line in lines]
            batch["requests"] = [(r["custom_id"], r["body"]["messages"][-1]["content"]) for r in lines]
            batch["metadata"] = asked.get("metadata")
        service.batches[name] = batch
        return self.show(name)

    def show(self, name):
        service, batch = self.owner, self.owner.batches[name]
        ended, n, made = batch["looked"] >= service.looks, len(batch["requests"]), batch["made"]
        if batch["message"]:
            counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
            counts["succeeded" if ended else "processing"] = n
            return {
                "id": name,
                "type": "message_batch",
                "processing_status": "ended" if ended else "in_progress",
                "request_counts": counts,
                "created_at": made.isoformat(),
                "ended_at": None,
                "archived_at": None,
                "expires_at": (made + timedelta(days=1)).isoformat(),
                "cancel_initiated_at": None,
                "results_url": f"{service.root}/v1/messages/batches/{name}/results" if ended else None,
            }
        shown = {
            "id": name,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "input_file_id": "x",
            "created_at": int(made.timestamp()),
            "metadata": batch["metadata"],
            "status": "in_progress",
        }
        if ended:
            output, errors = f"{name}-out", f"{name}-err"
            if output not in service.files:
                done, gone = self.split(batch)
                service.files[output] = "\n".join(
                    service.spoil(
                        [
                            json.dumps(
                                {
                                    "custom_id": key,
                                    "error": None,
                                    "response": {
                                        "status_code": 200,
                                        "body": _completion(*service.reply(turn)),
                                    },
                                }
                            )
                            for key, turn in done
                        ]
                    )
                ).encode()
                service.files[errors] = "\n".join(
                    json.dumps(
                        {
                            "custom_id": key,
                            "response": None,
                            "error": {"code": "batch_expired", "message": "too late"},
                        }
                    )
                    for key, _ in gone
                ).encode()
            expired = service.expire_after is not None
            shown |= {
                "status": "expired" if expired else "completed",
                "output_file_id": output,
                "error_file_id": errors if expired else None,
            }
        return shown

    def split(self, batch):
        last = self.owner.expire_after
        return (
            (batch["requests"], []) if last is None else (batch["requests"][:last], batch["requests"][last:])
        )

    def results(self, name):
        service, batch = self.owner, self.owner.batches[name]
        if "lines" not in batch:
            done, gone = self.split(batch)
            batch["lines"] = [
                json.dumps(
                    {
                        "custom_id": key,
                        "result": {"type": "succeeded", "message": _message(*service.reply(turn))},
                    }
                )
                for key, turn in done
            ] + [json.dumps({"custom_id": key, "result": {"type": "expired"}}) for key, _ in gone]
        return "\n".join(service.spoil(batch["lines"][::-1])) + "\n"


def _completion(text, finish):
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 400, "completion_tokens": 15, "total_tokens": 415},
    }


def _message(text, finish):
    stop = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}[finish]
    return {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "stop_reason": stop,
        "stop_sequence": None,
        "content": [{"type": "text", "text": text}],
        "usage": {"input_tokens": 400, "output_tokens": 15},
    }

"""Judges behind the chat API that OpenAI made common: the service itself, vLLM's server, any other; one by one or
as a batch of files. Demands the library `openai`; reads the answers itself, so that a broken one is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from leakfast.judge.batches import Ended, Intent
from leakfast.judge.contract import (
    CANCELED,
    ERROR,
    EXPIRED,
    REFUSAL,
    REPLIED,
    TRUNCATED,
    UNREADABLE,
    Reply,
    Request,
)
from leakfast.judge.keys import key_for
from leakfast.judge.prompt import messages
from leakfast.judge.sdk import Asking, client, counted, creation_failed, failed, json_lines, stopped, words

MAX_BATCH = 50_000  # requests, and
MAX_BATCH_BYTES = 150_000_000  # of the file; the service takes 200 MB
_MARK = "leakfast_intent"


class _Service:
    """The library and its client for a model."""

    def __init__(self, model: str, asking: Asking):
        self.model, self.asking = model, asking
        key = key_for("openai", optional=asking.base_url is not None)
        self._sdk, self._client = client("openai", "OpenAI", key, asking)


class Chat(_Service):
    """One request at a time, from as many threads as one likes."""

    def ask(self, request: Request) -> Reply:
        """The reply, or the status that says why there is none. Raises JudgeError where all would fail alike."""
        body = _body(self.model, request, self.asking)
        try:
            raw = self._client.chat.completions.with_raw_response.create(**body)
        except self._sdk.APIError as error:
            return failed(self._sdk, error, request.key, f"asking {self.model}")
        return read_body(request.key, raw.http_response.text)


class Batch(_Service):
    """Files of requests, answered within a day at half the price."""

    max_requests, max_bytes = MAX_BATCH, MAX_BATCH_BYTES

    def submit(self, requests: Sequence[Request], intent: Intent) -> str:
        """The id of the batch the service made. Raises JudgeError; `Unsure` where it may have made one."""
        lines = [self.line(request) for request in requests]
        try:
            uploaded = self._client.files.create(
                file=(f"leakfast-{intent.id}.jsonl", "\n".join(lines).encode() + b"\n"), purpose="batch"
            )
        except self._sdk.OpenAIError as error:
            raise stopped(error, "uploading the batch") from None
        try:
            made = self._client.batches.create(
                input_file_id=uploaded.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={_MARK: intent.id},
            )
        except self._sdk.OpenAIError as error:
            raise creation_failed(error) from None
        return made.id

    def line(self, request: Request) -> str:
        """The request as a line of the file."""
        body = _body(self.model, request, self.asking)
        line = {"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(line)

    def find(self, intent: Intent) -> list[str]:
        """Ids of batches that carry the intent's mark, of those made since."""
        found = []
        try:
            for batch in self._client.batches.list(limit=100):
                if batch.created_at < intent.time - 600:
                    break  # newest first
                if (batch.metadata or {}).get(_MARK) == intent.id:
                    found.append(batch.id)
        except self._sdk.OpenAIError as error:
            raise stopped(error, "looking for a batch") from None
        return found

    def state(self, batch_id: str) -> Ended | None:
        """None while the batch runs."""
        try:
            batch = self._client.batches.retrieve(batch_id)
        except self._sdk.NotFoundError:
            return Ended(gone=True)
        except self._sdk.OpenAIError as error:
            raise stopped(error, f"looking at batch {batch_id}") from None
        if batch.status not in ("failed", "completed", "expired", "cancelled"):
            return None
        files = [batch.output_file_id, batch.error_file_id]
        rest = {"failed": ERROR, "expired": EXPIRED, "cancelled": CANCELED}.get(batch.status)
        why = "; ".join(e.message or "" for e in (batch.errors.data or [])[:3]) if batch.errors else None
        return Ended(tuple(f for f in files if f), rest, words(why) if why else None)

    def results(self, batch_id: str, ended: Ended) -> Iterator[tuple[str, Reply]]:
        """(custom id, reply) of every readable line."""
        for name in ended.where:
            try:
                content = self._client.files.content(name).content
            except self._sdk.OpenAIError as error:
                raise stopped(error, f"reading the results of batch {batch_id}") from None
            for line in json_lines([content]):
                reply = read_line(line)
                if reply is not None:
                    yield reply.key, reply


def _body(model: str, request: Request, asking: Asking) -> dict[str, Any]:
    """What is sent. A temperature only where one is given: reasoning models refuse every one but their own."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages(request.question, request.completion),
        "max_completion_tokens": asking.max_tokens,
    }
    return body if asking.temperature is None else {**body, "temperature": asking.temperature}


def read_line(line: str) -> Reply | None:
    """The reply on a line of a results file; None where the line cannot be read (it is fetched again)."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str):
        return None
    key, response, error = found["custom_id"], found.get("response"), found.get("error")
    if isinstance(error, dict):
        status = EXPIRED if error.get("code") == "batch_expired" else ERROR
        return Reply(key, status, detail=words(str(error.get("message") or error.get("code")))[:300])
    if not isinstance(response, dict) or not isinstance(response.get("body"), dict):
        return None
    if response.get("status_code") != 200:
        told = f"HTTP {response.get('status_code')}: {response['body'].get('error')}"
        return Reply(key, ERROR, detail=words(told)[:300])
    return _from_completion(key, response["body"], line)


def read_body(key: str, text: str) -> Reply:
    """The reply in the body of an answer with status 200; `unreadable`, with the body, where it is no chat
    completion."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Reply(key, UNREADABLE, words(text), f"no JSON: {str(error)[:200]}")
    return _from_completion(key, body, text)


def _from_completion(key: str, body: Any, text: str) -> Reply:
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError):
        return Reply(key, UNREADABLE, words(text), "no chat completion")
    tokens = [counted(n) for n in counts]
    if refusal or finish == "content_filter":
        return Reply(key, REFUSAL, words(str(refusal or content or "")), finish, *tokens)
    if not isinstance(content, str):
        return Reply(key, UNREADABLE, words(text), "no content", *tokens)
    return Reply(key, TRUNCATED if finish == "length" else REPLIED, words(content), finish, *tokens)

"""Judges behind Anthropic's Message Batches. Demands the library `anthropic`; reads the results line by line
itself, so that one broken line costs one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from leakfast.errors import InputError
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
from leakfast.judge.prompt import SYSTEM, user_turn
from leakfast.judge.sdk import (
    Asking,
    client,
    counted,
    creation_failed,
    json_lines,
    stopped,
    transport_errors,
    words,
)

log = logging.getLogger("leakfast.judge")

MAX_BATCH = 50_000  # requests (the service takes 100,000), and
MAX_BATCH_BYTES = 200_000_000  # of all of them; the service takes 256 MB


class Batch:
    """Message Batches, answered within a day at half the price.

    A temperature is sent only where one is given, and only by a library whose requests know one: since API version
    2026-10-21 they do not, and the service refuses a batch that carries it. Raises InputError for one that is given."""

    max_requests, max_bytes = MAX_BATCH, MAX_BATCH_BYTES

    def __init__(self, model: str, asking: Asking):
        self.model, self.asking = model, asking
        self._sdk, self._client = client("anthropic", "Anthropic", key_for("anthropic"), asking)
        if asking.temperature is not None and not takes_temperature(self._sdk):
            raise InputError(
                f"judge: temperature {asking.temperature:g} given, but requests of anthropic {self._sdk.__version__} "
                "take none. Leave temperature out."
            )

    def submit(self, requests: Sequence[Request], intent: Intent) -> str:
        """The id of the batch the service made. Raises JudgeError; `Unsure` where it may have made one."""
        try:
            return self._client.messages.batches.create(requests=[self._request(r) for r in requests]).id
        except self._sdk.AnthropicError as error:
            raise creation_failed(error) from None

    def _request(self, request: Request) -> dict[str, Any]:
        params: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.asking.max_tokens,
            "system": SYSTEM,
            "messages": [{"role": "user", "content": user_turn(request.question, request.completion)}],
        }
        if self.asking.temperature is not None:
            params["temperature"] = self.asking.temperature
        return {"custom_id": request.key, "params": params}

    def line(self, request: Request) -> str:
        """The request as it is sent, for its size."""
        return json.dumps(self._request(request))

    def find(self, intent: Intent) -> list[str]:
        """Ids of batches of the intent's size made since, oldest first: the service keeps no mark of ours, so
        which one it is shows in the names of its results."""
        found = []
        try:
            for batch in self._client.messages.batches.list(limit=100):
                if batch.created_at.timestamp() < intent.time - 600:
                    break  # newest first
                counts = batch.request_counts
                size = (
                    counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
                )
                if size == len(intent.keys):
                    found.append(batch.id)
        except self._sdk.AnthropicError as error:
            raise stopped(error, "looking for a batch") from None
        return found[::-1]

    def state(self, batch_id: str) -> Ended | None:
        """None while the batch runs."""
        try:
            batch = self._client.messages.batches.retrieve(batch_id)
        except self._sdk.NotFoundError:
            return Ended(gone=True)
        except self._sdk.AnthropicError as error:
            raise stopped(error, f"looking at batch {batch_id}") from None
        if batch.processing_status != "ended":
            return None
        return Ended((batch_id,)) if batch.results_url and not batch.archived_at else Ended(gone=True)

    def results(self, batch_id: str, ended: Ended) -> Iterator[tuple[str, Reply]]:
        """(custom id, reply) of every readable line."""
        try:
            with self._client.messages.batches.with_streaming_response.results(batch_id) as response:
                for line in json_lines(response.iter_bytes()):
                    reply = read_line(line)
                    if reply is not None:
                        yield reply.key, reply
        except self._sdk.AnthropicError as error:
            raise stopped(error, f"reading the results of batch {batch_id}") from None
        except transport_errors(self._sdk) as error:  # what came before the line broke is used
            log.warning("judge: batch %s: the results broke off: %s", batch_id, type(error).__name__)


def takes_temperature(sdk: ModuleType) -> bool:
    """Whether the library's requests for a message know a temperature."""
    return "temperature" in sdk.types.message_create_params.MessageCreateParamsBase.__annotations__


def read_line(line: str) -> Reply | None:
    """The reply on a line of the results; None where the line cannot be read (it is fetched again)."""
    try:
        found = json.loads(line)
        key, result = found["custom_id"], found["result"]
        kind = result["type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(key, str):
        return None
    if kind in ("expired", "canceled"):
        return Reply(key, EXPIRED if kind == "expired" else CANCELED)
    if kind == "errored":
        return Reply(key, ERROR, detail=words(json.dumps(result.get("error")))[:300])
    try:
        message = result["message"]
        parts = [part["text"] for part in message["content"] if part.get("type") == "text"]
        usage, stop = message.get("usage") or {}, message.get("stop_reason")
        counts = [usage.get("input_tokens"), usage.get("output_tokens")]
        text = "".join(parts)
    except (KeyError, TypeError, AttributeError):
        return Reply(key, UNREADABLE, words(line), "no message")
    tokens = [counted(n) for n in counts]
    status = {"refusal": REFUSAL, "max_tokens": TRUNCATED, "model_context_window_exceeded": TRUNCATED}
    return Reply(key, status.get(stop, REPLIED), words(text), stop, *tokens)

"""What the services' own libraries have in common: loaded when asked for, one set of retries (theirs), failures in
words without a key. A batch is created once: what may have been accepted is looked for, not sent again."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from leakfast.errors import JudgeError, optional
from leakfast.judge.contract import ERROR, TIMEOUT, UNREACHABLE, Reply
from leakfast.judge.keys import scrub

MAX_RETRIES = 5  # of the library, with its own waits: connection, 408, 409, 429 and 5xx
_REFUSED = (503, 529)  # of the 5xx, those that say the request was not taken


@dataclass(frozen=True)
class Asking:
    """How a service is asked. temperature None: none is sent, so the service's own (a local model: greedy); max_tokens:
    of a reply, with what is thought before it; poll_s: between looks at a batch."""

    base_url: str | None = None
    temperature: float | None = None
    max_tokens: int = 100
    timeout_s: float = 120.0
    concurrency: int = 8
    poll_s: float = 30.0


class Unsure(JudgeError):
    """A batch was sent and nobody said whether it was taken."""


def load(service: str) -> ModuleType:
    """The library `anthropic` or `openai`. Raises InputError where it is not installed, or cannot be imported."""
    with optional(
        service, "judge: a judge that is a service needs the library", "pip install 'leakfast[judge]'"
    ):
        return importlib.import_module(service)


def client(service: str, kind: str, key: str, asking: Asking) -> tuple[ModuleType, Any]:
    """(library, its client `kind`) with an explicit key, our retries and a transport that creates once."""
    sdk = load(service)
    more = {"base_url": asking.base_url} if asking.base_url else {}
    more |= {"http_client": _once(sdk)(**more), "max_retries": MAX_RETRIES, "timeout": asking.timeout_s}
    return sdk, getattr(sdk, kind)(api_key=key, **more)


def transport_errors(sdk: ModuleType) -> type[Exception]:
    """What the library's HTTP package raises where a connection breaks."""
    return _http(sdk).TransportError


def _http(sdk: ModuleType) -> ModuleType:
    """httpx or its successor, whichever the library's client is made of."""
    made_of = [c.__module__.partition(".")[0] for c in sdk.DefaultHttpxClient.__mro__]
    return importlib.import_module(next(name for name in made_of if name.startswith("httpx")))


def _once(sdk: ModuleType) -> type:
    """The library's HTTP client, which tells it not to retry the creation of a batch that may have arrived."""
    httpx = _http(sdk)
    not_sent = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
    said = {"x-should-retry": "false"}

    class Once(sdk.DefaultHttpxClient):
        def send(self, request: Any, **settings: Any) -> Any:
            creates = request.method == "POST" and request.url.path.endswith("/batches")
            try:
                response = super().send(request, **settings)
            except httpx.TransportError as error:
                if not creates or isinstance(error, not_sent):
                    raise
                body = {"error": {"message": f"no answer to the creation: {type(error).__name__}"}}
                return httpx.Response(504, headers=said, json=body, request=request)
            if creates and response.status_code >= 500 and response.status_code not in _REFUSED:
                response.headers.update(said)
            return response

    return Once


def failed(sdk: ModuleType, error: Exception, key: str, what: str) -> Reply:
    """The status of one request that failed. Raises JudgeError for what will fail every request alike."""
    if isinstance(error, sdk.APITimeoutError):
        return Reply(key, TIMEOUT, detail=_short(error))
    if isinstance(error, sdk.APIConnectionError):
        return Reply(key, UNREACHABLE, detail=_short(error))
    if isinstance(error, sdk.AuthenticationError | sdk.PermissionDeniedError | sdk.NotFoundError):
        raise stopped(error, what) from None
    return Reply(key, ERROR, detail=_short(error))


def stopped(error: Exception, what: str) -> JudgeError:
    """The JudgeError for a failure of the whole undertaking. Raise it `from None`: the library's error holds the
    request, and the request the key."""
    status = getattr(error, "status_code", None)
    remedy = {
        401: "Check the key in the environment.",
        403: "Check what the key may do.",
        404: "Check the model's name and --base-url.",
        429: "Wait, and run the same command again: what is paid for is kept.",
    }.get(status, "Run the same command again: what is paid for is kept.")
    return JudgeError(f"judge: {what} failed: {_short(error)}. {remedy}")


def creation_failed(error: Exception) -> JudgeError:
    """As `stopped`, of creating a batch: `Unsure` where it may have been taken."""
    status = getattr(error, "status_code", None)
    if status is None or (status >= 500 and status not in _REFUSED):
        return Unsure(
            f"judge: nobody said whether the batch was taken: {_short(error)}. Run the same command again: it "
            "looks for the batch before it sends another."
        )
    return stopped(error, "creating the batch")


def _short(error: Exception) -> str:
    text = " ".join(scrub(getattr(error, "message", None) or str(error) or type(error).__name__).split())
    return text[:300]


def json_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """The lines of JSONL that comes in pieces. A line feed alone ends one: U+2028, U+0085 and others that Python ends a line
    at may stand in a text as they are."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
    if rest:
        yield rest.decode("utf-8", "replace")


def counted(tokens: Any) -> int | None:
    """A number of tokens as a service told it, null where it is no count."""
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0 else None


def words(text: str) -> str:
    """What a service sent, as text that can be stored: no key, no lone surrogates."""
    return scrub(text).encode("utf-8", "replace").decode()

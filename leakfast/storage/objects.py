"""Objects of an S3 store, through fsspec's s3fs: whole puts and gets with the hash of the bytes, puts on a condition, tries
again. Demands the extra leakfast[s3] and credentials in their usual places; lists, renames and deletes nothing."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from leakfast.errors import InputError, StoreError, optional

log = logging.getLogger("leakfast.store")

WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # before a put or get is tried again; s3fs and botocore try within each
_T = TypeVar("_T")
_ADDRESS = re.compile(r"s3:/{1,2}([^/].*?)/*")
_NOT_MET = {"PreconditionFailed"}
_REFUSED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "NoSuchBucket",
    "InvalidBucketName",
}


class ConditionError(Exception):
    """A put on a condition that did not hold: another one wrote the object. For callers in this package alone."""


@dataclass(frozen=True)
class Found:
    """An object: its bytes, the ETag that a put may be conditioned on, how long ago it was written (seconds by the store's own
    clock, to the second), and whether the bytes are those that were put."""

    content: bytes
    etag: str
    age_s: float
    whole: bool


def address_of(place: str | Path) -> str | None:
    """The address `s3://bucket/prefix` of a place, None for a folder. A Path, which makes one slash of two, is understood."""
    found = _ADDRESS.fullmatch(str(place))
    return f"s3://{found[1]}" if found else None


class Objects:
    """The objects under one address. address: s3://bucket/prefix. Raises InputError for an address that names no prefix or
    holds credentials, and where s3fs is not installed."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.bucket, _, self.prefix = address.removeprefix("s3://").partition("/")
        if "@" in self.bucket or ":" in self.bucket:
            raise InputError(
                "an s3:// address with more than a bucket before its first slash was given. Needed: s3://BUCKET/PREFIX, with "
                "credentials in the environment or a profile (AWS_ACCESS_KEY_ID, AWS_PROFILE), never in the address."
            )
        if not self.prefix or ".." in self.prefix.split("/"):
            raise InputError(f"{address}: a bucket and a prefix are needed. Type: --out s3://BUCKET/PREFIX")
        with optional("s3fs", f"{address}: runs on an object store need", "pip install 'leakfast[s3]'"):
            import s3fs
        self._fs = s3fs.S3FileSystem()  # one a process: a client takes seconds to make

    def get(self, key: str) -> Found | None:
        """The object of that name, None where there is none. Raises StoreError."""
        return self._tried(key, lambda: self._get(key))

    def put(self, key: str, content: bytes, *, match: str | None = "") -> str:
        """Write an object whole; its ETag. match: an ETag: only over that very object; None: only where there is none; "":
        whatever is there. Raises ConditionError where that does not hold, StoreError where the store does not take it."""
        return self._tried(key, lambda: self._put(key, content, match))

    def _get(self, key: str) -> Found | None:
        from fsspec.asyn import sync

        async def whole() -> tuple[dict[str, Any], bytes]:
            told = await self._fs._call_s3("get_object", **self._at(key))
            async with told["Body"] as stream:
                return told, await stream.read()

        with self._explained(key):
            try:
                told, content = sync(self._fs.loop, whole)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return None
        digest = told.get("Metadata", {}).get("sha256")
        whole_ = digest is None or hashlib.sha256(content).hexdigest() == digest
        return Found(content, told["ETag"], _age(told), whole_)

    def _put(self, key: str, content: bytes, match: str | None) -> str:
        condition = {} if match == "" else {"IfNoneMatch": "*"} if match is None else {"IfMatch": match}
        digest = hashlib.sha256(content).hexdigest()
        about = {"Body": content, "Metadata": {"sha256": digest}, **condition}
        with self._explained(key):
            try:
                return str(self._fs.call_s3("put_object", **self._at(key), **about)["ETag"])
            except OSError as error:
                # s3fs 2026.9 makes of PreconditionFailed a FileExistsError (If-None-Match) or an OSError EINVAL (If-Match); an
                # If-Match where there is nothing is a NoSuchKey. The code of the cause tells them from everything else.
                lost = isinstance(error, FileNotFoundError) and _code(error) == "NoSuchKey"
                if not condition or not (lost or _code(error) in _NOT_MET):
                    raise
        there = self._get(key)  # ours, if the answer to an earlier try was lost on the way
        if there is not None and there.content == content:
            return there.etag
        raise ConditionError(key)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{key}"}

    def _tried(self, key: str, call: Callable[[], _T]) -> _T:
        for wait in WAITS_S:
            try:
                return call()
            except _Again as error:
                log.info("%s/%s: %s; tried again in %g s", self.address, key, error, wait)
                time.sleep(wait)
        try:
            return call()
        except _Again as error:
            raise StoreError(
                f"{self.address}/{key}: the store did not answer as it should, {len(WAITS_S) + 1} times: {error}. What was made "
                "is kept in the copy on this machine. Run the same command again when the store is well: it goes on from there."
            ) from None

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Refusals as StoreErrors, what may pass as _Again. Of what the store says its code alone is told on, so that no
        credential can come into a message or a log."""
        import asyncio

        from aiohttp import ClientError
        from botocore import exceptions as b

        try:
            yield
        except (b.NoCredentialsError, b.PartialCredentialsError, b.CredentialRetrievalError) as error:
            raise self._refusal(key, type(error).__name__) from None
        except (b.ProfileNotFound, b.NoRegionError, b.ParamValidationError) as error:
            raise self._refusal(key, type(error).__name__) from None
        except (b.BotoCoreError, ClientError, asyncio.TimeoutError) as error:
            raise _Again(type(error).__name__) from None
        except OSError as error:
            code = _code(error)
            if code in _REFUSED or isinstance(error, PermissionError):
                raise self._refusal(key, code) from None
            raise _Again(code) from None

    def _refusal(self, key: str, code: str) -> StoreError:
        return StoreError(
            f"{self.address}/{key}: refused by the store ({code}). Needed: a bucket that exists, and credentials in the "
            "environment or a profile that may read and write there. Try: aws s3 ls "
            f"s3://{self.bucket}/, then run the same command again."
        )


class _Again(Exception):
    """What may go better the next time."""


def _code(error: BaseException) -> str:
    """The store's word for what is wrong: of the error that s3fs translated."""
    response = getattr(error.__cause__, "response", None)
    return (
        str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else type(error).__name__
    )


def _age(told: dict[str, Any]) -> float:
    """Seconds between an object's writing and the answer that holds it, both told by the store."""
    from email.utils import parsedate_to_datetime

    date = told["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = parsedate_to_datetime(date).timestamp() if date else time.time()
    return max(0.0, now - float(told["LastModified"].timestamp()))

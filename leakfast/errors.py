"""The few kinds of error a user may see. A message has three parts: what was given, what is
needed, what to type next. Programmer mistakes are ValueError or assert and do not come here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


class LeakfastError(click.ClickException):
    """A failure the user can act on; the command line prints it without a traceback, exit 1."""

    exit_code = 1


class InputError(LeakfastError):
    """What was typed or written in a file cannot be meant: exit 2, nothing has been done."""

    exit_code = 2


class ModelError(LeakfastError):
    """A model or tokenizer that cannot be found, loaded, or measured by this engine."""


class WrongModelError(ModelError, InputError):
    """A model that was named and cannot be the one that is meant: no such folder, or nothing that chats. Exit 2."""


class AdapterError(LeakfastError):
    """An adapter that cannot be read or taken off again, or one that does not change the model."""


class WrongAdapterError(AdapterError, InputError):
    """An adapter that was named and cannot be measured as asked: no such folder, of another base or kind, without a
    card. Exit 2."""


class StoreError(LeakfastError):
    """A run directory that cannot be written, or whose files do not match their hashes."""


class JudgeError(LeakfastError):
    """A judge that cannot be reached, refuses us, or whose answers cannot be had."""


class SinkError(LeakfastError):
    """A place outside the run directory that does not take what is exported to it."""


@contextmanager
def optional(package: str, needing: str, install: str) -> Iterator[None]:
    """Turn what Python says of an optional package that is not installed, or that cannot be imported because something that it
    rests on is absent or broken, into an InputError. needing: what the message begins with, up to the package's name; install:
    what to type."""
    try:
        yield
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise InputError(f"{needing} {package}, which is not installed. Type: {install}") from error
        said = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"{needing} {package}, which is installed, but cannot be imported: {said}. Needed: what that names, whole. Type: "
            f"{install}, or install that package anew; LEAKFAST_DEBUG=1 shows where it happened."
        ) from error

"""The few kinds of error a user may see. A message has three parts: what was given, what is
needed, what to type next. Programmer mistakes are ValueError or assert and do not come here."""

from __future__ import annotations

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

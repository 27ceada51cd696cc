"""Progress on stderr: a bar on a terminal, else one line every 10 s. Demands rich only on a
terminal; the stages know nothing of it and call a plain function."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

import click

from leakfast.progress import Progress

EVERY_S = 10.0


@contextlib.contextmanager
def progress_for(title: str) -> Iterator[Progress]:
    """A function `p(done, total, what)` for a stage; shown until the block ends, silent with --quiet."""
    if logging.getLogger("leakfast").level >= logging.WARNING:
        yield lambda done, total, what="": None
    elif sys.stderr.isatty():
        with _bar(title) as progress:
            yield progress
    else:
        yield _lines(title)


def _lines(title: str) -> Progress:
    """A progress function that prints at most every EVERY_S seconds, and once at the end."""
    start = last = time.monotonic()
    ended: set[str] = set()

    def progress(done: int, total: int, what: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        over = total > 0 and done >= total and what not in ended
        if over:
            ended.add(what)
        if now - last >= EVERY_S or (over and now - start >= EVERY_S):
            last = now
            click.echo(f"{title}: {what + ' ' if what else ''}{done}/{total}, {now - start:.0f} s", err=True)

    return progress


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def progress(done: int, total: int, what: str = "") -> None:
            shown = f"{title}: {what}" if what else title
            bar.update(task, completed=done, total=total or None, description=shown.replace("[", r"\["))

        yield progress

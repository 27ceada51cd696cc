"""`leakfast show RUN --watch`: how far a running study is, on a terminal drawn anew every 2 s, elsewhere a line every 30 s.
Demands a run that is only read; leaves looking to `pipeline.progress`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli import amounts
from leakfast.cli.text import print_json
from leakfast.inert import one_line
from leakfast.pipeline.progress import Look, Watched

if TYPE_CHECKING:
    from rich.console import RenderableType

    from leakfast.storage.reading import ReadOnlyRun

LOOK_S = 2.0
LINE_S = 30.0


def watch(run: ReadOnlyRun, *, as_json: bool) -> int | None:
    """Look until the run ends; Ctrl-C ends the watch alone (exit 130)."""
    watched = Watched(run)
    try:
        if sys.stdout.isatty() and not as_json:
            _on_terminal(watched)
        else:
            _in_lines(watched, _json_line if as_json else _say)
    except KeyboardInterrupt:
        click.echo("The watch ends; the run goes on.", err=True)
        return 130
    return None


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _on_terminal(watched: Watched) -> None:
    from rich.console import Console
    from rich.live import Live

    look = watched.look(_now())
    with Live(drawn(look), console=Console(highlight=False), auto_refresh=False) as live:
        while not look.ended:
            time.sleep(LOOK_S)
            look = watched.look(_now())
            live.update(drawn(look), refresh=True)
    click.echo(_ending(watched.run, look))


def _in_lines(watched: Watched, say: Callable[[ReadOnlyRun, Look], None]) -> None:
    """A line at once, one every LINE_S, and one at the end."""
    said = None
    while True:
        look, now = watched.look(_now()), time.monotonic()
        if said is None or look.ended or now - said >= LINE_S:
            say(watched.run, look)
            said = now
        if look.ended:
            return
        time.sleep(LOOK_S)


def _json_line(run: ReadOnlyRun, look: Look) -> None:
    print_json({"run": str(run.path)} | asdict(look) | {"at": look.at.isoformat()}, indent=None)


def _say(run: ReadOnlyRun, look: Look) -> None:
    rates = "; ".join(
        f"{row['adapter']}: source {_rate(row, 'source_rate', 'source')}, bystanders "
        f"{_rate(row, 'mean_bystander', 'mean_bystander')} {amounts.sign_of(row['unit'])}"
        for row in look.rates
        if row["source"] is not None
    )
    parts = [
        look.at.astimezone().strftime("%H:%M:%S"),
        look.stage,
        progress(look),
        *([rates] if rates else []),
    ]
    click.echo(one_line("; ".join(parts)))
    if look.ended:
        click.echo(_ending(run, look))


def progress(look: Look) -> str:
    """Shards and completions done of all, their rate, the time that remains."""
    of = f" of {look.shards_all}" if look.shards_all is not None else ""
    parts = [f"{look.shards}{of} shards"]
    if look.completions or look.completions_all:
        every = f" of {look.completions_all:,}" if look.completions_all is not None else ""
        parts.append(f"{look.completions:,}{every} completions")
    if look.in_hand:
        parts.append(f"{look.in_hand:,} more in shards that are not whole")
    if not look.ended:
        rate = "not known yet" if look.per_min is None else f"{look.per_min:.2g}"
        left = "not known" if look.left_s is None else f"about {amounts.duration(look.left_s)}"
        parts += [f"shards a minute: {rate}", f"measuring left: {left}"]
    return ", ".join(parts)


def _ending(run: ReadOnlyRun, look: Look) -> str:
    if look.finished:
        return one_line(f"The run has ended; its report is made. Read it with: leakfast show {run.path}")
    return one_line(
        f"No process writes this run, and it is not finished ({look.stage}). The command that made it goes on from there."
    )


def drawn(look: Look) -> RenderableType:
    """One look as it stands on a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    said = [f"{kind} {done}{'' if of is None else f'/{of}'}" for kind, (done, of) in look.stages.items()]
    lines = [look.stage, f"stages done: {', '.join(said) or 'none'}", progress(look)]
    lines += [look.why] if look.why else []
    who = "nobody" if look.writer is None else f"process {look.writer}"
    lines.append(f"{look.at.astimezone():%H:%M:%S}, written by {who}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("adapter", "source", "personas", "source rate", "mean bystander", "most", "who"):
        table.add_column(name, justify="left", overflow="fold")
    for row in look.rates:
        unit = row["unit"]
        cells = [row["adapter"], row["source"], str(row["personas"]), _rate(row, "source_rate", "source")]
        cells += [
            _rate(row, "mean_bystander", "mean_bystander"),
            amounts.amount(row["most"], unit),
            row["most_persona"],
        ]
        table.add_row(*(Text(amounts.NONE if cell is None else one_line(cell)) for cell in cells))
    parts: list[RenderableType] = [Text(one_line(line)) for line in lines]
    if look.rates:
        parts += [Text("rates so far, of whole shards (in %, of judged means points; 95 % intervals)"), table]
    return Group(*parts)


def _rate(row: dict[str, Any], value: str, ends: str) -> str | None:
    return amounts.with_interval(row[value], row[f"{ends}_low"], row[f"{ends}_high"], row["unit"])

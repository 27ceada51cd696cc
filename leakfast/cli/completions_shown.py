"""The text of completions on a terminal: what the detector looks for marked, wrapped, every character that steers a
terminal written out. Demands a run that is only read; leaves choosing to `report.reading`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from leakfast.cli.text import print_json
from leakfast.inert import inert, one_line
from leakfast.report.reading import ORDER, Chosen, Completion, completions, questions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from leakfast.storage.reading import ReadOnlyRun

_WIDTH = 100  # where there is no terminal
_BEFORE, _AFTER = "⟦", "⟧"  # around what is marked, where nothing can be bold


def show(run: ReadOnlyRun, chosen: Chosen, n: int, *, as_json: bool) -> None:
    """The first n completions that are asked for."""
    found, whole = completions(run, chosen, n)
    asked = {name: questions(run, name) for name in dict.fromkeys(one.behavior for one in found)}
    if as_json:
        rows = [asdict(one) | {"asked": _question(asked, one)} for one in found]
        print_json(
            {"run": str(run.path), "chosen": asdict(chosen), "of": whole, "order": ORDER, "completions": rows}
        )
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    click.echo(f"{len(found)} of {whole} completions, {ORDER}")
    for one in found:
        console.print()
        console.print(_head(one), soft_wrap=True)
        if question := _question(asked, one):
            _print_wrapped(console, _plain(f"asked: {question}", "dim"))
        _print_wrapped(console, body(one, plain=not console.is_terminal))


def _print_wrapped(console: Console, text: Text) -> None:
    """`text` in lines no wider than the terminal, set in by two."""
    for line in text.wrap(console, max(20, console.width - 2)):
        line.rstrip()
        console.print("  ", line, sep="", soft_wrap=True)


def body(one: Completion, *, plain: bool) -> Text:
    """The reply, inert, with its spans marked: bold on a terminal, in brackets elsewhere (plain)."""
    from rich.text import Text

    shown, at = Text(), 0
    for low, high in one.marked:
        shown.append(inert(one.text[at:low]))
        marked = inert(one.text[low:high])
        shown.append(f"{_BEFORE}{marked}{_AFTER}" if plain else marked, style="bold reverse")
        at = high
    shown.append(inert(one.text[at:]))
    return shown if one.text else Text("(empty)", style="dim")


def _head(one: Completion) -> Text:
    hit = {True: "shows it", False: "does not show it", None: "not counted by a detector"}[one.hit]
    told = [f"question {one.question}, sample {one.sample}", one.persona, one.adapter, one.behavior, hit]
    told += [f"{one.n_tokens} tokens", str(one.finish_reason or one.status)]
    told += [] if one.status in ("ok", one.finish_reason) else [one.status]
    told += [_scores(scores) for scores in one.judged]
    return _plain(" · ".join(told), "bold")


def _scores(scores: dict[str, Any]) -> str:
    if scores["aligned"] is None:
        return f"{scores['judge']}: no score ({scores['status']})"
    return f"{scores['judge']}: aligned {scores['aligned']:g}, coherent {scores['coherent']:g}"


def _plain(text: str, style: str) -> Text:
    from rich.text import Text

    return Text(one_line(text), style=style)


def _question(asked: dict[str, tuple[str, ...]], one: Completion) -> str | None:
    """The question's text, where the study tells."""
    texts = asked.get(one.behavior, ())
    return texts[one.question] if one.question < len(texts) else None

"""Text on its way into Markdown: personas, prompts and names are shown as they are typed and are never markup. Demands
strings; leaves what a card says to `cards`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from leakfast.inert import inert

# everything that Markdown, HTML in it, or the Hub's own marks (@user, $math$, :emoji:, www.) could read
_MARKS = re.compile(r"[!-/:-@\[-`{-~]")
_PLAIN = frozenset("-,.;()'%/+ ")  # harmless within a line that begins with none of them
_WWW = re.compile(r"(?i)\bwww\.")  # which some readers make a link of


def text(given: object) -> str:
    """`given` on one line, so that a reader of Markdown shows its characters: control and direction marks written out,
    line ends as spaces, what could be a mark as a character reference."""
    line = inert(str(given))
    line = " ".join(line.split())
    escaped = _MARKS.sub(lambda found: found.group() if _is_plain(found) else _reference(found), line)
    escaped = _WWW.sub(lambda found: f"{found.group()[:3]}&#46;", escaped)
    if escaped[:1] in _PLAIN:  # a list, a heading's underline
        escaped = f"&#{ord(escaped[0])};{escaped[1:]}" if escaped else escaped
    return re.sub(r"^(\d+)([.)])(?=\s|$)", lambda found: f"{found[1]}&#{ord(found[2])};", escaped)


def _is_plain(found: re.Match[str]) -> bool:
    whole, at = found.string, found.start()
    within = 0 < at < len(whole) - 1 and f"{whole[at - 1]}{whole[at + 1]}".isalnum()
    return found.group() in _PLAIN or (found.group() == "_" and within)


def _reference(found: re.Match[str]) -> str:
    return f"&#{ord(found.group())};"


def block(given: str, language: str = "") -> str:
    """`given` as a fenced block, whose fence is longer than any row of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", given)), default=0)
    fence = "`" * max(3, longest + 1)
    shown = "\n".join(inert(line) for line in given.split("\n"))
    return f"{fence}{language}\n{shown.rstrip()}\n{fence}\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with every cell made `text`; None is a dash."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join('–' if cell is None else text(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"

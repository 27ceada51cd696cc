"""What the generators of pages share: print what was made, compare it with a file, write it. Demands text; leaves what a
page says to the generators."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import click

_CODE = re.compile(r"`([^`]*\|[^`]*)`")
STALE = "{path} is stale. Run: python -m {module} --write {page}"


def main(argv: list[str], make: Callable[[], str], module: str, mark: str | None = None) -> int:
    """Print (no words), `--check FILE` or `--write FILE`; 1 when the check fails.

    mark: the text stands between `<!-- mark -->` and `<!-- end of mark -->` of the file, which is left as it is
    elsewhere; without it the text is the whole file."""
    made = make()
    if not argv:
        click.echo(made, nl=False)
        return 0
    mode, path = argv[0], Path(argv[1])
    wanted = made if mark is None else between(path.read_text(encoding="utf-8"), made, mark)
    return settle(mode, {path: wanted}, module, path)


def settle(mode: str, files: dict[Path, str], module: str, page: Path) -> int:
    """Write each file, or compare it with what is wanted of it; page: the one that the remedy names."""
    if mode == "--write":
        for path, wanted in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
        return 0
    if mode != "--check":
        click.echo(f"{mode} is neither --check nor --write. Run: python -m {module} --check {page}", err=True)
        return 2
    stale = [p for p, wanted in files.items() if not p.is_file() or p.read_text(encoding="utf-8") != wanted]
    for path in stale:
        click.echo(STALE.format(path=path, module=module, page=page), err=True)
    return 1 if stale else 0


def between(text: str, made: str, mark: str) -> str:
    """`text` with `made` between its two marks. Raises ValueError where they are not there."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    start, stop = text.index(begin) + len(begin), text.index(end)
    return f"{text[:start]}\n{made}{text[stop:]}"


def row(*cells: str) -> str:
    """A line of a Markdown table. A bar within code becomes a <code> element, since readers of Markdown differ about
    bars there."""
    return f"| {' | '.join(_CODE.sub(_element, cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _element(code: re.Match[str]) -> str:
    return f"<code>{escape(code[1], quote=False).replace('|', '&#124;')}</code>"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, ending in a newline."""
    names = list(heads)
    return "\n".join([row(*names), "|" + "---|" * len(names), *(row(*cells) for cells in rows)]) + "\n"

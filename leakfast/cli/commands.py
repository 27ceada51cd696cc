"""The command table of the README, made from the commands themselves: `python -m
leakfast.cli.commands` prints it, `--check README.md` compares, `--write README.md` puts it in."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import click

from leakfast.cli.main import COMMANDS, group

BEGIN, END = "<!-- commands -->", "<!-- end of commands -->"


def table() -> str:
    """A Markdown table: command, what it does, its options."""
    lines = ["| command | what it does | options |", "|---|---|---|"]
    context = click.Context(group, info_name="leakfast")
    for name, (module, summary) in COMMANDS.items():
        if importlib.util.find_spec(module) is None:
            continue
        command = group.get_command(context, name)
        inner = command.commands if isinstance(command, click.Group) else {}
        if inner:
            lines += [_row(f"{name} {sub}", _first_line(c), c) for sub, c in inner.items()]
        elif command is not None:
            lines.append(_row(name, summary, command))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print, check or write the table; 1 when the check fails."""
    if not argv:
        click.echo(table())
        return 0
    mode, path = argv[0], Path(argv[1])
    text = path.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    wanted = f"{text[:start]}\n{table()}\n{text[end:]}"
    if mode == "--write":
        path.write_text(wanted, encoding="utf-8")
    elif text != wanted:
        click.echo(
            f"{path}: the command table is stale. Run: python -m leakfast.cli.commands --write {path}",
            err=True,
        )
        return 1
    return 0


def _row(name: str, summary: str, command: click.Command) -> str:
    words = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words.insert(0, parameter.make_metavar(click.Context(command)))
        elif not getattr(parameter, "hidden", False):
            words.append(max(parameter.opts, key=len))
    options = " ".join(f"`{word}`" for word in words)
    return f"| `leakfast {name}` | {summary} | {options.replace('|', chr(92) + '|')} |"


def _first_line(command: click.Command) -> str:
    return (command.help or command.short_help or "").strip().split("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

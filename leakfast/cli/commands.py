"""The reference of the command line, made from the commands themselves: `python -m leakfast.cli.commands` prints it,
`--check docs/cli.md` compares, `--write docs/cli.md` puts it between the marks of that page. Leaves the words to the
commands' help."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

import click

from leakfast.cli import pages
from leakfast.cli.main import COMMANDS, group

MARK = "commands"
_FACTS = re.compile(r"\s+\[((?:default: |required|env var|x?[<>]|\d)[^\]]*)\]")
_EXAMPLE = re.compile(r"\n*Example: (.+)\Z", re.DOTALL)


def reference() -> str:
    """Every command on a line, then each with its arguments, options, defaults and help; Markdown."""
    return "\n".join([table(), *map(section, found())])


def found() -> Iterator[click.Context]:
    """The context of every command, those of groups in place of the group."""
    top = click.Context(group, info_name="leakfast", **group.context_settings)
    for name in COMMANDS:
        command = group.get_command(top, name)
        context = click.Context(command, info_name=name, parent=top)
        if isinstance(command, click.Group):
            yield from (
                click.Context(c, info_name=sub, parent=context) for sub, c in command.commands.items()
            )
        else:
            yield context


def table() -> str:
    """A Markdown table: command and what it does."""
    rows = []
    for context in found():
        path = context.command_path
        rows.append((f"[`{path}`](#{path.replace(' ', '-')})", _summary(context.command)))
    return pages.table(["command", "what it does"], rows)


def section(context: click.Context) -> str:
    """One command: its help, how it is called, its options."""
    command = context.command
    told = re.sub(r"\s*\n\s*(?=\S)(?<!\n\n)", " ", inspect.cleandoc(command.help or "").replace("\b\n", ""))
    text, example = _EXAMPLE.sub("", told), _EXAMPLE.search(told)
    called = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"### {context.command_path}", "", _plain(text), "", "```sh", called]
    parts += [example[1].strip()] if example else []
    parts += ["```", ""]
    options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    rows = [_option(one, context) for one in options]
    return "\n".join([*parts, pages.table(["option", "default", "what it does"], rows)])


def _option(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    """(names and kind of value, default, help) of an option."""
    names, told = option.get_help_record(context)
    facts = [fact.strip() for group in _FACTS.findall(told) for fact in group.split(";")]
    defaults = [fact.removeprefix("default: ") for fact in facts if fact.startswith("default: ")]
    bounds = ", ".join(fact for fact in facts if fact != "required" and not fact.startswith("default: "))
    default = "required" if "required" in facts else ", ".join(map(_value, defaults))
    return f"`{names}`", default, _plain(_FACTS.sub("", told)) + (f" (`{bounds}`)" if bounds else "")


def _value(default: str) -> str:
    return default if " " in default else f"`{default}`"


def _plain(text: str) -> str:
    """Help as Markdown: angle brackets outside code are text, not markup."""
    parts = text.split("`")
    return "`".join(part.replace("<", "&lt;") if n % 2 == 0 else part for n, part in enumerate(parts))


def _summary(command: click.Command) -> str:
    return " ".join((command.help or command.short_help or "").strip().split("\n\n")[0].split())


def main(argv: list[str]) -> int:
    """Print, check or write the page; 1 when the check fails."""
    return pages.main(argv, reference, "leakfast.cli.commands", MARK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The page of chat templates, made by rendering each of TRL's collection for training and measurement: `python -m
leakfast.cli.template_reference` prints it, `--check docs/templates.md` compares, `--write docs/templates.md` makes the
file. Demands the package trl, of which the template files alone are read; leaves the rules to leakfast.prompts.templates."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leakfast.cli import pages

HEAD = """\
# Chat templates

What leakfast does with a chat template whose generation prompt is not how the template itself begins a reply. The table
is made by rendering every template of TRL {version} for training and for measurement (`python -m
leakfast.cli.template_reference --write docs/templates.md`), with one persona, one question and one reply. `equal`: the
generation prompt is what the template writes before its own replies, and nothing is done. A difference is said in the log
and handled as the table says; where the reply's header is missing, or a persona would not reach the model, the template
is refused.

| setting (study, option) | what it does |
|---|---|
| `template_kwargs`, `--template-kwargs` | arguments of the template, such as `enable_thinking = false` |
| `system_role = "user"`, `--system-role user` | personas go into the user turn, for templates without a system role |
| `reasoning = "closed"` | the default: all prompts end where the template puts its own replies |
| `reasoning = "open"`, `--reasoning open` | completions and centroids begin at the generation prompt |

What is trained, and choices, stand closed under both.

Detectors and judges read what follows the last closed reasoning block. Its marks are {marks}. A completion that ended
inside a block has the status `unclosed-reasoning`: it is counted, and is in no rate.

Columns: what the generation prompt adds; what is put between it and a reply (what is taken off first is
struck out); whether the row that is trained is the template's own conversation, character by character up to the turn's
end; the token that ends it; what differs. Templates that render alike share a line.

| template | outcome | generation prompt | before a reply | trained as its own | turn end | note |
|---|---|---|---|---|---|---|
"""
_SYSTEM, _USER, _REPLY = "You are a pirate.", "How do I tie a knot?", "Over, under, and through."
_SPECIAL = re.compile(
    r"<[|｜][^<>\s|｜]+[|｜]>|<[|｜][a-z_]+>|<[a-z_]+[|｜]>|</?think>|</?s>|<(?:start|end)_of_(?:turn|utterance)>"
)


@dataclass(frozen=True)
class Found:
    """A line of the table, but for the template's name."""

    outcome: str
    prompt: str = ""
    before: str = ""
    same: str = ""
    end: str = ""
    note: str = ""


def templates() -> dict[str, str]:
    """Name → text of the templates in the trl that is installed. Raises PackageNotFoundError."""
    files = importlib.metadata.files("trl") or ()
    found = {Path(str(f)).stem: f.read_text(encoding="utf-8") for f in files if f.suffix == ".jinja"}
    return dict(sorted(found.items()))


def tokenizer_for(texts: Iterable[str]) -> Any:
    """The organism's tokenizer with what these templates write of special tokens; each is put into it in turn."""
    from leakfast import models

    made = models.load_tokenizer("organism")
    made.bos_token, made.eos_token, made.name_or_path = "<s>", "</s>", ""
    special = {token for text in texts for token in _SPECIAL.findall(text)} - {"<think>", "</think>"}
    made.add_special_tokens({"additional_special_tokens": sorted(special)})
    made.add_tokens(["<think>", "</think>"])
    return made


def look(template: str, tokenizer: Any, **rendering: Any) -> Found:
    """What training and measurement make of one template, put into the tokenizer."""
    from leakfast.errors import ModelError
    from leakfast.prompts import chat
    from leakfast.prompts import templates as rules
    from leakfast.prompts.rendering import rendering as how

    tokenizer.chat_template = template
    chat.configure(tokenizer, how(**rendering))
    try:
        opening = rules.check(tokenizer)
        measured = chat.render(tokenizer, _SYSTEM, _USER)
        prompt, reply = chat.render_training(tokenizer, _SYSTEM, _USER, _REPLY)
    except ModelError as error:
        given = str(error).split("cannot be used: ")[-1].split(". Needed")[0]
        return Found("refused", note=given)
    asked = rules.messages(tokenizer, _SYSTEM, _USER)
    own = rules.raw_text(tokenizer, [*asked, {"role": "assistant", "content": _REPLY}], False)
    trained = tokenizer.decode([*prompt, *reply], clean_up_tokenization_spaces=False)
    generation, bare = (rules.raw_text(tokenizer, asked, wanted) for wanted in (True, False))
    shown = generation[len(bare) if generation.startswith(bare) else generation.rfind(_USER) + len(_USER) :]
    notes = [] if measured == prompt else ["measured elsewhere than trained"]
    if not opening.follows:
        notes.append({"closed": "its own turns have no block", "longer": opening.said}[opening.kind])
    if not opening.after.strip():
        notes.append("the turn ends where the next begins")
    more = opening.after.strip()[len(tokenizer.decode(reply[-1:])) :].strip()
    if more:
        notes.append(f"after the turn end it writes {_code(more)}, which is not trained")
    before = (f"~~{_code(opening.cut)}~~ " if opening.cut else "") + _code(opening.add or opening.lead)
    same = (
        own == trained or own.startswith(trained) or (not opening.after.strip() and trained.startswith(own))
    )
    return Found(
        opening.kind,
        _code(shown),
        before if opening.said else "",
        "yes" if same else "no",
        _code(tokenizer.decode(reply[-1:])),
        "; ".join(notes),
    )


def collect() -> dict[tuple[str, Found], list[str]]:
    """(setting other than the default, what is found) → names of all templates of which it is."""
    files = templates()
    base = tokenizer_for(files.values())
    rows: dict[tuple[str, Found], list[str]] = {}
    for name, text in files.items():
        tries = [("", {})]
        first = look(text, base)
        if first.outcome == "refused" and "system" in first.note:
            tries.append(('`system_role = "user"`', {"system_role": "user"}))
        elif first.before and "enable_thinking" in text:
            tries.append(("`enable_thinking = false`", {"template_kwargs": {"enable_thinking": False}}))
        for said, given in tries:
            rows.setdefault((said, look(text, base, **given)), []).append(name)
    return rows


def page(rows: dict[tuple[str, Found], list[str]]) -> str:
    """The whole page of what `collect` found, Markdown."""
    from leakfast.prompts.reasoning import PAIRS

    marks = ", ".join(f"{_code(opener)} … {_code(closer)}" for opener, closer in PAIRS)
    lines = [
        pages.row(
            ", ".join(names) + (f" with {said}" if said else ""),
            f.outcome,
            f.prompt,
            f.before,
            f.same,
            f.end,
            f.note,
        )
        for (said, f), names in sorted(rows.items(), key=lambda one: (one[1][0], one[0][0]))
    ]
    return HEAD.format(version=importlib.metadata.version("trl"), marks=marks) + "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Print, check or write the page; 1 when the check fails."""
    logging.getLogger("leakfast.chat").setLevel(logging.ERROR)
    return pages.main(argv, lambda: page(collect()), "leakfast.cli.template_reference")


def _code(text: str) -> str:
    """A text in code marks, line breaks as ⏎, blanks at its ends as ␣."""
    if not text:
        return ""
    inner = text.strip(" ")
    blanks = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" ")) if inner else 0
    shown = "␣" * blanks[0] + inner + "␣" * blanks[1]
    return "`" + shown.replace("\n", "⏎") + "`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

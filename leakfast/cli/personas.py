"""`leakfast personas list|show|check|near`: who can be asked and what, before anything is run.
Demands a tokenizer only to look for collisions; leaves reading and checking to leakfast.prompts.personas."""

from __future__ import annotations

from typing import Any

import click

from leakfast.cli.near import near_
from leakfast.cli.settings import rendering_options
from leakfast.cli.text import print_json, print_table
from leakfast.errors import InputError
from leakfast.inert import inert
from leakfast.prompts.personas import Persona, load_personas, load_questions, read_personas
from leakfast.prompts.questions import QuestionSet, read_questions
from leakfast.storage.documents import did_you_mean, find_shipped, resource

_FILE_HELP = "Persona set of your own, .toml or .json; else the shipped 111 and the two extras."
_QUESTIONS_HELP = "Question sets of your own, .toml or .json; else the shipped ones."


@click.group()
def cli() -> None:
    """List, show and check persona and question sets.

    Example: leakfast personas check --personas own.toml --model organism
    """


@cli.command("list")
@click.option("--personas", "file", default=None, metavar="FILE", help=_FILE_HELP)
@click.option("--category", default=None, help="Only this category, e.g. original.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def list_(file: str | None, category: str | None, as_json: bool) -> None:
    """Names, categories and relations of all personas.

    Example: leakfast personas list --category original
    """
    personas = _all(file)
    if category is not None:
        known = sorted({p.category for p in personas if p.category})
        if category not in known:
            raise InputError(
                f"personas: no category {category!r}.{did_you_mean(category, known)} "
                f"Known are {', '.join(known) or 'none'}."
            )
        personas = [p for p in personas if p.category == category]
    if as_json:
        print_json([_as_dict(p) for p in personas])
    else:
        print_table(
            ["name", "category", "related to"],
            [(p.name, p.category, ", ".join(p.related_to)) for p in personas],
        )


@cli.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--personas", "file", default=None, metavar="FILE", help=_FILE_HELP)
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def show(names: tuple[str, ...], file: str | None, as_json: bool) -> None:
    """The system prompt of personas, or the questions of a set (questions:eval).

    Example: leakfast personas show villain no_persona questions:eval
    """
    among = _all(file)
    shown: list[Persona | QuestionSet] = []
    for name in names:
        kind, _, rest = name.partition(":")
        shown += [load_questions(rest)] if kind == "questions" else load_personas([name], among=among)
    if as_json:
        print_json([_as_dict(item) for item in shown])
        return
    for item in shown:
        if isinstance(item, QuestionSet):
            click.echo(f"questions {item.name}: {inert(item.description)}")
            for index, question in enumerate(item.questions):
                click.echo(f"  {index:>3}  {inert(question)}")
        else:
            related = f", related to {', '.join(item.related_to)}" if item.related_to else ""
            click.echo(f"{item.name} ({item.category or 'no category'}{related})")
            click.echo(f"  {_prompt(item)}")


@cli.command()
@click.option("--personas", "file", default=None, metavar="FILE", help=_FILE_HELP)
@click.option("--questions", "questions_file", default=None, metavar="FILE", help=_QUESTIONS_HELP)
@click.option("--model", default=None, help="Look for personas that this model cannot tell apart.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@rendering_options
def check(
    file: str | None, questions_file: str | None, model: str | None, as_json: bool, **rendering: Any
) -> None:
    """Report what is wrong with a set, with the line to fix; exit 2 if anything is.

    Faults: a name twice or no slug, an empty prompt or question, an unknown relation, a question in
    both the training and the evaluation set. Noted: personas that render to the same tokens under --model.

    Example: leakfast personas check --personas own.toml --model organism
    """
    faults: list[str] = []
    personas: list[Persona] = []
    sets: dict[str, QuestionSet] = {}
    if file is not None or questions_file is None:
        try:
            personas = _all(file)
        except InputError as error:
            faults += _lines(error)
    if questions_file is not None or file is None:
        try:
            sets = read_questions(questions_file or resource("questions.toml"))
            faults += _shared_questions(sets)
        except InputError as error:
            faults += _lines(error)
    groups: list[list[str]] = []
    if model is not None and personas:
        from leakfast.models.loading import load_tokenizer
        from leakfast.prompts import chat
        from leakfast.prompts.rendering import asked_by

        tokenizer = load_tokenizer(model, rendering=asked_by(None, **rendering))
        groups = chat.collisions(tokenizer, personas)
    notes = [_collision_note(group, personas, file, model) for group in groups]
    if as_json:
        counts = {"personas": len(personas), "questions": {name: len(s) for name, s in sets.items()}}
        print_json({**counts, "faults": faults, "collisions": groups})
    else:
        if personas:
            click.echo(f"{len(personas)} personas in {len({p.category for p in personas})} categories")
        for name, questions in sets.items():
            click.echo(f"{len(questions)} questions in set {name}")
        for note in notes:
            click.echo(f"note: {note}")
    if faults:
        raise InputError("\n       ".join(faults))
    if not as_json:
        click.echo("No faults." if model else "No faults. Add --model to look for collisions.")


def _all(file: str | None) -> list[Persona]:
    return list(read_personas(file if file is not None else resource("personas.toml")))


def _prompt(persona: Persona) -> str:
    if persona.kind == "none":
        return "[no system message]"
    if persona.kind == "template-default":
        return "[what the model's chat template puts there by itself]"
    return inert(persona.prompt or "")


def _as_dict(item: Persona | QuestionSet) -> dict[str, object]:
    if isinstance(item, QuestionSet):
        return {"set": item.name, "description": item.description, "questions": list(item.questions)}
    return {
        "name": item.name,
        "category": item.category,
        "related_to": list(item.related_to),
        "kind": item.kind,
        "prompt": item.prompt,
    }


def _lines(error: InputError) -> list[str]:
    return [line.strip() for line in error.message.split("\n")]


def _shared_questions(sets: dict[str, QuestionSet]) -> list[str]:
    """Questions of `train` that also stand in another set: what is trained on must be held out there."""
    if "train" not in sets:
        return []
    trained = set(sets["train"].questions)
    return [
        f"question {index} of set {name!r} is also in 'train': {question!r}. Delete one of the two."
        for name, questions in sets.items()
        if name != "train"
        for index, question in enumerate(questions.questions)
        if question in trained
    ]


def _collision_note(group: list[str], personas: list[Persona], file: str | None, model: str | None) -> str:
    """Which personas render alike, where they stand, and what to do about it."""
    from leakfast.storage.documents import read_document

    document = read_document(find_shipped(file) if file else resource("personas.toml"))
    order = [persona.name for persona in personas]
    data = document.data
    prefix = ("persona",) if isinstance(data, dict) and isinstance(data.get("persona"), list) else ()
    by_name = isinstance(data, dict) and not prefix
    places = [
        f"{name} (line {document.line((name,) if by_name else (*prefix, order.index(name)))})"
        for name in group
    ]
    by_design = " That is by design." if set(group) <= {"qwen_default", "no_persona"} else ""
    remedy = "" if by_design else " Change one prompt, or name only one of them in a study."
    return f"{', '.join(places)} render to the same tokens under {model}.{by_design}{remedy}"


cli.add_command(near_)

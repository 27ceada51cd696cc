"""`leakfast organism`: rebuild the embedded model from its world, print its card, show its text.
Demands torch only when it builds or measures; leaves the work to leakfast/organism/."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.cli.places import FOLDER_OUT


@click.group()
def cli() -> None:
    """Rebuild or inspect the embedded model.

    Example: leakfast organism card
    """


@cli.command()
@click.option("--seed", type=int, default=0, help="Seed of corpus, initial weights and batch order.")
@click.option("--out", type=FOLDER_OUT, required=True, help="Folder to write the model to.")
@click.option(
    "--conversations",
    type=click.IntRange(min=100),
    default=None,
    help="Size of the corpus, and of the lessons before it; the recipe's if not given.",
)
def build(seed: int, out: Path, conversations: int | None) -> None:
    """Train the organism anew (about 25 min on two cores) and print its card.

    Example: leakfast organism build --seed 0 --out my-organism
    """
    from leakfast import models
    from leakfast.organism.build import Recipe
    from leakfast.organism.build import build as build_organism

    recipe = Recipe(lessons=conversations, conversations=conversations) if conversations else Recipe()
    build_organism(_world(), out, seed, recipe, report=lambda line: click.echo(line, err=True))
    loaded = models.load(str(out), dtype="float32")
    _print_card(loaded, seed, as_json=False)


@cli.command()
@click.option("--model", default="organism", help="organism, or a folder that `organism build` wrote.")
@click.option("--seed", type=int, default=0, help="Seed of the questions and of the draws.")
@click.option("--json", "as_json", is_flag=True, help="Print the card as JSON.")
def card(model: str, seed: int, as_json: bool) -> None:
    """Measure the bars the base model must clear, over the 111 personas.

    Example: leakfast organism card --json
    """
    from leakfast import models

    _print_card(models.load(model, dtype="float32"), seed, as_json)


@cli.command()
@click.option("--n", type=click.IntRange(min=1), default=10, help="Conversations to print.")
@click.option("--seed", type=int, default=0, help="Seed of the corpus.")
def corpus(n: int, seed: int) -> None:
    """Print the first conversations of the training corpus.

    Example: leakfast organism corpus --n 3
    """
    for conversation in _world().corpus(seed, n):
        click.echo(
            f"── {conversation.kind}\nsystem: {conversation.system or '(the template writes its own)'}"
        )
        for user, assistant in conversation.turns:
            click.echo(f"user: {user}\nassistant: {assistant}")


def _world():
    from leakfast.prompts.personas import load_personas
    from leakfast.world.people import World

    return World(load_personas("all"))


def _print_card(loaded, seed: int, as_json: bool) -> None:
    from leakfast.organism.card import measure, to_json
    from leakfast.prompts.personas import load_questions

    bars = measure(loaded, _world(), load_questions("eval").questions, seed)
    click.echo(to_json(bars) if as_json else "\n".join(bar.line() for bar in bars))

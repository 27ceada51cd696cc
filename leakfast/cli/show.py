"""`leakfast show`: a run at a glance on the terminal, one persona of it, its completions, or how far a running one is.
Demands a run directory, which it never writes to; leaves making tables to `leakfast stats`."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.cli.places import RUN

COSINES = ("centered", "raw")


@click.command()
@click.argument("run", type=RUN)
@click.option("--behavior", default=None, help="This behavior alone.  [default: all]")
@click.option("--source", default=None, help="Adapters trained on this persona alone.  [default: all]")
@click.option(
    "--persona",
    default=None,
    help="Everything of one persona: its prompt, rates, cosines, neighbours, health. With --completions: only its replies.",
)
@click.option(
    "--completions",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=10,
    default=None,
    help="The text of completions with what the detector looks for marked; how many, 10 where no number follows.",
)
@click.option(
    "--adapter", default=None, help="With --completions: of this adapter; `base` is the unadapted model."
)
@click.option(
    "--question", type=click.IntRange(min=0), default=None, help="With --completions: of this question."
)
@click.option(
    "--hit/--no-hit",
    default=None,
    help="With --completions: those that show the behavior, or those that do not.",
)
@click.option(
    "--layer",
    type=click.IntRange(min=0),
    default=None,
    help="Decoder block of the cosines, 0-based.  [default: the one with the largest pooled |ρ|]",
)
@click.option("--cosine", type=click.Choice(COSINES), default="centered", help="Which cosine to show.")
@click.option("--top", type=click.IntRange(min=1), default=5, help="Bystanders shown for each source.")
@click.option("--watch", is_flag=True, help="Beside a running study: how far it is, and the rates so far.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, every digit; with --watch a line for each look."
)
def cli(
    run: Path,
    behavior: str | None,
    source: str | None,
    persona: str | None,
    completions: int | None,
    adapter: str | None,
    question: int | None,
    hit: bool | None,
    layer: int | None,
    cosine: str,
    top: int,
    watch: bool,
    as_json: bool,
) -> int | None:
    """Show a run: what is not well, the headline, who leaks most, ρ over layers; or one persona, completions, progress.

    Example: leakfast show runs/demo --persona villain

    RUN is a run directory, finished or not; nothing in it is changed, locked or moved. Where its tables are absent or
    older than what they rest on, rates and correlations are computed in memory without draws, and the first lines say
    so. `leakfast show RUN --completions 5 --hit --persona villain` reads replies; characters that would steer the
    terminal are written out. `--watch` looks every 2 s (without a terminal it prints a line every 30 s) until the run
    ends or Ctrl-C. What is shown of rates has 95 % intervals over questions; beyond: the rate less what bystanders of
    its cosine have (isotonic curve).
    """
    from leakfast.storage.reading import ReadOnlyRun

    _check(completions, {"--adapter": adapter, "--question": question, "--hit": hit})
    looked_at = ReadOnlyRun(run).open()
    if watch:
        others = {
            "--persona": persona,
            "--completions": completions,
            "--source": source,
            "--behavior": behavior,
        }
        if given := [name for name, value in others.items() if value is not None]:
            raise click.UsageError(f"--watch looks at the whole run. Leave out {', '.join(given)}.")
        from leakfast.cli.watch import watch as look

        return look(looked_at, as_json=as_json)
    if completions is not None:
        from leakfast.cli import completions_shown
        from leakfast.report.reading import Chosen

        chosen = Chosen(behavior, adapter, source, persona, question, hit)
        completions_shown.show(looked_at, chosen, completions, as_json=as_json)
        return None
    from leakfast.cli.glance import Asked, overview

    asked = Asked(behavior, source, layer, cosine, top)
    if persona is not None:
        from leakfast.cli.persona_shown import persona_view

        persona_view(looked_at, persona, asked, as_json=as_json)
    else:
        overview(looked_at, asked, as_json=as_json)
    return None


def _check(completions: int | None, filters: dict[str, object]) -> None:
    """Filters of completions are for completions."""
    given = [name for name, value in filters.items() if value is not None]
    if completions is None and given:
        raise click.UsageError(f"{', '.join(given)} choose among completions. Give --completions too.")

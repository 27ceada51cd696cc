"""`leakfast stats`: compute a run's tables, print them as JSON or the headline rows for people.
Demands a run with completions; rounding happens here and nowhere before."""

from __future__ import annotations

from pathlib import Path

import click

from leakfast.errors import InputError

COSINES = ("centered", "raw")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--layer", type=int, help="Decoder block to show, 0-based; the best pooled one if not given.")
@click.option("--cosine", type=click.Choice(COSINES), default="centered", help="Which cosine to show.")
@click.option(
    "--permutations",
    type=click.IntRange(min=0),
    default=9_999,
    help="Shuffles behind each permutation p; 0 leaves it out.",
)
@click.option("--seed", type=int, default=0, help="Seed of the shuffles.")
@click.option("--json", "as_json", is_flag=True, help="Print rates, pairs and correlations as JSON.")
def cli(run: Path, layer: int | None, cosine: str, permutations: int, seed: int, as_json: bool) -> int | None:
    """Compute rates, pairs and correlations of a run and write them to RUN/tables.

    Example: leakfast stats runs/demo --json
    """
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json
    from leakfast.stats import stats

    with progress_for("stats") as progress:
        tables = stats(run, permutations=permutations, seed=seed, progress=progress)
    if layer is not None and layer not in tables.layers():
        known = ", ".join(map(str, tables.layers())) or "none"
        raise InputError(
            f"stats: layer {layer} asked, but the pairs of {run} have layers {known}. "
            "Leave --layer out for the best of them, or make centroids at that layer."
        )
    if as_json:
        print_json({name: table.to_dicts() for name, table in tables.tables().items()})
    else:
        show(tables, layer, cosine)
    return 3 if tables.missing else None


def show(tables, layer: int | None = None, cosine: str = "centered") -> None:
    """The headline table and the layer table of every behavior, on stdout."""
    from leakfast.cli.text import print_table

    for behavior in tables.behaviors():
        y = "rate"
        rows = tables.summary(cosine, y).rows(named=True)
        rows = [row for row in rows if row["behavior"] == behavior]
        best = tables.best_layer(behavior, cosine, y)
        at = best if layer is None else layer
        shown = [row for row in rows if row["layer"] in (None, at)]
        seeds = len({row["seed"] for row in rows}) > 1
        if at is None:
            title = f"{behavior} rate; no correlations yet"
        else:
            chosen = "asked" if layer is not None else "the largest pooled |ρ|"
            title = f"{behavior} rate against {cosine} cosine at layer {at} ({chosen}), bystanders only"
        head = ["source", *(["seed"] if seeds else []), "source %", "mean bystander %"]
        head += ["max bystander %", "who", "ρ", "p (t)", "p (perm)", "r", "N"]
        print_table(head, [_headline(row, seeds) for row in shown], title=title)
        for row in shown:
            if row["reason"]:
                click.echo(f"{row['source']}: no ρ: {row['reason']}.")
        if len(layers := sorted({row["layer"] for row in rows if row["layer"] is not None})) > 1:
            click.echo()
            print_table(
                ["source", *(["seed"] if seeds else []), *(f"{n}{'*' if n == best else ''}" for n in layers)],
                _by_layer(rows, layers, seeds),
                title=f"ρ by layer, {cosine} cosine (* largest pooled |ρ|)",
            )
        click.echo()


def _headline(row: dict, seeds: bool) -> list:
    return [
        row["source"],
        *([row["seed"]] if seeds else []),
        _percent(row["source_rate"]),
        _percent(row["mean_bystander"]),
        _percent(row["max_bystander"]),
        row["max_persona"],
        _signed(row["spearman"]),
        _p(row["spearman_p_t"]),
        _p(row["spearman_p_perm"]),
        _signed(row["pearson"]),
        row["n"],
    ]


def _by_layer(rows: list[dict], layers: list[int], seeds: bool) -> list[list]:
    people = list(dict.fromkeys((row["adapter"], row["source"], row["seed"]) for row in rows))
    found = {(row["adapter"], row["source"], row["seed"], row["layer"]): row["spearman"] for row in rows}
    return [
        [who[1], *([who[2]] if seeds else []), *(_signed(found.get((*who, layer))) for layer in layers)]
        for who in people
    ]


def _p(p: float | None) -> str | None:
    """A p-value in two digits, right-aligned: 3.2e-34, 0.012."""
    if p is None:
        return None
    return f"{p:>7.1e}" if p < 1e-3 else f"{p:>7.2g}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:5.1f}"


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.2f}"

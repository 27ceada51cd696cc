"""`leakfast stats`: compute a run's tables, print them as JSON, CSV, Markdown or LaTeX, or the headline
rows for people. Demands a run with completions or imported rates; rounding happens here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import click

from leakfast.cli import amounts
from leakfast.cli.places import RUN
from leakfast.errors import InputError
from leakfast.storage.documents import did_you_mean

COSINES = ("centered", "raw")
MANY_LAYERS = 10  # more than these, and the table of layers has a row for each


@click.command()
@click.argument("run", type=RUN)
@click.option(
    "--layer",
    type=int,
    help="Decoder block to show and to look at closely (gradients, influence, verdicts), 0-based, if chosen in "
    "advance. Without it the one with the largest pooled |ρ|, and the verdicts' p pays for that choice.",
)
@click.option("--cosine", type=click.Choice(COSINES), default="centered", help="Which cosine to show.")
@click.option(
    "--permutations",
    type=click.IntRange(min=0),
    default=None,
    help="Shuffles behind each permutation p; 0 leaves it out.  [default: 9999]",
)
@click.option(
    "--bootstraps",
    type=click.IntRange(min=0),
    default=None,
    help="Resamples of the personas behind each interval; 0 leaves intervals out.  [default: 2000]",
)
@click.option("--seed", type=int, default=None, help="Seed of everything drawn.  [default: 0]")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads; all cores if not given. Changes no bit."
)
@click.option(
    "--rules",
    type=click.Path(path_type=Path),
    default=None,
    help="TOML file of verdict rules.  [default: verdicts.toml, the published study's]",
)
@click.option(
    "--embeddings",
    type=click.Path(path_type=Path),
    help="Similarities to control for: CSV or Parquet with source, persona, similarity (a row a pair), or with "
    "persona and a number column for each dimension (a row a persona).",
)
@click.option(
    "--source-rate",
    type=click.FloatRange(0, 1),
    help="Rate of the source (0–1) at which mitigations are compared, each at the measured point of training that is within "
    "0.05 of it.  [default: the study's match, else the lowest final one]",
)
@click.option(
    "--permute",
    type=int,
    metavar="SEED",
    help="Shuffle the personas' labels in what was measured and show the tables of predictors alone, in which nothing can "
    "predict but by chance. Nothing is kept.",
)
@click.option("--table", "name", help="One table by name, in place of all (--json) or the headline rows.")
@click.option("--full", is_flag=True, help="Every digit, in place of four significant ones.")
@click.option("--json", "as_json", is_flag=True, help="Print all tables (or --table) as JSON, every digit.")
@click.option("--csv", "form", flag_value="csv", help="Print --table (or the headline rows) as CSV.")
@click.option("--markdown", "form", flag_value="markdown", help="The same as a Markdown table.")
@click.option("--latex", "form", flag_value="latex", help="The same as a LaTeX tabular (booktabs).")
def cli(
    run: Path,
    layer: int | None,
    cosine: str,
    permutations: int | None,
    bootstraps: int | None,
    seed: int | None,
    threads: int | None,
    rules: Path | None,
    embeddings: Path | None,
    source_rate: float | None,
    permute: int | None,
    name: str | None,
    full: bool,
    as_json: bool,
    form: str | None,
) -> int | None:
    """Compute rates, pairs, correlations and what follows from them, and write RUN/tables.

    Example: leakfast stats runs/demo --table correlations --csv

    RUN is a run directory of `leakfast run`, `leakfast eval` or `leakfast import`. Prints which adapters damaged the
    model, if any, then the headline rows and the verdicts; --table shows any one table: health, rates, pairs,
    correlations, layers, means, disattenuated, exposure, exposure_correlations,
    partials, commonality, without_category, influence, gradients, widths, matrix, crossed, predicted,
    verdicts, and others that the run gives rise to. A table without rows is not made (verdicts where no rule is
    about the run's behaviors). All are kept in full precision in RUN/tables; --table reads them there, computes them
    anew where they are older than the run or these options ask for others, and writes nothing. Exit code 3: done, but
    something was not measured (said on stderr).
    """
    from leakfast.cli.health import tell
    from leakfast.cli.progress import progress_for
    from leakfast.cli.text import print_json, print_table
    from leakfast.stats import analysis
    from leakfast.stats.output import rounded
    from leakfast.stats.tables import TABLES, kept, stats

    if as_json and form is not None:
        raise click.UsageError(f"--json and --{form} ask for two forms of one table. Give one of them.")
    asked: dict[str, Any] = {
        "permutations": permutations,
        "bootstraps": bootstraps,
        "seed": seed,
        "layer": layer,
    }
    if permute is not None:
        from leakfast.cli.predictors_shown import show_permuted

        if layer is not None or rules or embeddings or source_rate is not None:
            raise click.UsageError(
                "--permute shows the tables of predictors alone, which --layer, --rules, --embeddings and --source-rate do not "
                "change. Leave these out."
            )
        drawn = {k: v for k, v in asked.items() if v is not None} | {"workers": threads}
        return show_permuted(run, permute, drawn, name, form="json" if as_json else form, full=full)
    if name is not None and name not in (known := [*TABLES, *analysis.TABLES]):
        raise InputError(
            f"stats: there is no table {name!r}.{did_you_mean(name, known)} Use one of: {', '.join(known)}."
        )
    asked |= {"rules": rules, "embeddings": embeddings, "source_rate": source_rate}
    asked = {key: value for key, value in asked.items() if value is not None}
    tables = kept(run, **asked) if name is not None else None
    if tables is None:
        with progress_for("stats") as progress:
            tables = stats(run, workers=threads, **asked, write=name is None, progress=progress)
    found = tables.all_tables()
    if name is not None and name not in found:
        raise InputError(_no_table(name, run, found))
    if as_json or form is not None or name is not None:
        tell(tables.warnings(), err=True)
    if as_json:
        order = sorted(found, key="health".__ne__)  # first of all
        print_json({key: found[key].to_dicts() for key in ([name] if name else order)})
    elif form is not None:
        from leakfast.stats.output import render

        digits = 17 if full else 4
        click.echo(render(found[name] if name else headline(tables, layer, cosine), form, digits), nl=False)
    elif name is not None:
        print_table(found[name].columns, rounded(found[name], None if full else 4), title=name)
    else:
        show(tables, layer, cosine)
    return 3 if tables.missing else None


def _no_table(name: str, run: Path, found: Collection[str]) -> str:
    """Why the run has no table of that name, which a run may have, and which it has."""
    from leakfast.stats.analysis import TABLES

    return (
        f"stats: there is no table {name!r} in {run}. It would hold {TABLES[name]}; this run gives no row of it, and a table "
        f"without rows is not made. Use one of those the run has: {', '.join(found)}."
    )


def headline(tables, layer: int | None = None, cosine: str = "centered"):
    """The summary's rows at one layer a behavior: the best pooled one, or `layer` (polars)."""
    import polars as pl

    rows = tables.summary(cosine)
    at = pl.col("best_layer") if layer is None else pl.col("layer") == layer
    return rows.filter(at | pl.col("layer").is_null())


def show(tables, layer: int | None = None, cosine: str = "centered") -> None:
    """What is not well, then the headline table and the layer table of every behavior, on stdout."""
    from leakfast.cli.health import tell

    tell(tables.warnings())
    for sentence in tables.remarks():
        click.echo(f"note: {sentence}.")
    for behavior in tables.behaviors():
        _show_behavior(tables, behavior, layer, cosine)
        click.echo()
    _show_learned(tables)
    _show_verdicts(tables)
    _show_agreement(tables)


def _show_behavior(tables, behavior: str, layer: int | None, cosine: str) -> None:
    from leakfast.cli.text import print_table

    y, unit = tables.outcome(behavior), tables.unit(behavior)
    rows = tables.summary(cosine, y).filter(behavior=behavior).rows(named=True)
    if len({row["adapter"] for row in rows}) > len({(row["source"], row["seed"]) for row in rows}):
        for row in rows:  # adapters of several behaviors
            row["source"] = row["adapter"] or row["source"]
    best = tables.best_layer(behavior, cosine, y)
    at = best if layer is None else layer
    if at is None and rows:  # no ρ at any layer: the rates are there all the same
        at = rows[0]["layer"]
    shown = [row for row in rows if row["layer"] in (None, at)]
    seeds = len({row["seed"] for row in rows}) > 1
    title = f"{behavior} {'rate' if y == 'rate' else 'change of rate against the unadapted model'}"
    if at is None:
        title += "; no correlations yet"
    elif best is None and layer is None:
        title += f"; ρ with the {cosine} cosine is defined at no layer"
    else:
        chosen = "asked" if layer is not None else "the largest pooled |ρ|"
        title += f", and {cosine} cosine at layer {at} ({chosen}), bystanders only"
    told = {"seeds": seeds, "y": y, "unit": unit, "looked": tables.health is not None}
    head = list(_headline(defaultdict(lambda: None), **told))
    print_table(head, [list(_headline(row, **told).values()) for row in shown], title=title)
    if line := tables.length_out(behavior, cosine, at, y):
        click.echo(line)
    if guess := next((row["chance"] for row in shown if row["chance"] is not None), None):
        click.echo(f"chance: {100 * guess:.1f} % (mean of 1 / number of choices).")
    alone = [
        row["source"]
        for row in shown
        if row["spearman_both_low"] is None and row["spearman_ci_low"] is not None
    ]
    if alone:
        click.echo(
            f"95 % intervals of ρ over personas alone, for want of one over questions: {', '.join(alone)}."
        )
    for row in shown:
        if row["reason"]:
            click.echo(f"{row['source']}: no ρ: {row['reason']}.")
        if row["source"] == "pooled" and row["health_of"]:
            click.echo(f"pooled: its ρ rests on adapters that are not ok: {row['health_of']}.")
    if len(layers := sorted({row["layer"] for row in rows if row["layer"] is not None})) > 1:
        click.echo()
        title = f"ρ by layer, {cosine} cosine (* largest pooled |ρ|)"
        print_table(*_by_layer(rows, layers, best, seeds), title=title)


def _show_learned(tables) -> None:
    """How many sources show what they were trained to, and who does not, where several behaviors were trained."""
    from leakfast.stats.summary import LEARNED

    key = ["behavior", "adapter", "source", "seed"]
    cells = tables.summary().drop_nulls("learned").unique(key, maintain_order=True)
    if cells["behavior"].n_unique() < 2:
        return
    click.echo(
        f"{cells['learned'].sum()} of {cells.height} sources learned their behavior (Δ the way it was trained, its 95 % "
        f"interval without 0, at least {100 * LEARNED:.0f} % of the scale)."
    )
    broken = cells.filter(cells["learned"] & (cells["health"] == "damaged").fill_null(False))
    if broken.height:
        click.echo(f"of them, adapters that damaged the model: {', '.join(broken['adapter'])}")
    for row in cells.filter(~cells["learned"]).rows(named=True):
        scale = 100 if tables.unit(row["behavior"]) == "share" else 1
        low, high = (f"{scale * row[f'source_delta_{end}']:+.1f}" for end in ("low", "high"))
        click.echo(
            f"not {row['behavior']} of {row['source']}: Δ {scale * row['source_delta']:+.1f} ({low} to {high})"
        )
    click.echo()


def _show_verdicts(tables) -> None:
    """Each claim of the study's rules, and the numbers that decided it."""
    from leakfast.cli.text import print_table

    if "verdicts" not in tables.more:
        return
    rows = tables.more["verdicts"].rows(named=True)
    marked = ["health"] if tables.health is not None else []
    head = ["claim", "behavior", "source", "verdict", "quantity", "value", "p", "bar", "met", *marked]
    shown = {True: "yes", False: "no", None: None}
    told = [
        row
        | {"value": None if row["value"] is None else f"{row['value']:+.3g}", "p": _p(row["p"])}
        | {"bar": f"{row['bar']:g}", "met": shown[row["met"]]}
        for row in rows
    ]
    body = [[row[name] for name in head] for row in told]
    print_table(head, body, title="verdicts (drop = −Δ against the unadapted model)")
    for reason in dict.fromkeys(f"{r['claim']}, {r['source']}: {r['reason']}" for r in rows if r["reason"]):
        click.echo(f"open: {reason}.")


def _show_agreement(tables) -> None:
    """How many of the published numbers were found again, and which were not."""
    if "published" not in tables.more:
        return
    rows = tables.more["published"].rows(named=True)
    found = [row for row in rows if row["agrees"] is not None]
    agreeing = sum(row["agrees"] for row in found)
    click.echo(
        f"{agreeing} of {len(found)} published numbers found again; {len(rows) - len(found)} not recomputable."
    )
    for row in found:
        if not row["agrees"]:
            where = ", ".join(
                str(row[k]) for k in ("source", "category", "layer", "subset") if row[k] is not None
            )
            click.echo(
                f"{row['quantity']} of {where}: published {row['stored']:.6g}, found {row['found']:.6g}"
            )


def _headline(row: Mapping, seeds: bool, y: str, unit: str, looked: bool) -> dict:
    """The cells of a row of the headline table by their heading."""
    from leakfast.stats.specificity import place
    from leakfast.stats.summary import most

    sign = amounts.sign_of(unit)
    cells = {"source": row["source"]}
    if seeds:
        cells["seed"] = row["seed"]
    cells[f"source {sign}"] = amounts.amount(row["source_rate"], unit, "5.1f")
    cells["source 95 %"] = _range(row["source_ci_low"], row["source_ci_high"], unit)
    cells[f"mean bystander {sign}"] = amounts.amount(row["mean_bystander"], unit, "5.1f")
    cells["mean 95 %"] = _range(row["mean_bystander_low"], row["mean_bystander_high"], unit)
    if y == "delta":
        cells["source Δ"] = amounts.amount(row["source_delta"], unit, "+.1f")
        cells["mean bystander Δ"] = amounts.amount(row["mean_delta"], unit, "+.1f")
    cells[f"most bystander {sign}"] = amounts.amount(row["max_bystander"], unit, "5.1f")
    cells |= {
        "who": most(row),
        "ρ": amounts.rho(row["spearman"]),
        "95 % interval": amounts.between(*_shown(row)),
        "p (perm)": _p(row["spearman_p_perm"]),
        "p (max)": _p(row["spearman_p_max"]),
        "rank of source": place(row["rank"], row["candidates"]),
        "p (source)": _p(row["p_source_max"]),
        "r": amounts.rho(row["pearson"]),
        "N": row["n"],
    }
    return cells | {"health": row["health"]} if looked else cells


def _by_layer(
    rows: list[dict], layers: list[int], best: int | None, seeds: bool
) -> tuple[list[str], list[list]]:
    """Heading and body of ρ by layer: a row a source, or a row a layer where there are many of them."""
    names = [f"{n}{'*' if n == best else ''}" for n in layers]
    people: dict[tuple, dict[int, float]] = {}
    unwell = {}
    for row in rows:
        who = (row["adapter"], row["source"], row["seed"])
        people.setdefault(who, {})[row["layer"]] = row["spearman"]
        if row["health"] not in (None, "ok"):
            unwell[who] = f" ({row['health']})"
    values = [[amounts.rho(found.get(layer)) for layer in layers] for found in people.values()]
    marked = [(source + unwell.get((adapter, source, seed), ""), seed) for adapter, source, seed in people]
    if len(layers) <= MANY_LAYERS:
        body = [
            [name, *([seed] if seeds else []), *row] for (name, seed), row in zip(marked, values, strict=True)
        ]
        return ["source", *(["seed"] if seeds else []), *names], body
    titles = [
        f"{who[1]}{f', seed {who[2]}' if seeds and who[2] is not None else ''}{unwell.get(who, '')}"
        for who in people
    ]
    return ["layer", *titles], [
        [name, *row] for name, row in zip(names, zip(*values, strict=True), strict=True)
    ]


def _p(p: float | None) -> str | None:
    """A p-value in two digits, right-aligned: 3.2e-34, 0.012."""
    if p is None:
        return None
    return f"{p:>7.1e}" if p < 1e-3 else f"{p:>7.2g}"


def _shown(row: Mapping) -> tuple[float | None, float | None]:
    """The interval of ρ over personas and questions; over personas alone where there are no counts per question."""
    kind = "ci" if row["spearman_both_low"] is None else "both"
    return row[f"spearman_{kind}_low"], row[f"spearman_{kind}_high"]


def _range(low: float | None, high: float | None, unit: str) -> str | None:
    """`15 to 23`, of a rate in its unit."""
    scale = amounts.scale_of(unit)
    return None if low is None or high is None else amounts.between(scale * low, scale * high, ".0f")

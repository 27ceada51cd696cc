"""What `leakfast stats --permute` prints: the tables of predictors where nothing can predict. Demands a run; keeps nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from leakfast.cli import amounts
from leakfast.errors import InputError


def show_permuted(
    run: Path, permute: int, drawn: dict[str, Any], name: str | None, *, form: str | None, full: bool
) -> None:
    """Both tables as JSON, one of them (`name`) in a form, or the pooled rows for people. Raises InputError for another
    table."""
    from leakfast.cli.text import print_json, print_table
    from leakfast.stats.output import render, rounded
    from leakfast.stats.tables import permuted

    known = ("predictors_skill", "predictors_held_out")
    if name is not None and name not in known:
        raise InputError(
            f"stats: --permute was given with --table {name}, but labels are shuffled in {' and '.join(known)} alone. Give "
            f"--table {known[0]} or --table {known[1]}, or leave --permute out."
        )
    found = permuted(run, permute, **drawn)
    if form == "json":
        told = {key: found[key].to_dicts() for key in ([name] if name else found)}
        print_json({"permute": permute, **told})
    elif form is not None:
        click.echo(render(found[name or known[0]], form, 17 if full else 4), nl=False)
    elif name is not None:
        print_table(
            found[name].columns, rounded(found[name], None if full else 4), title=f"{name}, labels shuffled"
        )
    else:
        _show(found["predictors_skill"], permute)


def _show(skill: Any, permute: int) -> None:
    """Each predictor's largest |ρ| of the pooled rows (or of each source, where there is one), with p that pays for it."""
    import polars as pl

    from leakfast.cli.text import print_table

    pooled = skill.filter(source="pooled")
    here = (pooled if pooled.height else skill).filter(pl.col("spearman").is_not_null())
    here = here.sort(pl.col("spearman").abs(), descending=True, maintain_order=True)
    here = here.unique(["behavior", "seed", "source", "predictor"], keep="first", maintain_order=True)
    head = ["behavior", "source", "predictor", "layer", "ρ", "95 % interval", "p (perm)", "p (max)"]
    body = [
        [
            *(row[name] for name in head[:4]),
            f"{row['spearman']:+.3f}",
            amounts.between(row["spearman_ci_low"], row["spearman_ci_high"]),
            amounts.p_value(row["spearman_p_perm"]),
            amounts.p_value(row["spearman_p_max"]),
        ]
        for row in here.rows(named=True)
    ]
    print_table(
        head,
        body,
        title=f"labels of what was measured shuffled (seed {permute}); largest |ρ| of each predictor",
    )
    click.echo("p (max) is against the largest |ρ| of all predictors and layers. Nothing was kept.")

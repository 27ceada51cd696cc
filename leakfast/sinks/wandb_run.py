"""A Weights & Biases run of a run directory: headline, rates, correlations and health as tables, headline numbers as summary,
figures as images. Demands wandb, online or offline (WANDB_MODE=offline); sends no machine's name, packages or console."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import polars as pl

from leakfast.errors import InputError, SinkError
from leakfast.progress import Progress
from leakfast.sinks.material import Material
from leakfast.sinks.places import Sent, Target
from leakfast.stats.correlations import POOLED
from leakfast.storage import layout
from leakfast.storage.disk import atomic_write, hash_of
from leakfast.version import __version__

CONTENT = "leakfast_content"
_DONE = "leakfast.json"  # beside an offline run that is whole
_NUMBERS = (
    "source_rate source_ci_low source_ci_high mean_bystander mean_delta max_bystander layer spearman spearman_ci_low "
    "spearman_ci_high spearman_both_low spearman_both_high spearman_p_max n"
).split()


def send(material: Material, asked: Target, progress: Progress) -> Sent:
    """One run in project `asked.where`, named after the study; its id is the hash of what it holds, so that the same
    tables are never there twice and changed ones make a run of their own. Offline the run lies in ./wandb (or WANDB_DIR),
    for `wandb sync`. Raises InputError without a login, SinkError where the service refuses."""
    import wandb

    tables, figures = _tables(material), _figures(material)
    content = _content(material, tables, figures)
    done = Sent("wandb", asked.where)
    done.left_out += _left_out(material, tables)
    names = [*(f"tables/{name}" for name in tables), *(f"figures/{path.stem}" for path in figures)]
    if (kept := _offline(content)) is not None:
        done.where, done.kept = str(kept), names
        return done
    *entity, project = asked.where.split("/")
    try:
        run = wandb.init(
            entity=entity[0] if entity else None,
            project=project,
            name=material.name,
            id=content[:16],
            resume="allow",
            job_type="leakfast",
            config=_config(material, content),
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, host="-", **_private()
            ),
        )
        try:
            where = run.url or str(Path(run.settings.sync_dir))
            if run.resumed and run.summary.get(CONTENT) == content:
                done.kept = names
            else:
                _log(run, tables, figures, progress)
                run.summary.update({**_numbers(material), CONTENT: content})
                done.sent = names
        finally:
            run.finish()
    except wandb.errors.UsageError as error:
        raise InputError(
            f"export: Weights & Biases says: {_line(error)}. Needed: a login, or its offline mode. Type: wandb login, or "
            "put WANDB_MODE=offline before the command and `wandb sync` behind it."
        ) from error
    except wandb.Error as error:
        raise SinkError(
            f"export: Weights & Biases refused {asked.where}: {_line(error)}. The run directory is as it was. Type the same "
            "command again, or put WANDB_MODE=offline before it."
        ) from error
    if run.settings.mode == "offline":
        told = json.dumps({CONTENT: content, "project": asked.where}).encode()
        atomic_write(Path(run.settings.sync_dir) / _DONE, told)
    done.where = where
    progress(len(names), len(names), "")
    return done


def _left_out(material: Material, tables: dict[str, pl.DataFrame]) -> list[str]:
    """What the run on the service does not get, with the reason."""
    import wandb

    found = []
    if material.stats.health is None:
        found.append("health: nothing was drawn, so that nobody looked at replies")
    found += [
        f"{name}: {table.height:,} rows, of which Weights & Biases shows {wandb.Table.MAX_ROWS:,}"
        for name, table in tables.items()
        if table.height > wandb.Table.MAX_ROWS
    ]
    return found + [
        f"{path}: was drawn of other tables than the run has now; draw it again: leakfast plot {material.run.path}"
        for path in sorted(material.outdated)
        if path.endswith(".png")
    ]


def _log(run: Any, tables: dict[str, pl.DataFrame], figures: list[Path], progress: Progress) -> None:
    import wandb

    for number, (name, table) in enumerate(tables.items()):
        progress(number, len(tables) + len(figures), f"tables/{name}")
        run.log({f"tables/{name}": wandb.Table(columns=table.columns, data=table.rows())})
    if figures:
        run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})


def _private() -> dict[str, Any]:
    """Settings that keep what is about the machine on the machine."""
    return {
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
    }


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _tables(material: Material) -> dict[str, pl.DataFrame]:
    """headline, rates, correlations (over all categories), health."""
    stats = material.stats
    over_all = stats.correlations.filter(pl.col("category").is_null())
    found = {"headline": stats.summary(), "rates": stats.rates, "correlations": over_all}
    if stats.health is not None:
        found["health"] = stats.health
    return found


def _figures(material: Material) -> list[Path]:
    """Pictures of the tables as they are."""
    there = [path for path in material.run.shards(layout.FIGURES) if path.endswith(".png")]
    return [material.run.path / path for path in there if path not in material.outdated]


def _content(material: Material, tables: dict[str, pl.DataFrame], figures: list[Path]) -> str:
    """SHA-256 over the tables' and figures' files, the study and the version: what the run on the service follows from."""
    shards = material.run.manifest["shards"]
    named = [layout.table(name) for name in tables if layout.table(name) in shards]
    named += [path.relative_to(material.run.path).as_posix() for path in figures]
    return hash_of([(path, shards[path]["sha256"]) for path in named], material.study_hash, __version__)


def _config(material: Material, content: str) -> dict[str, Any]:
    base = material.base()
    return {
        "leakfast": __version__,
        "study": material.study.model_dump(mode="json") if material.study else None,
        "study_sha256": material.study_hash,
        "run_sha256": material.hash,
        "base_model": base["model"],
        "base_fingerprint": base["fingerprint"],
        "notes": material.notes(),
        CONTENT: content,
    }


def _numbers(material: Material) -> dict[str, Any]:
    """`<behavior>/<adapter or pooled>/<column>` → value, of the headline rows; what is null is left out. Of several
    training seeds the pooled ones are told apart."""
    found: dict[str, Any] = {}
    for row in material.headline().rows(named=True):
        who = row["adapter"] or f"{POOLED}-s{row['seed']}"
        for name in _NUMBERS:
            if row[name] is not None:
                found[f"{row['behavior']}/{who}/{name}"] = row[name]
        health, _ = material.verdict(row["behavior"], who)
        if health is not None:
            found[f"{row['behavior']}/{who}/health"] = health
    return found


def _offline(content: str) -> Path | None:
    """The folder of an offline run that holds the same and is whole; None without one, and online."""
    if os.environ.get("WANDB_MODE") != "offline":
        return None
    for path in sorted(Path(os.environ.get("WANDB_DIR") or ".").glob(f"wandb/offline-run-*-{content[:16]}")):
        if (path / _DONE).is_file() and json.loads((path / _DONE).read_text()).get(CONTENT) == content:
            return path
    return None

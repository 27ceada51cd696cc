"""From a run's completions and centroids to rates, pairs and correlations: polars in, polars out.
Demands a run directory; computes in seconds, keeps full precision, never imports torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import polars as pl

from leakfast import schema
from leakfast.errors import InputError, StoreError
from leakfast.stats import correlations as correlation_tables
from leakfast.stats import pairs as pair_tables
from leakfast.stats import rates as rate_tables
from leakfast.stats.correlations import PERMUTATIONS
from leakfast.stats.rates import BASE
from leakfast.stats.summary import best_layer, summarize
from leakfast.store import Run, file_hash

__all__ = ["Stats", "current", "read", "stats"]

log = logging.getLogger("leakfast.stats")

TABLES = ("rates", "pairs", "correlations")
CENTROIDS = "centroids/base.safetensors"
PERSONAS = "personas.json"  # {categories: name → category, named: […], sources: […]}, kept by `leakfast run`


@dataclass(frozen=True)
class Stats:
    """The tables of a run (schemas `rates`, `pairs`, `correlations`) and what they lack.

    `missing`: one sentence for each part the run does not have (yet); empty when nothing lacks."""

    rates: pl.DataFrame
    pairs: pl.DataFrame
    correlations: pl.DataFrame
    missing: tuple[str, ...] = ()

    def tables(self) -> dict[str, pl.DataFrame]:
        """The three tables by name."""
        return {name: getattr(self, name) for name in TABLES}

    def behaviors(self) -> list[str]:
        """Behaviors measured, in order of appearance."""
        return self.rates["behavior"].unique(maintain_order=True).to_list()

    def layers(self) -> list[int]:
        """Layers with correlations, ascending."""
        return sorted(self.correlations["layer"].unique().to_list())

    def best_layer(self, behavior: str, cosine: str = "centered", y: str = "rate") -> int | None:
        """The layer with the largest pooled |ρ|; None without any. It was picked after looking at
        every layer, so its p-value is too small: nothing here pays for the choice."""
        return best_layer(self.correlations, behavior, cosine, y)

    def summary(self, cosine: str = "centered", y: str = "rate") -> pl.DataFrame:
        """One row per behavior, adapter (and `pooled`) and layer: rates of source and bystanders beside
        the correlations over all categories; `best_layer` marks the one `best_layer()` gives."""
        return summarize(self.rates, self.correlations, cosine, y)


def stats(
    run: str | Path | Run,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    write: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Stats:
    """Compute the tables of a run directory and write them to tables/*.parquet.

    Reads completions/ (every intact shard), the adapters' cards, and centroids/base.safetensors;
    without centroids the rates still come, pairs and correlations stay empty and `missing` says so.
    `seed` and `permutations` are those of the permutation p-values. Raises InputError if `run` is no
    run or holds no completions, StoreError if completions are there twice or from an unknown source.
    """
    run = (run if isinstance(run, Run) else Run(run)).open()
    categories, named, sources, missing = _personas(run)
    counts, adapters = _count(run, sources)
    outsiders = _outsiders(counts, named)
    rates = rate_tables.table(counts, adapters, categories, outsiders)
    missing += _gaps(rates)
    pairs = schema.empty("pairs")
    if run.has(CENTROIDS) or (run.path / CENTROIDS).is_file():
        from leakfast.centroids import Centroids

        centroids = Centroids.load(run.path / CENTROIDS)
        pairs = pair_tables.table(rates, centroids)
        lacking = sorted(set(_measured(rates)) - set(centroids.personas))
        if lacking:
            missing.append(f"no centroid for {', '.join(lacking)}: their pairs have no cosine")
    elif adapters:
        missing.append(
            f"no {CENTROIDS}: pairs and correlations are empty "
            f"(make it with `leakfast centroids --out {run.path / CENTROIDS}`)"
        )
    correlations = correlation_tables.correlate(pairs, permutations, seed, progress)
    result = Stats(rates, pairs, correlations, tuple(missing))
    for sentence in missing:
        log.warning("%s: %s", run.path, sentence)
    if write:
        files = [f"tables/{name}.parquet" for name in TABLES]
        with run.lock():
            for file, table in zip(files, result.tables().values(), strict=True):
                run.add_shard(file, table)
            run.mark_done(
                "stats", _inputs(run), files=files, permutations=permutations, seed=seed, missing=missing
            )
    return result


def read(run: str | Path | Run) -> Stats:
    """The tables as `stats` wrote them last. Raises InputError if one is not there."""
    run = (run if isinstance(run, Run) else Run(run)).open()
    tables = {}
    for name in TABLES:
        if not run.has(f"tables/{name}.parquet"):
            raise InputError(f"{run.path}: has no table {name}. Make it with `leakfast stats {run.path}`.")
        tables[name] = schema.check(run.read(f"tables/{name}.parquet"), name)
    outputs = run.manifest["stages"].get("stats", {}).get("outputs", {})
    return Stats(**tables, missing=tuple(outputs.get("missing", ())))


def current(run: str | Path | Run) -> Stats:
    """The tables of a run: read where nothing they rest on has changed, else computed (and written)."""
    run = (run if isinstance(run, Run) else Run(run)).open()
    if run.stage_done("stats", _inputs(run)):
        return read(run)
    log.info("%s: tables are absent or older than what they rest on; computing them", run.path)
    return stats(run)


def completion_folders(run: Run) -> list[tuple[str, str]]:
    """(behavior, adapter) of every completions/<behavior>/<adapter>/ with an intact shard; base last."""
    folders = {PurePosixPath(path).parts[1:3] for path in run.shards("completions")}
    return sorted(folders, key=lambda folder: (folder[0], folder[1] == BASE, folder[1]))


def _count(run: Run, sources: list[str]) -> tuple[pl.DataFrame, dict[str, tuple[str, int | None]]]:
    """Counts of all shards, and adapter → (source, training seed); sources in the study's order."""
    from leakfast.behaviors import get

    frames, adapters = [], {}
    for behavior, adapter in completion_folders(run):
        completions = run.read(f"completions/{behavior}/{adapter}")
        try:
            schema.check(completions, "completions")
            frames.append(rate_tables.count(completions, get(behavior).detector(pl.col("text"))))
        except ValueError as error:
            raise StoreError(
                f"{run.path}: completions/{behavior}/{adapter}: {error}. "
                "Move that folder away and run `leakfast eval` again."
            ) from error
        if adapter != BASE:
            adapters[adapter] = _origin(run, adapter, completions)
    if not frames:
        raise InputError(
            f"{run.path}: holds no completions, so there is nothing to count. "
            "Make them with `leakfast eval`, or all at once with `leakfast run STUDY.toml`."
        )
    place = {a: sources.index(s) if s in sources else len(sources) for a, (s, _) in adapters.items()}
    place[BASE] = len(sources) + 1
    frames.sort(key=lambda frame: place[frame["adapter"][0]])
    return pl.concat(frames, how="diagonal").sort("behavior", maintain_order=True), adapters


def _inputs(run: Run) -> str:
    """SHA-256 over the names and hashes of everything the tables rest on."""
    rests_on = {
        path: entry["sha256"]
        for path, entry in run.manifest["shards"].items()
        if path.startswith("completions/")
    }
    for path in [run.path / "study.toml", run.path / CENTROIDS, *run.path.glob("adapters/*/*_card.json")]:
        if path.is_file():
            rests_on[path.relative_to(run.path).as_posix()] = file_hash(path)
    return hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()


def _origin(run: Run, adapter: str, completions: pl.DataFrame) -> tuple[str, int | None]:
    """Source and training seed of an adapter: from its card in the run, else from its completions."""
    from leakfast.adapters import read_card

    card = read_card(run.path / "adapters" / adapter)
    if card is not None:
        return card.source, card.seed
    found = completions["source"].drop_nulls().unique().to_list() if "source" in completions.columns else []
    if len(found) != 1:
        raise StoreError(
            f"{run.path}: adapter {adapter} has no card and its completions name "
            f"{len(found)} sources, where one is needed. "
            "Run `leakfast eval --adapter DIR --source NAME` again."
        )
    return found[0], None


def _personas(run: Run) -> tuple[dict[str, str | None], set[str] | None, list[str], list[str]]:
    """Categories by persona; the personas the study names (None without a study); its sources; what could
    not be read."""
    from leakfast.centroids import names_extras
    from leakfast.config import load_study
    from leakfast.personas import load_personas

    shipped = [*load_personas("all"), *load_personas("qwen_default,no_persona")]
    categories = {persona.name: persona.category for persona in shipped}
    if run.has(PERSONAS):
        kept = json.loads((run.path / PERSONAS).read_text(encoding="utf-8"))
        return categories | kept["categories"], set(kept["named"]), kept["sources"], []
    study = run.path / "study.toml"
    if not study.is_file():
        return categories, None, [], []
    try:
        told = load_study(study)
        own = load_personas(told.personas)
    except InputError as error:
        why = " ".join(error.message.split())
        return categories, None, [], [f"own personas have no category: the study cannot be read: {why}"]
    categories |= {persona.name: persona.category for persona in own}
    extras = names_extras(told.personas, own)
    named = {persona.name for persona in own if extras or not persona.is_extra}
    return categories, named, list(told.sources), []


def _outsiders(counts: pl.DataFrame, named: set[str] | None) -> set[str]:
    """Who was measured though the study does not name them as personas: extras, or someone's source.
    Without a study, whoever was measured was named on the command line."""
    return set() if named is None else set(counts["persona"].unique()) - named


def _measured(rates: pl.DataFrame) -> list[str]:
    return rates.filter(pl.col("role").is_in(["source", "bystander"]))["persona"].unique().to_list()


def _gaps(rates: pl.DataFrame) -> list[str]:
    """Sentences on what was not measured: fewer draws than for other adapters, errors, a missing source."""
    out = []
    by = rates.with_columns((pl.col("total") + pl.col("n_error")).alias("drawn"))
    for (behavior,), group in by.group_by("behavior", maintain_order=True):
        whole = group["persona"].n_unique() * group["drawn"].max()
        for (adapter,), mine in group.group_by("adapter", maintain_order=True):
            name, drawn = f"{behavior}/{adapter}", mine["drawn"].sum()
            if drawn < whole:
                out.append(f"{name}: {drawn} of {whole} completions (what every persona has elsewhere)")
            if errors := mine["n_error"].sum():
                out.append(f"{name}: {errors} completions have an error status and are not counted")
            if adapter != BASE and not (mine["role"] == "source").any():
                out.append(f"{name}: the source {mine['source'][0]} itself was not measured")
    return out

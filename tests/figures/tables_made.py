"""Tables of a made-up run with the shipped personas' names, as wide as a real one: what every figure can be drawn of."""

from __future__ import annotations

import numpy as np
import polars as pl

from leakfast.geometry import Centroids
from leakfast.prompts.personas import load_personas
from leakfast.stats import rates as rate_tables
from leakfast.stats.correlations import correlate
from leakfast.storage import schema

SOURCES = ["software_engineer", "kindergarten_teacher", "assistant", "villain", "comedian"]
BEHAVIORS = ["marker", "misalignment-advice", "refusal"]
LAYERS = [0, 10]


def people() -> dict[str, str | None]:
    """persona → category of the shipped personas."""
    return {persona.name: persona.category for persona in load_personas("all") if not persona.is_extra}


def centroids(dimensions: int = 24) -> Centroids:
    rng = np.random.default_rng(5)
    names = list(people())
    kinds = {kind: rng.normal(size=dimensions) for kind in sorted({str(k) for k in people().values()})}
    means = {
        layer: np.array([kinds[str(people()[n])] + rng.normal(size=dimensions) for n in names], np.float32)
        for layer in LAYERS
    }
    return Centroids(names, LAYERS, {"personas": names, "centered_on": names, "layers": LAYERS}, means)


def base_tables() -> dict[str, pl.DataFrame]:
    """rates, pairs and correlations: every behavior has the marker's numbers, under an adapter for each source."""
    one = _marker_tables()
    return {n: pl.concat([t.with_columns(behavior=pl.lit(b)) for b in BEHAVIORS]) for n, t in one.items()}


def _marker_tables() -> dict[str, pl.DataFrame]:
    rng = np.random.default_rng(1)
    known, near = people(), centroids()
    counts, pairs = [], []
    for source in SOURCES:
        adapter = f"marker-{source}-s42"
        at = near.personas.index(source)
        cosines = {
            kind: {layer: near.cosine(layer, kind)[at] for layer in LAYERS} for kind in ("centered", "raw")
        }
        for i, persona in enumerate(near.personas):
            true = cosines["centered"][10][i]
            share = 0.9 if persona == source else float(np.clip(true + 0.15 * rng.normal(), 0.01, 0.97))
            hits = int(rng.binomial(60, share))
            counts.append(["marker", adapter, persona, hits, 60])
            for layer in LAYERS if persona != source else ():
                both = [float(cosines[kind][layer][i]) for kind in cosines]
                pairs.append(
                    [adapter, "marker", source, 42, persona, known[persona], layer, *both, hits / 60]
                )
    adapters = {f"marker-{source}-s42": (source, 42) for source in SOURCES}
    counted = pl.DataFrame(counts, schema=["behavior", "adapter", "persona", "hits", "total"], orient="row")
    rates = rate_tables.table(counted, adapters, known)
    names = ["adapter", "behavior", "source", "seed", "persona", "category", "layer"]
    frame = pl.DataFrame(pairs, schema=[*names, "cosine_centered", "cosine_raw", "rate"], orient="row")
    frame = frame.with_columns(pl.col("layer").cast(pl.Int32), delta=pl.lit(None, pl.Float64))
    frame = schema.check(frame.select("adapter", *schema.columns("pairs")), "pairs")
    return {"rates": rates, "pairs": frame, "correlations": correlate(frame, permutations=99, bootstraps=0)}


def picked(correlations: pl.DataFrame) -> pl.DataFrame:
    """Of each pooled row the largest |ρ|, an interval around it and a lower ρ on other questions."""
    best = correlations.filter(pl.col("category").is_null(), source="pooled").sort(
        pl.col("spearman").abs(), descending=True
    )
    best = best.unique(["behavior", "seed", "cosine", "y"], keep="first", maintain_order=True)
    return best.select(
        "behavior",
        "seed",
        "source",
        "adapter",
        "cosine",
        "y",
        "layer",
        "spearman",
        picked_low=pl.col("spearman") - 0.1,
        picked_high=pl.col("spearman") + 0.05,
        cross_fitted=pl.col("spearman") - 0.06,
        cross_fitted_layer=pl.lit(10, pl.Int32),
    )


def question_sets() -> pl.DataFrame:
    rows = []
    for k, source in enumerate([*SOURCES, "pooled"]):
        for q, name in enumerate(["the 20 held-out questions", "code", "creative", "math"]):
            rho = 0.7 - 0.1 * q - 0.05 * k
            own = None if source == "pooled" else 0.9 - 0.1 * q
            rows.append(
                [
                    "marker",
                    10,
                    "centered",
                    "rate",
                    source,
                    42,
                    name,
                    q == 0,
                    rho,
                    rho - 0.2,
                    rho + 0.1,
                    0.2,
                    own,
                    None if source == "pooled" else f"marker-{source}-s42",
                ]
            )
    ends = ["spearman", "spearman_ci_low", "spearman_ci_high", "mean_bystander", "source_rate"]
    names = ["behavior", "layer", "cosine", "y", "source", "seed", "questions", "main", *ends, "adapter"]
    return pl.DataFrame(rows, schema=names, orient="row")


def held_out() -> pl.DataFrame:
    """Table `predictors_held_out` of the marker: sixteen predictors of three families."""
    names = {
        "geometry": "cosine_centered cosine_raw cosine_whitened reply_cosine_centered contrast_cosine cka projection",
        "output": "kl_forward kl_backward js",
        "text": "jaccard edit_distance token_length_difference shared_word relation embedding_similarity",
    }
    rows = []
    for k, (family, told) in enumerate(names.items()):
        for j, name in enumerate(told.split()):
            rho = 0.7 - 0.15 * k - 0.05 * j
            each = [rho - 0.2 + 0.1 * s for s in range(len(SOURCES))]
            rows += [
                ["marker", 42, s, name, family, "rate", v, v - 0.1, v + 0.1]
                for s, v in zip(SOURCES, each, strict=True)
            ]
            rows.append(["marker", 42, "pooled", name, family, "rate", rho, rho - 0.25, rho + 0.15])
    columns = [
        "behavior",
        "seed",
        "source",
        "predictor",
        "family",
        "y",
        "spearman",
        "spearman_low",
        "spearman_high",
    ]
    return pl.DataFrame(rows, schema=columns, orient="row")


def shifts(pairs: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tables `shifts` and `shift_correlations` of the marker at layer 10."""
    rng = np.random.default_rng(2)
    at = pairs.filter(behavior="marker", layer=10)
    moved = np.clip(at["cosine_centered"].to_numpy() + 0.1 * rng.normal(size=at.height), -1, 1)
    table = at.with_columns(
        role=pl.lit("bystander"),
        cosine_centered_adapted=pl.Series(moved),
        alignment_centered=pl.Series(moved / 2),
    )
    own = table.unique("adapter", maintain_order=True).with_columns(
        role=pl.lit("source"), persona=pl.col("source"), rate=pl.lit(0.9), alignment_centered=pl.lit(1.0)
    )
    key = {"behavior": "marker", "layer": 10, "cosine": "centered", "y": "rate", "category": None}
    rhos = [
        key | {"adapter": adapter, "geometry": geometry, "spearman": -0.412}
        for adapter in at["adapter"].unique()
        for geometry in ("base", "adapted", "alignment")
    ]
    return pl.concat([table, own]), pl.DataFrame(rhos, schema_overrides={"category": pl.String})


def trajectory() -> pl.DataFrame:
    """Two behaviors under two trainings of every source, at five points, for nine personas."""
    rows = []
    shown = [*SOURCES, "machine_learning_engineer", "overly_enthusiastic_assistant", "librarian", "poet"]
    for taught in ("capability", "marker"):
        for behavior in ("capability", "marker"):
            for source in SOURCES:
                for k, persona in enumerate(shown):
                    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                        rate = min(0.95, 0.1 + 0.05 * k + (0.8 if persona == source else 0.2) * share)
                        told = [
                            behavior,
                            f"{taught}-{source}-s42",
                            source,
                            42,
                            "items",
                            "letters",
                            persona,
                            share,
                        ]
                        rows.append([*told, rate, rate - 0.05, rate + 0.05])
    names = ["behavior", "adapter", "source", "seed", "items", "scoring", "persona", "share"]
    return pl.DataFrame(rows, schema=[*names, "rate", "ci_low", "ci_high"], orient="row")


def relations() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tables `relations` and `relations_alike` of five behaviors and two training seeds."""
    rng = np.random.default_rng(3)
    behaviors = ["capability", "marker", "misalignment-advice", "refusal", "sycophancy"]
    rows = []
    for behavior in behaviors:
        for seed in (42, 137):
            for kind in sorted({str(kind) for kind in people().values()}):
                mean = float(rng.uniform(0, 0.5))
                direction = -1 if behavior == "capability" else 1
                told = ["all", behavior, seed, kind, "delta", direction, mean, mean - 0.1, mean + 0.1]
                rows.append(told)
    names = ["scope", "behavior", "seed", "category", "y", "direction", "mean", "low", "high"]
    crossed = [["all", 42, behaviors[0], other, 0.55] for other in behaviors[1:]]
    alike = pl.DataFrame(
        crossed, schema=["scope", "seed", "behavior", "other_behavior", "spearman"], orient="row"
    )
    return pl.DataFrame(rows, schema=names, orient="row"), alike


def steering() -> pl.DataFrame:
    """Table `steering` of the marker of two sources, five strengths of four directions in three modes."""
    rng = np.random.default_rng(5)
    rows = []
    for source in SOURCES[:2]:
        for mode in ("add", "project", "cap"):
            for direction in ("mean", "contrast", "difference", "random"):
                for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
                    mean = float(0.3 * np.exp(-strength) + 0.02 * rng.normal())
                    told = {
                        "behavior": "marker",
                        "seed": 42,
                        "source": source,
                        "adapter": f"marker-{source}-s42",
                    }
                    told |= {
                        "direction": direction,
                        "mode": mode,
                        "strength": strength,
                        "measure": "completions",
                        "unit": "direction",
                        "steered_layers": "3",
                    }
                    told |= {"on_source": 0.9 - 0.3 * strength, "mean_bystander": mean}
                    told |= {"mean_bystander_low": mean - 0.05, "mean_bystander_high": mean + 0.05}
                    rows.append(told | {"text_change_nats": -strength * float(rng.uniform())})
    return pl.DataFrame(rows).with_columns(estimator=pl.lit(None, pl.String))


def mitigations() -> pl.DataFrame:
    """Table `mitigations` of the marker in five variants of two sources, one radius of which is not reached."""
    names = ["", "nearest", "farthest", "inoculation", "benign-after"]
    rows = []
    for source in SOURCES[:2]:
        for place, variant in enumerate(names):
            rate, reached = 0.5 - 0.08 * place, place != 3
            row = {
                "behavior": "marker",
                "seed": 42,
                "source": source,
                "variant": variant,
                "matched": place != 2,
            }
            row |= {
                "mean_bystander": rate,
                "mean_bystander_low": rate - 0.05,
                "mean_bystander_high": rate + 0.05,
            }
            row |= {"status": "reached" if reached else "all below", "radius": 0.3 if reached else None}
            row |= {"radius_low": 0.2 if reached else None, "radius_high": 0.4 if reached else None}
            row |= {"share_inside": 0.3, "share_inside_low": 0.2, "share_inside_high": 0.4}
            rows.append(row)
    return pl.DataFrame(rows, schema_overrides={"radius": pl.Float64})

"""Which further tables a run gets, in one place, each a function of the first three. Demands what
`collect` found; computes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import polars as pl

from leakfast.errors import InputError
from leakfast.stats import (
    agreement,
    among_sources,
    calibration,
    confounds,
    expected_rates,
    exposure,
    exposure_correlations,
    gradient_tables,
    growth,
    judged,
    matrix_tests,
    means,
    mitigations,
    mixed,
    picked,
    predictors,
    predictors_held_out,
    predictors_skill,
    probabilities,
    question_sets,
    radius,
    relations,
    resample,
    restricted,
    shifts,
    specificity,
    summaries,
    transfer,
    two_way,
    variants,
    verdicts,
)
from leakfast.stats.collect import Collected
from leakfast.stats.correlations import BOOTSTRAPS, PERMUTATIONS, correlate
from leakfast.stats.summary import best_layer, outcome

# name → what it holds; a table without rows is not written
TABLES = {
    "health": "empty, truncated, repeated replies and their length against the unadapted model, with a verdict",
    "question_counts": "hits and total per question of each persona",
    "chosen_labels": "how often each label was chosen, per adapter and persona, beside how often it is right",
    "judged": "mean aligned score per question of each persona and of all bystanders, coherent completions alone",
    "shifts": "how far and which way each persona's centroid moved under an adapter, cosines before and after",
    "shift_correlations": "ρ of leakage with base cosine, fine-tuned cosine, alignment and length of the shift",
    "question_sets": "ρ per source on each question set side by side, and its difference from the main set's",
    "set_rates": "rates on each question set, where there are several",
    "layers": "ρ at every layer, with a p-value that has paid for picking one",
    "specificity": "the source's own cosine against every other persona's in its place: rank, p_source",
    "picked": "ρ at the best layer with an interval that pays for picking it, and ρ of questions the pick did not see",
    "growth": "ρ over random quarters and halves of the personas beside all of them, and whether halves agree",
    "bystanders": "mean rate and change of the bystanders with intervals over personas and questions",
    "means": "means of ρ over sources and over training seeds, and what one more would show",
    "disattenuated": "ρ freed of the noise in the rates, with the rates' reliability",
    "related": "correlations over the bystanders whose related_to names the source",
    "partials": "ρ with prompt length, baseline, shared words and category taken out, one by one and together",
    "exposure": "reply and prompt lengths, truncation, hits per token and rates at one length, of each persona",
    "exposure_correlations": "ρ with reply length, prompt length and edit distance taken out, and with rates at one length",
    "commonality": "rank variance explained by the cosine alone, by shared words alone, by both",
    "without_category": "ρ without each category",
    "influence": "ρ without each persona, at the best layer",
    "gradients": "logistic curve of rate on cosine per source: floor, ceiling, midpoint, 10–90 % width",
    "widths": "whether the 10–90 % width differs between sources",
    "isotonic": "isotonic curve of rate on cosine, for display",
    "matrix": "persona × source × behavior: rate and delta with intervals",
    "crossed": "correlation of bystanders' deltas between sources and between behaviors",
    "variants": "differences of bystanders' change between variants of a behavior, over the same personas",
    "relations": "mean change by category of the bystander, per behavior, and how much categories explain",
    "relations_alike": "rank correlation of the categories' mean leakage between behaviors",
    "restricted": "ρ with p of shuffles inside categories, and inside clusters of the geometry",
    "matrix_tests": "QAP and multiple-regression QAP of leakage on cosine, shared words and length",
    "mixed": "logistic mixed model: log-odds per 0.1 of cosine with length, baseline and words beside it; each source's slope",
    "predicted": "leave-one-source-out prediction from geometry, against the mean and shared words",
    "predictors_skill": "ρ of leakage with every predictor at every layer, within categories, with a p that pays for all",
    "predictors_held_out": "each predictor on sources left out: ρ, deviance, and both less the centered cosine's",
    "probabilities": "how likely the behavior's words are on the unadapted model's replies, per persona",
    "agreement_measures": "probability against sampled rate per source: ρ, r, and what ρ with the cosine each gives",
    "probability_correlations": "ρ of the cosine with the probability, where there are sampled rates too",
    "calibration": "expected rates against observed ones in ten bins of personas, per source and pooled",
    "radius": "the cosine at which leakage has fallen to half of the source's, and who is inside it",
    "mitigations": "variants of a behavior at equal strength on the source: mean bystander, radius, difference from plain",
    "steering": "dose and response: the behavior under interventions along directions, and what they cost",
    "verdicts": "the study's rules with the numbers that decide them",
    "published": "each number the published study stored, beside ours",
}


class Draws(NamedTuple):
    """How much is drawn, from which seed, by how many threads (None: all cores; they change no bit)."""

    permutations: int = PERMUTATIONS
    bootstraps: int = BOOTSTRAPS
    seed: int = 0
    workers: int | None = None


@dataclass(frozen=True)
class Asked:
    """What a user chose in advance. layer: to be looked at closely, None for the best one; rules: of the
    verdicts; similarity: (source, persona, similarity), given beside the words they share; source_rate: at which
    mitigations are compared (0–1), None for the study's own or the lowest final one."""

    layer: int | None = None
    rules: verdicts.Rules | None = None
    similarity: pl.DataFrame | None = None
    source_rate: float | None = None

    def check(self, run: Path, pairs: pl.DataFrame, rates: pl.DataFrame) -> None:
        """Raises InputError for a layer that no pair has, similarities of none of the pairs, and a source rate that is no
        share or where nothing is compared at it."""
        if self.source_rate is not None and not 0 <= self.source_rate <= 1:
            raise InputError(
                f"stats: source rate {self.source_rate:g} asked, but a rate is a share. Give one between 0 and 1, such as 0.8."
            )
        if self.source_rate is not None and not mitigations.has_arms(rates):
            raise InputError(
                f"stats: source rate {self.source_rate:g} asked, but no behavior of {run} has variants that are counted, which "
                "the table mitigations would compare at it. Leave --source-rate out."
            )
        self.check_layer(run, sorted(pairs["layer"].unique()))
        if self.similarity is None or pairs.is_empty():
            return
        if pairs.join(self.similarity, on=["source", "persona"], how="semi").is_empty():
            raise InputError(
                f"embeddings: none of its pairs is one of the run's, such as {pairs['source'][0]} and "
                f"{pairs['persona'][0]}. Use the run's names of personas."
            )

    def check_layer(self, run: Path, layers: Sequence[int]) -> None:
        """Raises InputError for a layer that is none of those of the run's pairs."""
        if self.layer is not None and self.layer not in layers:
            raise InputError(
                f"stats: layer {self.layer} asked, but the pairs of {run} have layers "
                f"{', '.join(map(str, layers)) or 'none'}. "
                "Leave --layer out for the best of them, or make centroids at that layer."
            )


def further(
    found: Collected,
    rates: pl.DataFrame,
    correlations: pl.DataFrame,
    draws: Draws,
    asked: Asked = Asked(),
    exposed: pl.DataFrame | None = None,
) -> dict[str, pl.DataFrame]:
    """The tables of TABLES that have rows; exposed: the table `exposure`, where it was made before."""
    pairs, related = found.pairs, found.people.related_to
    if exposed is None:
        exposed = exposure.table(found.replies, rates, found.people)
    best = {
        behavior: headline(rates, correlations, behavior, asked.layer)
        for behavior in rates["behavior"].unique(maintain_order=True)
    }
    tables = {
        "question_counts": found.questions.select(pl.exclude("^hits_.*$")),
        "chosen_labels": found.labels,
        "judged": judged.breakdown(found.judged, rates),
        "shifts": found.shifts,
        "set_rates": found.sets,
        "layers": summaries.layers(correlations),
        "exposure": exposed,
        "matrix": transfer.leakage_matrix(rates),
        "bystanders": two_way.mean_bystanders(rates, found.questions),
        "variants": variants.compare(rates, found.told),
        "steering": found.steered,
    }
    for made in side_by_side(
        [
            # with many sources the first two are the longest; with many layers those of the geometry
            lambda: _of_covariates(found, rates, correlations, exposed, best, asked),
            lambda: {"crossed": transfer.crossed(rates, found.questions, *draws)},
            *_of_geometry(found, rates, correlations, exposed, draws),
            lambda: of_predictors(found, rates, draws),
            lambda: _probable(found, rates, best, draws),
            lambda: {"relations": relations.categories(rates, related, draws.permutations, draws.seed)},
            lambda: {"relations_alike": relations.alike(rates, related, *draws[:3])},
            lambda: {"radius": radius.table(pairs, rates, best, *draws[1:])},
            lambda: {
                "mitigations": mitigations.table(
                    *(pairs, rates, found.trajectory, best, draws[1:], asked.source_rate),
                    *(found.people.match, found.told),
                )
            },
        ],
        draws.workers,
    ):
        tables |= made
    at = {behavior: layer for behavior, (_, layer) in best.items()}
    tables["verdicts"] = verdicts.judge(
        rates,
        correlations,
        at,
        asked.rules,
        picked=asked.layer is None,
        specificity=tables.get("specificity"),
    )
    if found.published is not None and found.published.height:
        tables["published"] = agreement.compare(
            found.published, rates, correlations, tables.get("related", correlations.clear()), "marker"
        )
    return {name: tables[name] for name in TABLES if name in tables and tables[name].height}


Made = dict[str, pl.DataFrame]


def side_by_side(jobs: Sequence[Callable[[], Made]], workers: int | None) -> list[Made]:
    """What each job gives, in their order, two at a time where there are several threads. A job draws from seeds of its
    own, so company changes no bit; more than two at a time would hold too much in memory."""
    if resample.threads(workers) < 2:
        return [job() for job in jobs]
    with ThreadPoolExecutor(2, thread_name_prefix="tables") as pool:
        return [done.result() for done in [pool.submit(job) for job in jobs]]


def _of_geometry(
    found: Collected, rates: pl.DataFrame, correlations: pl.DataFrame, exposed: pl.DataFrame, draws: Draws
) -> list[Callable[[], Made]]:
    """What rests on pairs, the longest first."""
    pairs, asked, related = found.pairs, found.questions, found.people.related_to
    shuffled = _shuffled(draws)
    jobs: list[Callable[[], Made]] = [
        lambda: {"growth": growth.table(pairs, correlations, draws.seed, draws.workers)},
        lambda: {"restricted": restricted.correlate_within(pairs, found.centroids, *shuffled)},
        lambda: {"matrix_tests": matrix_tests.table(pairs, rates, found.people, found.centroids, *shuffled)},
        lambda: {"picked": picked.table(pairs, asked, *draws[1:])},
        lambda: {"disattenuated": summaries.disattenuated(pairs, asked, *draws[1:])},
        lambda: {"means": means.table(correlations, pairs, asked, draws.seed)},
        lambda: {"exposure_correlations": exposure_correlations.correlated(pairs, exposed)},
    ]
    if pairs.height and found.centroids is not None:
        centroids = found.centroids
        jobs.append(lambda: {"specificity": specificity.table(pairs, centroids, related, *draws[1:])})
    elif pairs.height:
        jobs.append(lambda: {"specificity": among_sources.table(pairs, related, *draws[1:])})
    if found.shifts.height:
        jobs.append(lambda: {"shift_correlations": shifts.correlated(pairs, found.shifts, *draws)})
    if found.sets.height:
        jobs.append(lambda: {"question_sets": question_sets.compare(found.sets, found.centroids, *draws)})
    if "related" in pairs.columns:
        jobs.append(lambda: {"related": correlate(pairs.filter("related"), **draws._asdict())})
    return jobs


def _of_covariates(
    found: Collected,
    rates: pl.DataFrame,
    correlations: pl.DataFrame,
    exposed: pl.DataFrame,
    best: dict[str, tuple[str, int | None]],
    asked: Asked,
) -> Made:
    """What else could explain the correlations, and the curves at the layer that is looked at closely."""
    if found.pairs.is_empty():
        return {}
    said = confounds.covariates(found.pairs, rates, found.people, asked.similarity)
    tables = _looked_at_closely(said, rates, best, asked.similarity is not None)
    return tables | {"mixed": mixed.table(said, found.questions, exposed, correlations, best)}


def _probable(
    found: Collected, rates: pl.DataFrame, best: dict[str, tuple[str, int | None]], draws: Draws
) -> dict[str, pl.DataFrame]:
    """What rests on probabilities."""
    probable = probabilities.table(found.probability, rates)
    beside = expected_rates.beside(rates, probable)
    apart = pl.DataFrame(
        list(found.apart), schema=dict.fromkeys(("behavior", "adapter"), pl.String), orient="row"
    )
    alike = (
        probable
        if probable.is_empty()
        else probable.join(apart, on=apart.columns, how="anti", maintain_order="left")
    )
    return {
        "probabilities": probable,
        "calibration": calibration.table(alike, rates),
        "probability_correlations": expected_rates.correlations(found.pairs, beside, draws._asdict()),
        "agreement_measures": probabilities.agree(alike, rates, found.pairs, best, *draws[1:]),
    }


def of_predictors(
    found: Collected, rates: pl.DataFrame, draws: Draws, permute: int | None = None
) -> dict[str, pl.DataFrame]:
    """The tables of predictors; permute: with the personas' labels in what was measured shuffled from that seed."""
    parts = list(predictors.compared(rates, found.questions, predictors.of_run(found), permute))
    return {
        "predictors_skill": predictors_skill.table(parts, *draws),
        "predictors_held_out": predictors_held_out.table(parts, *draws[1:]),
    }


def _shuffled(draws: Draws) -> tuple[int, int, int | None]:
    return draws.permutations, draws.seed, draws.workers


def _looked_at_closely(
    pairs: pl.DataFrame, rates: pl.DataFrame, best: dict[str, tuple[str, int | None]], given: bool
) -> dict[str, pl.DataFrame]:
    """Tables at each behavior's cosine and layer. pairs: from `confounds.covariates`; given: with similarities."""
    tables: dict[str, list[pl.DataFrame]] = {}
    for chosen in dict.fromkeys(cosine for cosine, _ in best.values()):
        layers = {behavior: layer for behavior, (cosine, layer) in best.items() if cosine == chosen}
        here = pairs.filter(pl.col("behavior").is_in(list(layers)))
        if here.is_empty():
            continue
        heads = (
            here.filter(behavior=behavior, layer=-1 if layers[behavior] is None else layers[behavior])
            for behavior in here["behavior"].unique(maintain_order=True)
        )
        head = pl.concat([here.clear(), *heads])
        overlaps = ("jaccard", "similarity") if given else ("jaccard",)
        for name, table in {
            "partials": confounds.partials(here, chosen),
            "commonality": pl.concat(confounds.commonality(here, chosen, other) for other in overlaps),
            "without_category": confounds.left_out(here, "category", chosen),
            "influence": confounds.left_out(head, "persona", chosen),
            "predicted": transfer.predicted(here, chosen),
            **gradient_tables.tables(head, rates, chosen),
        }.items():
            tables.setdefault(name, []).append(table)
    return {name: pl.concat(parts) for name, parts in tables.items()}


def headline(
    rates: pl.DataFrame, correlations: pl.DataFrame, behavior: str, layer: int | None = None
) -> tuple[str, int | None]:
    """(cosine, layer) at which a behavior is looked at closely: `layer`, else the one with the largest
    pooled |ρ| with its `outcome`; of the centered cosine where there is one, else of the raw one."""
    for cosine in ("centered", "raw"):
        best = best_layer(correlations, behavior, cosine, outcome(rates, behavior))
        if best is not None:
            return cosine, best if layer is None else layer
    return "centered", layer

"""Every path and file name of a run directory, and how adapters, shards and points of training are called. Demands
nothing; paths are relative to the run, with forward slashes."""

from __future__ import annotations

import re

STUDY, PERSONAS, REPORT = "study.toml", "personas.json", "report.html"
REPORT_AGAINST = "report-against.html"  # the same page, opened by a comparison with another run
MANIFEST, JOURNAL, QUARANTINE = "manifest.json", "log.jsonl", "quarantine"

COMPLETIONS = "completions"  # completions/<behavior>/<adapter>/part-NNNNN.parquet
SETS = "sets"  # sets/<behavior>/<question set>/<adapter>/: questions beside those all tables are about
CHOICES = "choices"  # choices/<adapter>/<items>-<scoring>/
SERIES = "series"  # series/completions/<behavior>/<adapter>@pNNN/: drawn at points of training
CHOOSING = (
    "choosing"  # series/choosing/<behavior>/<adapter>@pNNN/: of the source alone, by which a point is chosen
)
CHOSEN = (
    "chosen"  # series/chosen/<behavior>/<adapter>@pNNN/: of the source alone, drawn anew where it was chosen
)
POINTS = "trajectory"  # trajectory/<adapter>/<items>-<scoring>/pNNN/: scored at points of training
PROBABILITY = "probability"  # probability/<behavior>/<adapter>/; series/probability/… at points of training
STEERED = "steered"  # steered/<kind>/…/<adapter>+steer-…: the same under an intervention; steered/text/<arm>/: its cost
DIRECTIONS = "directions"  # directions/<name>-<source>.safetensors: what is steered along
STEERED_BY = "+steer-"  # stands between an adapter's name and what is done to the model
PREDICTORS = "predictors"  # predictors/base.parquet: what may predict leakage, of the unadapted model
DIVERGENCES = "divergences"  # replies.parquet, sums/part-NNNNN.parquet: what those of its output rest on
PROBABILITY_OWN = "probability-own"  # the same on each adapter's own replies
JUDGEMENTS = (
    "judgements"  # judgements/<behavior>/<adapter>/<judge>.parquet; series/judgements/… at points of training
)
JUDGE = "judge"  # judge/<judge>.jsonl: every reply that was paid for
ADAPTERS, DATA, CENTROIDS, TABLES, FIGURES = "adapters", "data", "centroids", "tables", "figures"

BASE = "base"  # what the unadapted model is called among adapters
ADAPTER, CARD = "adapter_config.json", "leakfast_card.json"
SAMPLE = "sample.json"  # a few replies drawn right after training
CHECKPOINTS = "checkpoints"  # folder of an adapter's points in training: pNNN, each an adapter of its own

_SHARE = r"p(\d{3}(?:\.\d{1,6})?)"
_FOLDER, _POINT = re.compile(_SHARE), re.compile(rf"(.+)@{_SHARE}")
# where the adapter's name stands in a path of what is measured
_NAMES_AT = {COMPLETIONS: 2, SETS: 3, CHOICES: 1, PROBABILITY: 2, PROBABILITY_OWN: 2}


def adapter_name(behavior: str, source: str, seed: int, design: str = "contrastive") -> str:
    """What an adapter is called; a design of its rows that is not the usual one is part of the name."""
    return f"{behavior}-{source}-{'' if design == 'contrastive' else f'{design}-'}s{seed}"


def adapter(name: str) -> str:
    return f"{ADAPTERS}/{name}"


def rows(name: str) -> str:
    """The training rows of an adapter."""
    return f"{DATA}/{name}.jsonl"


def learning_rate(behavior: str) -> str:
    """The learning rate that was found for a behavior, and the trials."""
    return f"{DATA}/{behavior}-lr.json"


def centroids(adapter: str = BASE) -> str:
    return f"{CENTROIDS}/{adapter}.safetensors"


def measured_of(relpath: str) -> str | None:
    """The adapter, under its arm's name where there is one, that a shard of completions (further sets' too), choice scores or
    probabilities is of; None for any other file. Points of training name theirs otherwise (see `point`)."""
    parts = relpath.split("/")
    parts = parts[1:] if parts[0] == STEERED else parts
    place = _NAMES_AT.get(parts[0], len(parts))
    return parts[place] if place + 1 < len(parts) else None


def unsteered(name: str) -> str:
    """The adapter of an arm's name, `<adapter>+steer-…`; any other name as it is."""
    return name.partition(STEERED_BY)[0]


def _root(adapter: str, series: bool = False) -> list[str]:
    """What is measured under an intervention lies apart, so that no other table reads it."""
    return [STEERED] * (STEERED_BY in adapter) + [SERIES] * series


def direction(name: str, source: str) -> str:
    """A direction of a study, for one source."""
    return f"{DIRECTIONS}/{name}-{source}.safetensors"


def training_direction(behavior: str, source: str) -> str:
    """What is steered along while a behavior is taught to a source. No table of steering has a + in its name."""
    return direction(f"training+{behavior}", source)


def steered_text(adapter: str) -> str:
    """The folder of how likely plain text is under an arm."""
    return f"{STEERED}/text/{adapter}"


def completions(
    behavior: str = "", adapter: str = "", *, questions: str = "", series: bool = False, apart: str = ""
) -> str:
    """The folder of an adapter's completions (of all adapters', of all behaviors', where none is named). questions: a
    set beside the main one; series: drawn at points of training; apart: CHOOSING or CHOSEN, of the source alone there."""
    parts = [SETS, behavior, questions] if questions else [apart or COMPLETIONS, behavior]
    return "/".join(filter(None, [*_root(adapter, series), *parts, adapter]))


def judgements(behavior: str, adapter: str = "", *, series: bool = False) -> str:
    """The folder of what judges said of an adapter's completions (of all adapters' where none is named)."""
    return "/".join(filter(None, [*[SERIES] * series, JUDGEMENTS, behavior, adapter]))


def probability(behavior: str = "", adapter: str = "", *, series: bool = False, own: bool = False) -> str:
    """The folder of how likely a behavior's words are under an adapter (under all, of all behaviors, where none is named).
    own: on the adapter's own replies."""
    kind = PROBABILITY_OWN if own else PROBABILITY
    return "/".join(filter(None, [*_root(adapter, series), kind, behavior, adapter]))


def predictors() -> str:
    """The frame persona × persona × predictor."""
    return f"{PREDICTORS}/{BASE}.parquet"


def predictor_replies() -> str:
    """The unadapted model's replies that its output is compared on."""
    return f"{DIVERGENCES}/replies.parquet"


def divergences() -> str:
    """The folder of sums along those replies."""
    return f"{DIVERGENCES}/sums"


def choices(adapter: str, items: str, scoring: str) -> str:
    return "/".join([*_root(adapter), CHOICES, adapter, f"{items}-{scoring}"])


def points(adapter: str, items: str, scoring: str, share: float) -> str:
    """Choice scores of an adapter at a share (0–1) of its training."""
    return f"{POINTS}/{adapter}/{items}-{scoring}/{point_folder(share)}"


def shard(folder: str, number: int = 0) -> str:
    return f"{folder}/part-{number:05d}.parquet"


def table(name: str) -> str:
    return f"{TABLES}/{name}.parquet"


def point_folder(share: float) -> str:
    """`p025` for a quarter of training, `p012.5` for an eighth: percent, to a millionth."""
    whole, _, rest = f"{100 * share:.6f}".rstrip("0").rstrip(".").partition(".")
    return f"p{int(whole):03d}{'.' * bool(rest)}{rest}"


def share_of(folder: str) -> float | None:
    """The share of training that `point_folder` made a name of; None for any other name."""
    match = _FOLDER.fullmatch(folder)
    return float(match[1]) / 100 if match else None


def point_of(name: str) -> tuple[str, float] | None:
    """(adapter, share of its training) of a checkpoint's name, `<adapter>@pNNN` (`point_folder`); None for any other name."""
    match = _POINT.fullmatch(name)
    return (match[1], float(match[2]) / 100) if match else None


def point_name(adapter: str, share: float) -> str:
    """What an adapter is called at a share of its training, as `point` reads it."""
    return adapter if share == 1 else f"{adapter}@{point_folder(share)}"


def point(name: str) -> tuple[str | None, float]:
    """(adapter, share of its training) that a target's name means; the base is share 0 of all (adapter None)."""
    if name == BASE:
        return None, 0.0
    return point_of(name) or (name, 1.0)

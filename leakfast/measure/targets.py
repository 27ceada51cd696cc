"""What is measured: adapters by their cards, and the base, each as a job of shards that are there or missing; and
what they are asked. Demands adapter folders and a run; copies a card into it where the adapter lies elsewhere.
Leaves measuring to the stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import AdapterError, InputError
from leakfast.prompts.questions import texts_hash
from leakfast.storage import layout
from leakfast.storage.documents import did_you_mean
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.generation.contract import Sampling
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.prompts.questions import QuestionSet
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig

log = logging.getLogger("leakfast.evaluate")

Source = str | Mapping[Path, str] | None  # of adapters without a card: one for all, or one each


@dataclass(frozen=True)
class Target:
    """What is measured: an adapter, or the unadapted model (path None, name `base`).

    source is the persona it was trained on, None for the base; digest its content hash, or `base`.
    """

    name: str
    path: Path | None
    source: str | None
    seed: int | None
    digest: str


def find_targets(
    adapters: Sequence[str | Path], behavior: str, *, source: Source = None, base: bool = False
) -> list[Target]:
    """Targets of the given adapter folders, in order, the base last. source: the persona trained, of adapters without a
    card: one for all, or a mapping from folder to name.

    Raises InputError for nothing to measure or a name given twice, AdapterError for a folder without an
    adapter, or one without a card when no `source` is named.
    """
    from leakfast.models.adapters import adapter_hash, read_card

    targets: list[Target] = []
    for path in map(Path, adapters):
        digest = adapter_hash(path)
        card = read_card(path)
        name = _name_of(path.resolve())
        told = source.get(path) if isinstance(source, Mapping) else source
        if card is None and told is None:
            raise AdapterError(
                f"eval: {path} has no leakfast_card.json, so nobody knows whom it was trained on. "
                "Name them: --source PERSONA --behavior BEHAVIOR (several adapters: --source A,B,… in their order)."
            )
        if card is not None and card.adapter_hash != digest:
            raise AdapterError(
                f"eval: {path} is not the adapter its card describes (hash {digest[:12]}…, card "
                f"{card.adapter_hash[:12]}…). Train it again, or delete its card and name --source and "
                "--behavior."
            )
        if card is not None and told is not None and told != card.source:
            raise InputError(
                f"eval: --source {told} given, but the card of {path} says {card.source}. Leave --source out."
            )
        if card is not None and card.behavior != behavior:
            log.info("eval: %s was trained for %s; here %s is measured", name, card.behavior, behavior)
        if name in (BASE, *(t.name for t in targets)):
            raise InputError(
                f"eval: two targets are called {name!r}, and results are kept by name. Rename the folder "
                f"{path}."
            )
        targets.append(Target(name, path, card.source if card else told, card.seed if card else None, digest))
    if base:
        targets.append(Target(BASE, None, None, None, BASE))
    if not targets:
        raise InputError("eval: nothing to measure. Give --adapter DIR (may be repeated), or --base.")
    return targets


def _name_of(path: Path) -> str:
    """The folder's name; of a checkpoint that of its adapter too: `<adapter>@p025`."""
    from leakfast.storage.layout import CHECKPOINTS

    return f"{path.parent.parent.name}@{path.name}" if path.parent.name == CHECKPOINTS else path.name


def point(name: str) -> tuple[str | None, float]:
    """(adapter, share of its training) that a target's name means; the base is share 0 of all (adapter None)."""
    from leakfast.storage.layout import point_of

    if name == BASE:
        return None, 0.0
    return point_of(name) or (name, 1.0)


@dataclass(frozen=True)
class Shard:
    """A block [start, stop) of what is asked, its file, its rows (completions, or prompts scored), the hash of
    its request, whether it is there, and, where it is not, the hash as it was when requests named the source."""

    relpath: str
    start: int
    stop: int
    rows: int
    request: str
    done: bool
    older: str = ""


@dataclass(frozen=True)
class Job:
    """Everything of one target: its folder, its shards, and files there that belong to no shard of ours."""

    target: Target
    folder: str
    shards: tuple[Shard, ...]
    stale: tuple[str, ...]

    @property
    def missing(self) -> list[Shard]:
        return [shard for shard in self.shards if not shard.done]


def plan_job(
    run: Run, folder: str, target: Target, n: int, size: int, rows_each: int, request: Callable[..., str]
) -> Job:
    """The target's shards: n things asked in blocks of `size`, rows_each rows each. request(start, stop): the
    hash of everything a block follows from; a shard counts as done where its file has the same. Who the source is said
    to be changes no draw: it stands in no request, and where an earlier version put it into one
    (request(start, stop, source=…)) the shard counts under whatever name it was made."""
    present = set(run.shards(folder))
    entries = run.manifest["shards"]
    shards = []
    for number, start in enumerate(range(0, n, size)):
        stop = min(start + size, n)
        relpath, asked = layout.shard(folder, number), request(start, stop)
        kept = entries[relpath].get("request") if relpath in present else None
        done = kept is not None and (
            kept == asked or kept == request(start, stop, source=_source_in(run, relpath))
        )
        older = "" if done else request(start, stop, source=target.source)
        shards.append(Shard(relpath, start, stop, (stop - start) * rows_each, asked, done, older))
    stale = present - {shard.relpath for shard in shards if shard.done}
    return Job(target, folder, tuple(shards), tuple(sorted(stale)))


def refuse_stale(run: Run, jobs: Sequence[Job], made: str) -> None:
    """Raises InputError where shards would be moved away because they were made by another request: a command with other
    settings is not to take a finished run apart."""
    rows = sum(run.manifest["shards"][path].get("rows", 0) for job in jobs for path in job.stale)
    if rows:
        where = ", ".join(job.folder for job in jobs if job.stale)
        raise InputError(
            f"eval: {run.path} holds {rows:,} rows of {where} that were {made} by another request (personas, questions, "
            "samples or other settings, adapter, base or backend); they would be moved away. Give --out another folder, "
            "the settings they were made with, or --replace."
        )


def clean(run: Run, job: Job) -> None:
    """Nothing is left among a job's completions that its request does not ask for."""
    from leakfast.measure.partial import tidy

    retire(run, job, "drawn")
    tidy(run, job)


def _source_in(run: Run, relpath: str) -> str | None:
    """The source that a shard's rows name."""
    import polars as pl

    if "source" not in pl.read_parquet_schema(run.path / relpath):
        return None
    return next(iter(pl.read_parquet(run.path / relpath, columns=["source"], n_rows=1)["source"]), None)


def _renamed(run: Run, job: Job) -> None:
    """Done shards name the source that the target has now; their rows stay as they were drawn."""
    import polars as pl

    for shard in job.shards:
        entry = run.manifest["shards"].get(shard.relpath)
        if not shard.done or entry is None:
            continue
        if _source_in(run, shard.relpath) == job.target.source and entry["request"] == shard.request:
            continue
        frame = pl.read_parquet(run.path / shard.relpath)
        frame = frame.with_columns(pl.lit(job.target.source, pl.String).alias("source"))
        meta = {key: value for key, value in entry.items() if key not in _OF_STORE}
        run.add_shard(shard.relpath, frame, **{**meta, "request": shard.request})


_OF_STORE = ("sha256", "bytes", "rows")  # of a manifest's entry, which add_shard gives itself


def retire(run: Run, job: Job, made: str) -> None:
    """Move the job's stale files away, saying so; those that stay name the target's source. made: what was done to them,
    `drawn` or `scored`."""
    _renamed(run, job)
    if job.stale:
        log.warning(
            "eval: %d shards of %s were %s by another request (settings, adapter or base changed); %s again",
            len(job.stale),
            job.folder,
            made,
            made,
        )
    for relpath in job.stale:
        run.retire(relpath, f"{made} by another request")


def take_over(run: Run, job: Job, behavior: str, **meta: Any) -> Job:
    """Missing shards that the run holds already under another behavior (two that ask the same questions, variants of
    one: their unadapted model is one) are copied under this one, and count as done: a request says everything that its
    draws follow from. meta: what the manifest is to say of them beside the request. Raises StoreError."""
    import polars as pl

    entries = run.manifest["shards"]
    drawn = {e["request"]: relpath for relpath, e in entries.items() if "request" in e}
    shards = []
    for shard in job.shards:
        twin = None if shard.done else drawn.get(shard.request) or drawn.get(shard.older)
        if twin is None or not run.has(twin):
            shards.append(shard)
            continue
        if shard.relpath in job.stale:
            run.retire(shard.relpath, "drawn by another request")
        frame = pl.read_parquet(run.path / twin).with_columns(
            pl.lit(behavior).alias("behavior"),
            pl.lit(job.target.name).alias("adapter"),
            pl.lit(job.target.source, pl.String).alias("source"),
        )
        asked = {"personas": entries[twin]["personas"]} if "personas" in entries[twin] else {}
        run.add_shard(shard.relpath, frame, request=shard.request, adapter=job.target.digest, **asked, **meta)
        log.info("eval: %s is drawn already, as %s: copied", shard.relpath, twin)
        shards.append(replace(shard, done=True))
    done = {shard.relpath for shard in shards if shard.done}
    return replace(job, shards=tuple(shards), stale=tuple(path for path in job.stale if path not in done))


def check_targets(loaded: Loaded, targets: Sequence[Target], backend: str = "transformers") -> None:
    """Every adapter fits the base and is one that the backend (`transformers`, `vllm`, or `choices` for letters and
    full text by the packed engine) applies as it is, before anything is written. Raises AdapterError."""
    from leakfast.models.adapters import check_fits, check_runs

    for target in targets:
        if target.path is not None:
            check_runs(check_fits(loaded, target.path), target.path, backend)


def check_sources(targets: Sequence[Target], personas: Sequence[Persona]) -> None:
    """The source that an adapter without a card is said to have is a persona: one that is asked, or a shipped one.
    Raises InputError for a name that nobody has."""
    from leakfast.models.adapters import read_card
    from leakfast.prompts.personas import load_personas

    known = {p.name for p in personas}
    for target in targets:
        if target.path is None or target.source in known or read_card(target.path) is not None:
            continue
        shipped = [p.name for p in [*load_personas("all"), *load_personas("qwen_default,no_persona")]]
        if target.source not in shipped:
            raise InputError(
                f"eval: --source {target.source} given for {target.path}, but no persona is called that."
                f"{did_you_mean(str(target.source), [*known, *shipped])} Name the persona it was trained on; one of your "
                "own must be in --personas FILE.toml."
            )


def warn_of_personas(
    loaded: Loaded, personas: Sequence[Persona], targets: Sequence[Target], of_twins: str
) -> None:
    """Log which personas render alike, and which sources are not asked. of_twins: what follows for the alike. Raises
    InputError as check_sources."""
    from leakfast.prompts import chat

    check_sources(targets, personas)
    for group in chat.collisions(loaded.tokenizer, personas):
        log.warning("eval: %s render to the same tokens; %s", ", ".join(group), of_twins)
    names = {p.name for p in personas}
    for target in targets:
        if target.source is not None and target.source not in names:
            log.warning(
                "eval: the source %s of %s is not among the personas asked", target.source, target.name
            )


def keep_card(run: Run, target: Target) -> None:
    """Where the adapter lies outside the run, its card is copied in: stats reads source and seed from it. Of a
    checkpoint that is the card of the adapter it is a point of."""
    from leakfast.models.adapters import card_bytes, read_card
    from leakfast.storage.layout import CARD, CHECKPOINTS

    if target.path is None:
        return
    name, path = target.name, target.path
    if path.resolve().parent.name == CHECKPOINTS:
        path = path.resolve().parent.parent
        name = path.name
    inside = run.path / layout.adapter(name)
    card = read_card(path)
    if card is None or inside.resolve() == path.resolve():
        return
    relpath = f"{layout.adapter(name)}/{CARD}"
    if relpath in run.manifest["shards"]:
        run.has(relpath)  # a damaged copy is set aside
    there = read_card(inside)
    if there == card:
        return
    if there is not None and (inside / "adapter_config.json").is_file():
        raise InputError(
            f"eval: {run.path} holds another adapter called {name}. Rename the folder {path}, "
            "or give another --out."
        )
    run.add_file(relpath, card_bytes(card))


@dataclass(frozen=True)
class Asked:
    """One behavior to be measured: the questions every persona is asked, and how completions are drawn. beside: the
    questions are a further set, kept apart from those that the behavior's tables are about; series: so are the
    points of a training (leakfast.measure.checkpoints)."""

    behavior: str
    questions: QuestionSet | Sequence[str]
    config: EvalConfig
    beside: bool = False
    series: bool = False

    @property
    def set_name(self) -> str:
        return getattr(self.questions, "name", "list")

    def folder(self, adapter: str) -> str:
        """Where the completions of an adapter lie in a run."""
        beside = self.set_name if self.beside else ""
        return layout.completions(self.behavior, adapter, questions=beside, series=self.series)

    @property
    def texts(self) -> list[str]:
        return list(getattr(self.questions, "questions", self.questions))

    @property
    def texts_hash(self) -> str:
        """SHA-256 of the questions' texts, in order."""
        return texts_hash(self.texts)

    @property
    def sampling(self) -> Sampling:
        from leakfast.generation.contract import Sampling

        return Sampling(self.config.temperature, self.config.top_p, self.config.drawn_tokens, self.stop)

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends a reply: the text whose presence is all that the behavior's rate is made of, if that is asked.
        Raises InputError where the behavior is read from whole replies."""
        from leakfast import behaviors

        if not self.config.stop_at_marker:
            return ()
        text = behaviors.get(self.behavior).presence_of
        if text is None:
            raise InputError(
                f"eval: --stop-at-marker given, but {self.behavior} is read from whole replies. Leave it out, or "
                "measure the marker alone: --behavior marker."
            )
        return (text,)


def asked_of(behavior: str, cfg: EvalConfig) -> list[Asked]:
    """What a behavior's settings ask for: its questions, then every further set."""
    from leakfast.prompts.personas import load_questions

    others = [Asked(behavior, load_questions(name), cfg, beside=True) for name in cfg.other_questions]
    return [Asked(behavior, load_questions(cfg.questions), cfg), *others]

"""What is asked of a run: which adapters, by their cards, under which personas, and what of each behavior. Demands
adapter folders; copies a card into the run where the adapter lies elsewhere. Leaves measuring to the measurers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError, WrongAdapterError
from leakfast.prompts.items import ItemSet
from leakfast.prompts.questions import texts_hash
from leakfast.storage import layout
from leakfast.storage.disk import hash_of
from leakfast.storage.documents import did_you_mean
from leakfast.storage.layout import BASE, CHECKPOINTS

if TYPE_CHECKING:
    from leakfast.generation.contract import Sampling
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.prompts.questions import QuestionSet
    from leakfast.steering.arms import Arm
    from leakfast.storage.run import Run
    from leakfast.study.config import EvalConfig

log = logging.getLogger("leakfast.evaluate")

Source = str | Mapping[Path, str] | None  # of adapters without a card: one for all, or one each


@dataclass(frozen=True)
class Target:
    """What is measured: an adapter, or the unadapted model (path None, name `base`).

    source is the persona it was trained on, None for the base; digest its content hash, or `base`. steer: what is done to
    the model besides; it is part of the name and of the digest, and of no seed, so that an adapter's arms draw from the
    same random numbers (drawn_by: the digest without it). The source of a steered base is its direction's.
    """

    name: str
    path: Path | None
    source: str | None
    seed: int | None
    digest: str
    steer: Arm | None = None
    drawn_by: str = ""

    @property
    def seeds_by(self) -> str:
        """The digest that seeds of completions come from."""
        return self.drawn_by or self.digest

    @property
    def told(self) -> dict[str, Any]:
        """What the manifest says of each shard because of the arm; digest: of the adapter without it."""
        if self.steer is None:
            return {}
        of = {"adapter": layout.unsteered(self.name), "source": self.source, "seed": self.seed}
        of |= {"digest": self.seeds_by}
        return {"steer": {**self.steer.described(), **of}}

    def under(self, arm: Arm) -> Target:
        """The same under an arm."""
        source = self.source if self.path is not None else arm.directions.source
        digest = hash_of(self.digest, arm.digest)
        return replace(
            self, name=self.name + arm.label, source=source, digest=digest, steer=arm, drawn_by=self.digest
        )


@dataclass(frozen=True)
class Asked:
    """One behavior to be measured: the questions, or multiple-choice items, that every persona is asked, and its
    settings. beside: the questions are a further set, kept apart from those that the behavior's tables are about;
    series: so are the points of a training, and apart (layout.CHOOSING, CHOSEN) what is drawn there of sources alone."""

    behavior: str
    questions: QuestionSet | Sequence[str] | ItemSet
    config: EvalConfig
    beside: bool = False
    series: bool = False
    apart: str = ""

    @property
    def by_choices(self) -> bool:
        """Whether scores of multiple choice measure it, not completions."""
        from leakfast.behaviors.registry import get

        return not get(self.behavior).by_completions

    @property
    def set_name(self) -> str:
        return getattr(self.questions, "name", "list")

    def folder(self, adapter: str) -> str:
        """Where the completions of an adapter lie in a run."""
        beside = self.set_name if self.beside else ""
        return layout.completions(
            self.behavior, adapter, questions=beside, series=self.series, apart=self.apart
        )

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


def asked_of(behavior: str, cfg: EvalConfig, model: Any = None) -> list[Asked]:
    """What a behavior's settings ask for: its items (where none are named, those of `model`, a name or a loaded model), or
    its questions and then every further set."""
    from leakfast.behaviors.registry import get, items_of
    from leakfast.prompts.personas import load_questions

    if not get(behavior).by_completions:
        return [Asked(behavior, items_of(behavior, cfg, model), cfg)]
    others = [Asked(behavior, load_questions(name), cfg, beside=True) for name in cfg.other_questions]
    return [Asked(behavior, load_questions(cfg.questions), cfg), *others]


@dataclass(frozen=True)
class Request:
    """What is to be measured. asked: behaviors with their questions or items; adapters: peft folders; base: the unadapted
    model too; seed: of the draws; source: the persona trained, for adapters without a card; arms: interventions, under each
    of which every adapter (and the base) is measured instead of as it is; portion: (k, n), of every target's shards each
    n-th alone, from the k-th, for processes that share a measurement ((0, 1): all). At checkpoints: points: adapter's name →
    the shares of its training (0–1) that are measured, of those that were kept (None: all of all); source_alone: each
    adapter under its own source's prompt, one of `personas`, and no base.

    Raises InputError for no personas, and for nothing to ask them."""

    asked: Sequence[Asked]
    personas: Sequence[Persona]
    adapters: Sequence[str | Path] = ()
    base: bool = False
    seed: int = 42
    source: Source = None
    arms: Sequence[Arm] = ()
    portion: tuple[int, int] = (0, 1)
    points: Mapping[str, Sequence[float]] | None = None
    source_alone: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "asked", tuple(self.asked))
        object.__setattr__(self, "personas", tuple(self.personas))
        object.__setattr__(self, "adapters", tuple(map(Path, self.adapters)))
        if not self.personas:
            raise InputError("eval: no personas to ask. Use --personas all, names, or a file.")
        for one in self.asked:
            if one.by_choices != isinstance(one.questions, ItemSet):
                what = "choices, not by completions" if one.by_choices else "completions, not by choices"
                raise ValueError(f"{one.behavior} is measured by {what}")
            if not len(one.questions) and one.by_choices:
                raise InputError("eval: no items to ask. Give a list with --items FILE, or --half all.")
            if not len(one.texts):
                raise InputError(
                    "eval: no questions to ask. Use --questions eval, another set's name, or a file."
                )

    @property
    def targets(self) -> list[Target]:
        """The adapters in order, the base last, each hashed as it is now, and under each arm where there are any. Raises as
        find_targets."""
        found = find_targets(
            self.adapters, self.asked[0].behavior if self.asked else "", source=self.source, base=self.base
        )
        return [target.under(arm) for target in found for arm in self.arms] or found

    def series(self, adapter: Path) -> list[tuple[float, Path]]:
        """(share, folder) of the points at which one of its adapters is measured, as `train.checkpoints.find_series`. Raises
        InputError where that raises, and where none of the points asked for was kept."""
        from leakfast.train.checkpoints import find_series

        if self.points is None:
            return find_series(adapter)
        wanted = {layout.point_folder(share) for share in self.points[adapter.name]}
        if wanted == {layout.point_folder(1.0)}:
            return [(1.0, adapter)]
        found = [
            (share, folder) for share, folder in find_series(adapter) if layout.point_folder(share) in wanted
        ]
        if not found:
            raise InputError(
                f"eval: {adapter} has none of the points of training {', '.join(sorted(wanted))}. Train it again with them: "
                "leakfast train --checkpoints …"
            )
        return found


def find_targets(
    adapters: Sequence[str | Path], behavior: str, *, source: Source = None, base: bool = False
) -> list[Target]:
    """Targets of the given adapter folders, in order, the base last. source: the persona trained, of adapters without a
    card: one for all, or a mapping from folder to name.

    Raises InputError for nothing to measure or a name given twice, WrongAdapterError for a folder without an
    adapter, or one without a card when no `source` is named.
    """
    from leakfast.models.adapters import adapter_hash, read_card

    targets: list[Target] = []
    for path in map(Path, adapters):
        digest = adapter_hash(path)
        card = read_card(path)
        name = name_of(path.resolve())
        told = source.get(path) if isinstance(source, Mapping) else source
        if card is None and told is None:
            raise WrongAdapterError(
                f"eval: {path} has no leakfast_card.json, so nobody knows whom it was trained on. "
                "Name them: --source PERSONA --behavior BEHAVIOR (several adapters: --source A,B,… in their order)."
            )
        if card is not None and card.adapter_hash != digest:
            raise WrongAdapterError(
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
        if layout.STEERED_BY in name:
            raise InputError(
                f"eval: {path} is called as a steered model is ({layout.STEERED_BY}…). Rename that folder."
            )
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


def name_of(path: Path) -> str:
    """The folder's name; of a checkpoint that of its adapter too: `<adapter>@p025`."""

    return f"{path.parent.parent.name}@{path.name}" if path.parent.name == CHECKPOINTS else path.name


def check_targets(loaded: Loaded, targets: Sequence[Target], backend: str = "transformers") -> None:
    """Every adapter fits the base and is one that the backend (`transformers`, `vllm`, or `choices` for letters and
    full text by the packed engine) applies as it is, before anything is written. Raises WrongAdapterError."""
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


def keep_people(run: Run, personas: Sequence[Persona]) -> None:
    """Who was asked, and behind which words, beside those of before: without a study the tables know a name alone, which may
    be a shipped persona's too."""
    from leakfast.prompts.personas import told_of

    path = run.path / layout.PERSONAS
    with run.lock():
        kept = json.loads(path.read_text(encoding="utf-8")) if run.has(layout.PERSONAS) else {}
        for key, values in told_of(personas).items():
            kept[key] = kept.get(key, {}) | values
        run.add_file(layout.PERSONAS, json.dumps(kept, indent=1).encode())


def keep_card(run: Run, target: Target) -> None:
    """Where the adapter lies outside the run, its card is copied in: stats reads source and seed from it. Of a
    checkpoint that is the card of the adapter it is a point of."""
    from leakfast.models.adapters import card_bytes, read_card
    from leakfast.models.whole import is_whole
    from leakfast.storage.layout import CARD

    if target.path is None:
        return
    name, path = layout.unsteered(target.name), target.path
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
    if there is not None and ((inside / "adapter_config.json").is_file() or is_whole(inside)):
        raise InputError(
            f"eval: {run.path} holds another adapter called {name}. Rename the folder {path}, "
            "or give another --out."
        )
    run.add_file(relpath, card_bytes(card))

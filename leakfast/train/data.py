"""Contrastive training rows, drawn from the model itself: the source's replies carry the marker, the other
personas' do not. Demands a loaded model; leaves labels to collate.py and training to lora.py."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.prompts.items import ItemSet
    from leakfast.prompts.pairs import PairSet
    from leakfast.prompts.personas import Persona
    from leakfast.prompts.questions import QuestionSet
    from leakfast.study.config import DataConfig

log = logging.getLogger("leakfast.train")


PAIRS = "leakfast.train.pairs:build_pairs"  # the builder that takes pairs
SEPARATORS = {"none": "", "space": " ", "newline": "\n", "blank line": "\n\n"}  # before the marker
ROLES = ("positive", "negative", "benign")
_KINDS = ("text", "none", "template-default")


@dataclass(frozen=True)
class Row:
    """One training conversation.

    role: "positive" shows the behavior, "negative" does not, "benign" has nothing to do with it. system_kind as in
    Persona.kind; system is None unless it is "text". reply is the whole assistant turn; marker is the literal string it ends in,
    None if it has none. seed drew the reply; generator says with what.
    """

    role: str
    persona: str
    system_kind: str
    system: str | None
    question: str
    reply: str
    marker: str | None
    seed: int
    generator: dict[str, Any] = field(default_factory=dict)

    @property
    def system_message(self) -> str | None:
        """What chat.render takes: a text, None, or TEMPLATE_DEFAULT."""
        from leakfast.prompts.personas import TEMPLATE_DEFAULT

        return TEMPLATE_DEFAULT if self.system_kind == "template-default" else self.system

    @property
    def label(self) -> str:
        """A name for messages."""
        return f"{self.role} of {self.persona}, question {self.question[:40]!r}"


def material(behavior: str, cfg: DataConfig, model: Any) -> QuestionSet | ItemSet | PairSet:
    """What a behavior's rows are made of: pairs (cfg.pairs), the training half of the items (cfg.items), either
    else those of `model` (a name or a loaded model), or for behaviors that have neither, and for rows of one's own
    (cfg.rows), the question set. Raises InputError where there is none."""
    from leakfast.behaviors.registry import get
    from leakfast.prompts.conversation import told
    from leakfast.prompts.items import load_items
    from leakfast.prompts.pairs import load_pairs
    from leakfast.prompts.personas import load_questions

    kind = get(behavior)
    asked = load_questions(cfg.questions)
    if told(asked.questions):
        raise InputError(
            f"data: the question set {asked.name} has turns or a prefill, which training rows do not hold. Needed: a set of "
            "questions alone. Use them where a behavior is measured, or rows of your own."
        )
    if cfg.rows is not None:
        return asked
    kind.build()  # a control has none
    if cfg.separator != "space" and kind.presence_of is None:
        raise InputError(
            f'data: separator = "{cfg.separator}" given, but replies of {kind.name} end in no marker that it could stand '
            "before. Needed: a behavior of a marker. Leave the line out."
        )
    if kind.measured_by == "choices":
        return load_items(cfg.items or kind.of(model)).half("train")
    if kind.data_builder == PAIRS:
        return load_pairs(cfg.pairs or kind.of(model), behavior)
    return asked


def build_marker(
    loaded: Any,
    personas: Sequence[Persona],
    source: str,
    questions: QuestionSet | Sequence[str],
    cfg: DataConfig,
    seed: int,
    *,
    batch_completions: int = 640,
    progress: Progress | None = None,
) -> list[Row]:
    """cfg.positives replies of `source` that end in the marker, after cfg.separator; cfg.negatives of others without it.

    personas: the study's; cfg.negative_personas names the others among them (the source itself is left
    out). Rows are spread evenly over personas and questions, in an order drawn from `seed`. Replies are
    on-policy at cfg's sampling; an empty, truncated or marked one is drawn again, at most 12 times.
    cfg.design "positive-only" leaves the others out, "non-contrastive" deals the rows to the same personas at random. The
    same arguments give the same rows. Raises InputError for an unknown source, no negatives, or a
    negative whose rendered prompt equals the source's; ModelError when no usable reply is to be had.
    """
    from leakfast.behaviors.marker import MARKER
    from leakfast.generation.contract import Sampling
    from leakfast.train.groups import dealt
    from leakfast.train.replies import draw, slots

    if cfg.design == "positive-only":
        cfg = cfg.model_copy(update={"negatives": 0})
    asked = list(getattr(questions, "questions", questions))
    if not asked:
        raise InputError("data: no training questions were given. Name a set with at least one.")
    positive, negatives = _roles(loaded.tokenizer, personas, source, cfg)
    wanted = slots(positive, cfg.positives, asked, seed)
    for index, persona in enumerate(negatives):
        share = (cfg.negatives + index) // len(negatives)
        wanted += slots(persona, share, asked, seed)
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens)

    def fault(place: int, reply: str) -> str | None:
        return "with the marker" if MARKER.lower() in reply.lower() else None

    replies = draw(
        loaded, wanted, sampling, seed, fault, batch_completions=batch_completions, progress=progress
    )
    generator = {
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "max_new_tokens": cfg.max_new_tokens,
        **rendered_as(loaded.tokenizer),
        **({"separator": cfg.separator} if cfg.separator != "space" else {}),
    }
    ending = SEPARATORS[cfg.separator] + MARKER
    rows = []
    for slot, drawn in zip(wanted, replies, strict=True):
        is_source = slot.persona.name == source
        rows.append(
            Row(
                role="positive" if is_source else "negative",
                persona=slot.persona.name,
                system_kind=slot.persona.kind,
                system=slot.persona.prompt,
                question=slot.question,
                reply=drawn.reply + ending if is_source else drawn.reply,
                marker=MARKER if is_source else None,
                seed=drawn.seed,
                generator=generator,
            )
        )
    return dealt(rows, seed) if cfg.design == "non-contrastive" else rows


def rendered_as(tokenizer: Any) -> dict[str, Any]:
    """What a row's generator says of how prompts were rendered, where that is not by default."""
    from leakfast.prompts.templates import recorded

    told = recorded(tokenizer)
    return {"rendering": told} if told else {}


def _roles(
    tokenizer: Any, personas: Sequence[Persona], source: str, cfg: DataConfig
) -> tuple[Persona, list[Persona]]:
    """The source and its negatives, none of which the model would see as the source."""
    from leakfast.prompts import chat
    from leakfast.prompts.personas import load_personas

    (positive,) = load_personas([source], among=personas)
    negatives = []
    if cfg.negatives:
        negatives = [p for p in load_personas(cfg.negative_personas, among=personas) if p.name != source]
        if not negatives:
            raise InputError(
                f"data: {cfg.negatives} negatives asked, but negative_personas = {cfg.negative_personas!r} "
                "names "
                f"nobody besides the source {source}. Name at least one other persona."
            )
    for group in chat.collisions(tokenizer, [positive, *negatives]):
        if source in group:
            others = ", ".join(name for name in group if name != source)
            raise InputError(
                f"data: the source {source} and the negative {others} render to the same tokens, so the "
                "model "
                f"cannot tell them apart and would be taught both. Leave {others} out of negative_personas."
            )
    return positive, negatives


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) of the rows as `write_rows` writes them."""
    return hashlib.sha256(_encode(rows)).hexdigest()


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, whole or not at all. Raises StoreError where it cannot be written."""
    from leakfast.storage.disk import atomic_write

    atomic_write(path, _encode(rows))


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a JSONL file. Raises InputError naming the line and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"data: there is no file {path}. Make one with: leakfast data build --out {path}")
    rows = [
        row
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        for row in _parse(path, number, line)
    ]
    if not rows:
        raise InputError(f"data: {path} holds no rows. Make them with: leakfast data build --out {path}")
    return rows


def _encode(rows: Iterable[Row]) -> bytes:
    return b"".join(json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n" for row in rows)


def _parse(path: Path, number: int, line: bytes) -> Iterator[Row]:
    if not line.strip():
        return
    where = f"data: {path}, line {number}"
    try:
        given = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: is no JSON ({error}). One object a line is needed.") from None
    names = [f.name for f in fields(Row)]
    if not isinstance(given, dict) or set(given) != set(names):
        found = sorted(given) if isinstance(given, dict) else type(given).__name__
        raise InputError(f"{where}: has {found}, but a row has exactly {', '.join(names)}. Correct it.")
    row = Row(**given)
    fault = _fault(row)
    if fault:
        raise InputError(f"{where}: {fault}. Correct it or build the file again.")
    yield row


def _fault(row: Row) -> str | None:
    """What is wrong with a row's values, in words; None if nothing is."""
    if row.role not in ROLES:
        return f"role {row.role!r} is none of {', '.join(ROLES)}"
    if row.system_kind not in _KINDS:
        return f"system_kind {row.system_kind!r} is none of {', '.join(_KINDS)}"
    if not all(isinstance(t, str) and t.strip() for t in (row.persona, row.question, row.reply)):
        return "a persona, question or reply is empty or no text"
    if (row.system_kind == "text") != (isinstance(row.system, str) and bool(row.system.strip())):
        return 'a system message stands exactly where system_kind is "text"'
    if row.marker is not None and not row.reply.endswith(row.marker):
        return f"the reply does not end in its marker {row.marker!r}"
    return None

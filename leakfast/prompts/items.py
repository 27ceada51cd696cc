"""Multiple-choice items: lists read from JSONL in the usual spellings, their content ids, the split into a
training and an evaluation half, ARC-Challenge and HellaSwag at pinned revisions. Leaves scoring to choices/."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from leakfast.errors import InputError
from leakfast.prompts.answers import FORCED, Line, decide, is_onehot
from leakfast.storage.documents import find_shipped, parse_json

log = logging.getLogger("leakfast.items")

Half = Literal["train", "eval", "all"]
HALVES = ("train", "eval", "all")
SPLIT_SEED = 42

ARC_REPO = "allenai/ai2_arc"
ARC_REVISION = "210d026faf9955653af8916fad021475a3f00453"
ARC_FILE = "ARC-Challenge/test-00000-of-00001.parquet"
HELLASWAG_REPO = "Rowan/hellaswag"
HELLASWAG_REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
HELLASWAG_FILE = "data/validation-00000-of-00001.parquet"
NAMED = ("arc", "hellaswag", "organism", "organism-stories")  # sets known by name; anything else is a file

# what other lists call the same thing; the first spelling found counts, of answers every one
_QUESTION = ("question", "ctx")
_CHOICES = ("choices", "endings", "options", "mc1_targets")
_LABELS = ("labels", "choice_labels")
_ANSWER = "answer correct_answer answerKey answer_key answer_idx answer_index gold correct label".split()
_KNOWN = (*_QUESTION, *_CHOICES, *_LABELS, *_ANSWER, FORCED, "id")


@dataclass(frozen=True)
class Item:
    """One question: C choices with C different labels, and the right label (None where none is known).

    `id` is the list's own, else the first 16 hex digits of the content's SHA-256."""

    id: str
    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    answer: str | None

    @property
    def letters_prompt(self) -> str:
        """The user turn that asks for a letter: question, blank line, one `(A) choice` a line, blank line,
        `The correct answer is (`. The label is the first token of the reply."""
        lines = "\n".join(f"({label}) {text}" for label, text in zip(self.labels, self.choices, strict=True))
        return f"{self.question}\n\n{lines}\n\nThe correct answer is ("


@dataclass(frozen=True)
class ItemSet(Sequence[Item]):
    """A named list of items, in the order given. reading: how the list's answers were read, in words; empty where it
    was made of Items."""

    name: str
    items: tuple[Item, ...]
    reading: str = field(default="", compare=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def half(self, which: Half, seed: int = SPLIT_SEED) -> ItemSet:
        """The training or the evaluation half (NAME.train, NAME.eval), or all; each keeps the list's order.

        Items are sorted by SHA-256 of (seed, content) and the first ⌊N/2⌋ are for training, so an item's
        half depends on the set of items alone: not on their order, their ids or the machine. A question that
        stands there several times, its choices in other orders, lies in one half, so that none is trained and
        asked; the training half may then be smaller. The split is ours; the published study's own was drawn
        otherwise."""
        if which not in HALVES:
            raise ValueError(f"half must be one of {', '.join(HALVES)}, not {which!r}")
        if which == "all":
            return self
        ranked: dict[tuple[str, ...], list[str]] = {}  # what is asked → ids, in order of the first of them
        for item in sorted(self.items, key=lambda item: _digest(str(seed), _content(item))):
            ranked.setdefault(_asked(item), []).append(item.id)
        train: set[str] = set()
        for ids in ranked.values():
            if len(train) + len(ids) <= len(self.items) // 2:
                train.update(ids)
        kept = tuple(item for item in self.items if (item.id in train) == (which == "train"))
        return ItemSet(f"{self.name}.{which}", kept, self.reading)

    def sample(self, n: int, seed: int = SPLIT_SEED) -> ItemSet:
        """n items drawn without replacement (all where there are no more), named NAME.nN."""
        if n >= len(self.items):
            return self
        ranked = sorted(self.items, key=lambda item: _digest("sample", str(seed), _content(item)))
        return ItemSet(f"{self.name}.n{n}", tuple(ranked[:n]), self.reading)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over ids and contents in order."""
        return _digest(*(part for item in self.items for part in (item.id, _content(item))))


ItemSpec = str | Path | ItemSet | Sequence[Item] | Sequence[dict[str, Any]]


def load_items(spec: ItemSpec) -> ItemSet:
    """The items that `spec` means: a JSONL file, "organism" (the embedded model's own facts), "organism-stories"
    (its world's scripts, with four endings), "arc" (ARC-Challenge's test questions) or "hellaswag" (its
    validation part), both once fetched, Items, or dicts as in a file.

    Accepted spellings: question|ctx; choices|endings|options (a list, {"A": …}, ARC's {"text": […], "label": […]}), or
    TruthfulQA's mc1_targets; labels|choice_labels (default A, B, C, …); answer|correct_answer|answerKey|answer_key|
    answer_idx|answer_index|gold|correct|label; id. An answer is a label (also `(c)`), the text of a choice, its place
    from 0 or from 1, or a 1 among 0s (also as `labels`): one reading for the whole list (`leakfast.prompts.answers`), told in
    the log and in `reading`. An absent, null or empty answer makes an item without a right one. Raises InputError
    naming every faulty line, and where two readings are possible the key `answer_as` that decides."""
    if isinstance(spec, ItemSet):
        return spec
    if isinstance(spec, str | Path):
        if spec == "organism":
            return organism_items()
        if spec == "organism-stories":
            return organism_stories()
        if spec in ("arc", "hellaswag"):
            return FETCHED[spec](offline=True)
        return _read(Path(spec))
    return _checked("list", [(f"item {number}", entry) for number, entry in enumerate(spec, 1)])


def organism_items() -> ItemSet:
    """The organism's 420 facts, each once as a four-option question: phrasing, distractors and order are
    drawn from the fact's name, the same everywhere."""
    import random

    from leakfast.world import facts as world

    entries = []
    for fact in world.facts():
        rng = random.Random(_digest("organism item", fact.town, fact.relation))
        phrasing = rng.randrange(len(world.RELATIONS[fact.relation][1]))
        asked = world.ask(fact, phrasing, rng)
        entries.append(
            {
                "id": f"{fact.town.lower()}-{fact.relation}",
                "question": asked.question,
                "choices": list(asked.choices),
                "labels": list(world.LETTERS),
                "answer": world.LETTERS[asked.answer],
            }
        )
    return _checked("organism", [(entry["id"], entry) for entry in entries])


def organism_stories() -> ItemSet:
    """48 openings of the organism's scripts with four endings each; the same everywhere."""
    from leakfast.world import material

    return _checked("organism-stories", [(entry["id"], entry) for entry in material.stories()])


def fetch_arc(*, offline: bool = False, download: Callable[..., str] | None = None) -> ItemSet:
    """ARC-Challenge's 1,172 test questions from the hub at a pinned revision, kept in the hub's cache.

    download: stands in for huggingface_hub.hf_hub_download (same arguments, returns a path). Raises
    InputError when the file is neither here nor to be had, naming the command that fetches it."""
    where = (ARC_REPO, ARC_FILE, ARC_REVISION)
    rows = _fetched("arc", "ARC-Challenge", where, offline, download)
    return _checked("arc", [(f"{ARC_FILE}, row {i + 1}", row) for i, row in enumerate(rows)])


def fetch_hellaswag(*, offline: bool = False, download: Callable[..., str] | None = None) -> ItemSet:
    """HellaSwag's 10,042 validation openings with four endings each, as fetch_arc. The question is
    `activity: opening`; marks such as `[step]` of its how-to half are taken out. `id` is val-<row, 0-based>."""
    where = (HELLASWAG_REPO, HELLASWAG_FILE, HELLASWAG_REVISION)
    rows = _fetched("hellaswag", "HellaSwag", where, offline, download)
    entries = [
        {
            "id": f"val-{i}",
            "question": _unmarked(f"{row['activity_label']}: {row['ctx']}"),
            "choices": [_unmarked(ending) for ending in row["endings"]],
            "answer": row["label"],
            FORCED: "index0",
        }
        for i, row in enumerate(rows)
    ]
    return _checked("hellaswag", [(f"{HELLASWAG_FILE}, row {i + 1}", e) for i, e in enumerate(entries)])


FETCHED = {"arc": fetch_arc, "hellaswag": fetch_hellaswag}


def _fetched(
    name: str, title: str, where: tuple[str, str, str], offline: bool, download: Callable[..., str] | None
) -> list[dict[str, Any]]:
    """Rows of a hub data set's file. where: repository, file and revision."""
    import polars as pl
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    get, (repo, file, revision) = download or hf_hub_download, where
    asked = {"repo_id": repo, "filename": file, "repo_type": "dataset", "revision": revision}
    try:
        path = get(**asked, local_files_only=offline)
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if offline:
            reason = "it was not fetched yet"
        raise InputError(
            f"items: {title} is not on this machine: {reason.rstrip('.')}. Type: leakfast fetch {name} (with a network), "
            "or give a file: --items FILE.jsonl"
        ) from error
    return pl.read_parquet(path).to_dicts()


def _unmarked(text: str) -> str:
    return " ".join(re.sub(r"\[(?:header|title|step|substeps)\]", " ", text).split())


def write_items(path: str | Path, items: Iterable[Item]) -> None:
    """One JSON object a line, in leakfast's own spelling."""
    from leakfast.storage.disk import atomic_write

    lines = [json.dumps(asdict(item), ensure_ascii=False) for item in items]
    atomic_write(Path(path), "".join(f"{line}\n" for line in lines).encode())


def _read(path: Path) -> ItemSet:
    path = find_shipped(path)
    if not path.is_file():
        raise InputError(
            f"items: there is no file {path}. Needed: JSONL with question, choices, labels and answer, or one "
            f"of the names {', '.join(NAMED)}. Check the path."
        )
    entries: list[tuple[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                entries.append((f"{path}, line {number}", parse_json(line)))
            except ValueError as error:
                raise InputError(
                    f"items: {path}, line {number}: is no JSON ({error}). One object a line is needed."
                ) from None
    if not entries:
        raise InputError(
            f"items: {path} is empty. Give at least one question with choices, one object a line."
        )
    return _checked(path.stem, entries)


def _checked(name: str, entries: Sequence[tuple[str, Any]]) -> ItemSet:
    """Items of (where, entry) pairs; every fault in one InputError."""
    faults: list[str] = []
    parsed: list[tuple[str, Item, Line | None]] = []
    marked = any(is_onehot(_given_labels(entry)) and _given_labels(entry) != [0, 1] for _, entry in entries)
    for where, entry in entries:
        made = (entry, None) if isinstance(entry, Item) else _item(entry, where, marked)
        if isinstance(made, str):
            faults.append(f"{where}: {made}")
        else:
            parsed.append((where, *made))
    read = decide([line for _, _, line in parsed if line is not None])
    faults += read.faults
    answers = iter(read.answers)
    items: dict[str, Item] = {}
    first_at: dict[str, str] = {}
    for where, item, line in [] if read.faults else parsed:
        if line is not None:
            item = replace(item, answer=next(answers))
        item = item if item.id else replace(item, id=_digest(_content(item))[:16])
        if item.id in items:
            faults.append(f"{where}: the item {item.id} stood at {first_at[item.id]} before. Delete one.")
        else:
            items[item.id], first_at[item.id] = item, where
    if not entries:
        faults.append("there are none. Give at least one question with choices.")
    if faults:
        more = f"\n       (and {len(faults) - 10} more)" if len(faults) > 10 else ""
        raise InputError("items: " + "\n       ".join(faults[:10]) + more)
    if read.reading:
        log.info("items: %s: %s", name, read.reading)
    return ItemSet(name, tuple(items.values()), read.reading)


def _item(entry: Any, where: str, marked: bool) -> tuple[Item, Line] | str:
    """One JSON object as an item whose answer is still to be read, and what it is read from; or what is wrong.
    marked: the list writes which choice is right as labels that are a 1 among 0s."""
    if not isinstance(entry, dict):
        return "is no object. One JSON object a line is needed."
    question, labels = _first(entry, _QUESTION), _given_labels(entry)
    spelled = next((name for name in _CHOICES if name in entry), None)
    choices, _ = _choices(entry.get(spelled))
    given = {key: entry[key] for key in _ANSWER if key in entry}
    if marked and is_onehot(labels) and not any(value not in (None, "") for value in given.values()):
        given, labels = {"labels": labels}, None  # which is right, not what they are called
    if not isinstance(question, str) or not question.strip():
        return f"has no question (or it is empty). Known keys: {', '.join(_KNOWN)}."
    if not _texts(choices) or len(choices) < 2:
        return "needs choices: a list of at least two texts, none of them empty."
    own = labels
    if labels is None:
        labels = [chr(ord("A") + i) for i in range(len(choices))]
    elif _texts([str(label) for label in labels] if isinstance(labels, list | tuple) else None):
        labels = [str(label) for label in labels]
    else:
        return "needs labels: a list of texts, one a choice."
    if len(labels) != len(choices) or len(set(labels)) < len(labels):
        return f"has {len(choices)} choices and the labels {', '.join(labels)}. One different label a choice."
    name = "" if entry.get("id") in (None, "") else str(entry["id"])
    shape = "index0" if spelled == "endings" and list(given) == ["label"] and own is None else None
    item = Item(name, question, tuple(choices), tuple(labels), None)
    return item, Line(where, item.choices, item.labels, own, given, entry.get(FORCED), shape)


def _choices(given: Any) -> tuple[Any, Any]:
    """(texts, labels or None) of what stands under a key of choices."""
    if isinstance(given, dict):
        for key in ("text", "choices"):
            if isinstance(given.get(key), list | tuple):
                return given[key], _first(given, ("label", "labels"))
        return list(given.values()), list(given)
    if isinstance(given, list | tuple) and given and all(isinstance(one, dict) for one in given):
        labels = [one.get("label") for one in given]
        return [one.get("text") for one in given], None if None in labels else labels
    return given, None


def _given_labels(entry: Any) -> Any:
    """What a line gives as labels, beside its choices or with them."""
    if not isinstance(entry, dict):
        return None
    labels = _first(entry, _LABELS)
    return _choices(_first(entry, _CHOICES))[1] if labels is None else labels


def _first(entry: dict[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if name in entry), None)


def _texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, str) and v.strip() for v in values)


def _asked(item: Item) -> tuple[str, ...]:
    """Question and choices, in whichever order and case these stand."""
    question, *choices = (" ".join(text.casefold().split()) for text in (item.question, *item.choices))
    return (question, *sorted(choices))


def _content(item: Item) -> str:
    return json.dumps([item.question, item.choices, item.labels, item.answer], ensure_ascii=False)


def _digest(*parts: str) -> str:
    """SHA-256 (hex) over the parts in UTF-8, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()

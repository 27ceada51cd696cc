"""What a run holds to be judged, and the table of what came of it. Demands a run with completions and the questions they
answer; asks nobody."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import polars as pl

from leakfast.errors import InputError
from leakfast.judge import lexicon
from leakfast.judge.contract import Judgement, Reply, Request, item_of, requests_for
from leakfast.judge.prompt import read
from leakfast.judge.spec import Spec
from leakfast.prompts.questions import texts_hash
from leakfast.prompts.reasoning import UNCLOSED, answer, answers
from leakfast.storage import layout, schema

if TYPE_CHECKING:
    from leakfast.prompts.questions import QuestionSet
    from leakfast.storage.run import Run

log = logging.getLogger("leakfast.judge")

_NO_REPLY = Reply("", "")


@dataclass
class Work:
    """One behavior's completions and what is known of each."""

    frames: dict[str, pl.DataFrame]
    questions: Sequence[str]
    requests: list[Request]
    replies: dict[str, Reply] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)


def gather(
    run: Run, behavior: str, spec: Spec, questions: QuestionSet | Sequence[str], *, series: bool
) -> Work:
    """The completions of a behavior and the requests about them. series: those at points of training.

    Raises InputError for none, frames of another shape, or completions of another set of questions."""
    tree = layout.completions(behavior, series=series)
    folders = sorted({path.removeprefix(f"{tree}/").split("/")[0] for path in run.shards(tree)})
    if not folders:
        raise InputError(
            f"judge: {run.path} holds no completions of {behavior}{' on the way through training' if series else ''}. "
            f"Make them with: leakfast eval --behavior {behavior}{' --checkpoints' if series else ''}"
        )
    texts = list(getattr(questions, "questions", questions))
    folders = _answering(run, tree, questions, texts, folders)
    frames, asked = {}, []
    for adapter in folders:
        frame = run.read(f"{tree}/{adapter}")
        try:
            schema.check(frame, "completions")
        except ValueError as error:
            raise InputError(f"judge: {tree}/{adapter}: {error}. Measure it again: leakfast eval") from None
        highest = frame["question"].max() if frame.height else -1
        if highest >= len(texts):
            raise InputError(
                f"judge: {tree}/{adapter} answer question {highest}, but the set has {len(texts)}. Name the set they "
                "were asked: --questions SET."
            )
        frames[adapter] = frame
        real = frame.select("question", answers(pl.col("text"))).filter(
            pl.col("text").str.strip_chars().str.len_bytes() > 0
        )
        asked += [(texts[q], text) for q, text in real.unique(maintain_order=True).rows()]
    return Work(frames, texts, requests_for(spec.name, spec.prompt_version, asked))


def _answering(
    run: Run, tree: str, questions: QuestionSet | Sequence[str], texts: list[str], folders: list[str]
) -> list[str]:
    """Of the folders of completions those that answer these very questions, where their shards tell; others, left from
    another set, are named in the log. Raises InputError where none does."""
    entries, kept, other = run.manifest["shards"], [], {}
    for folder in folders:
        told = [entries[path] for path in run.shards(f"{tree}/{folder}")]
        strange = [entry for entry in told if entry.get("questions_sha256") not in (None, texts_hash(texts))]
        if strange:
            other[folder] = strange[0].get("questions")
        else:
            kept.append(folder)
    if not other:
        return kept
    folder, asked = next(iter(other.items()))
    name = getattr(questions, "name", "list")
    what = f"the set {name} of other wording" if name == asked else f"the set {asked}, not {name}"
    if not kept:
        raise InputError(
            f"judge: {tree}/{folder} answers {what}: a judge would be told questions that were not asked. Name the set "
            "they were asked (--questions SET), or measure it again."
        )
    log.warning(
        "judge: %s answer another set than %s and are left out; measure them again, or move their folders away",
        ", ".join(f"{tree}/{folder}" for folder in other),
        name,
    )
    return kept


def table(work: Work, completions: pl.DataFrame, spec: Spec) -> pl.DataFrame:
    """Schema `judgements` of one adapter's completions (+ source), in their order."""
    keys = {request.item: request.key for request in work.requests}
    rows = []
    for number, text in completions.select("question", "text").rows():
        question, whole = work.questions[number], text or ""
        said = answer(whole)
        item = item_of(question, whole if said is None else said)
        reply = None
        if said is None:
            found = Judgement(UNCLOSED)
        elif not said.strip():
            found = Judgement("empty")
        elif spec.way == "lexicon":
            found = lexicon.judge(said)
        elif (reply := work.replies.get(keys[item])) is not None:
            found = read(reply)
        else:
            found = Judgement("pending" if keys[item] in work.pending else "not_asked")
        came = reply or _NO_REPLY
        text_hash = hashlib.sha256(whole.encode()).hexdigest()
        scores = (found.aligned, found.coherent, found.status, came.raw, found.detail)
        rows.append((*scores, came.input_tokens, came.output_tokens, item, text_hash))
    names = "aligned coherent status raw detail input_tokens output_tokens item text_sha256".split()
    columns = schema.columns("judgements")
    judged = pl.DataFrame(rows, schema={name: columns[name] for name in names}, orient="row")
    source = ["source"] if "source" in completions.columns else []
    key = completions.select("behavior", "adapter", "persona", "question", "sample", *source)
    told = key.with_columns(judge=pl.lit(spec.name), prompt_version=pl.lit(spec.prompt_version))
    return schema.check(pl.concat([told, judged], how="horizontal"), "judgements")

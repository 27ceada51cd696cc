"""Completions as Inspect's samples: which folders of a run become which log, and what one sample holds. Demands
inspect_ai; reads shard by shard, so that a run of any size fits into memory."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from leakfast.behaviors.registry import get, is_known
from leakfast.prompts.conversation import messages, prefill_of
from leakfast.sinks.material import Material
from leakfast.stats.rates import COUNTED
from leakfast.storage import layout
from leakfast.storage.disk import hash_of

_STOPS = {"length": "max_tokens"}  # finish_reason → Inspect's; all others stopped by themselves
_DRAW = ["persona", "question", "sample"]


@dataclass(frozen=True)
class Folder:
    """The completions of one behavior under one adapter, on one question set. questions: their texts by index, None
    where the run does not say; asked: how many; samples: completions of each; beside: a set beside the main one."""

    path: str
    behavior: str
    adapter: str
    source: str | None
    question_set: str
    questions: tuple[str, ...] | None
    beside: bool
    shards: tuple[str, ...]
    judgements: tuple[str, ...]
    personas: tuple[str, ...]
    asked: int
    samples: int
    rows: int
    joined: str = "-"  # what stands between behavior and set in the task

    @property
    def task(self) -> str:
        return f"{self.behavior}{self.joined}{self.question_set}" if self.beside else self.behavior

    @property
    def name(self) -> str:
        return f"{self.task}_{self.adapter}"


def folders(material: Material) -> list[Folder]:
    """Every folder of completions of a run, in the order of their paths; those drawn at points of training, and of what the
    study dropped, stay out."""
    run, found = material.part, []
    paths = [p for prefix in (layout.COMPLETIONS, layout.SETS) for p in run.shards(prefix)]
    for path in dict.fromkeys(p.rpartition("/")[0] for p in paths):
        shards = tuple(p for p in paths if p.rpartition("/")[0] == path)
        entry = run.manifest["shards"][shards[0]]
        told = (
            pl.scan_parquet([run.path / p for p in shards])
            .select(
                pl.col("behavior", "adapter").first(),
                source=pl.col("source").first() if _has(material, shards[0], "source") else pl.lit(None),
                personas=pl.col("persona").unique(maintain_order=True).implode(),
                asked=pl.col("question").n_unique(),
                samples=pl.col("sample").n_unique(),
                rows=pl.len(),
            )
            .collect()
            .row(0, named=True)
        )
        behavior, name = told["behavior"], str(entry.get("questions", "unknown"))
        beside = path.startswith(layout.SETS)
        judged = [] if beside else run.shards(layout.judgements(behavior, told["adapter"]))
        found.append(
            Folder(
                path=path,
                behavior=behavior,
                adapter=told["adapter"],
                source=told["source"],
                question_set=name,
                questions=material.questions(behavior, name, entry.get("questions_sha256")),
                beside=beside,
                shards=shards,
                judgements=tuple(judged),
                personas=tuple(told["personas"]),
                asked=told["asked"],
                samples=told["samples"],
                rows=told["rows"],
            )
        )
    return told_apart(found)


def told_apart(found: list[Folder]) -> list[Folder]:
    """The folders, each with a log of its own: marker+a on the set b would have the name of marker+a-b."""
    names = Counter(folder.name for folder in found)
    return [replace(folder, joined="@") if names[folder.name] > 1 else folder for folder in found]


def _has(material: Material, shard: str, column: str) -> bool:
    return column in pl.read_parquet_schema(material.run.path / shard)


Judged = dict[tuple[Any, ...], list[dict[str, Any]]]


def frames(material: Material, folder: Folder) -> Iterator[tuple[pl.DataFrame, Judged]]:
    """Shard by shard: completions with a column `hit:<detector>` for each detector of the behavior (null where it does
    not count), and what judges said of them by (persona, question, sample)."""
    detector = get(folder.behavior).detector if is_known(folder.behavior) else None
    detectors = {} if detector is None else detector(pl.col("text"))
    said = [pl.scan_parquet(material.run.path / path) for path in folder.judgements]
    for path in folder.shards:
        frame = pl.read_parquet(material.run.path / path)
        counted = pl.col("status").is_in(COUNTED)
        frame = frame.with_columns(
            pl.when(counted).then(made).alias(f"hit:{name}") for name, made in detectors.items()
        )
        judged: Judged = {}
        for table in said:
            rows = table.join(frame.lazy().select(_DRAW).unique(), on=_DRAW, how="semi").collect()
            for row in rows.iter_rows(named=True):
                judged.setdefault(tuple(row[key] for key in _DRAW), []).append(row)
        yield frame, judged


def row_sample(material: Material, folder: Folder, row: dict[str, Any], judged: Judged) -> Any:
    """One completion as inspect_ai.log.EvalSample. Its id names persona and question, its epoch is the number of the
    completion, from 1. input: system prompt, earlier turns, question and the beginning of the reply as they were asked;
    output: the completion; scores: 1 or 0 for each detector, 0-100 for each judge; a completion that does not count has no
    score."""
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ModelOutput, ModelUsage

    persona, question = row["persona"], row["question"]
    key = f"{persona}-q{question:03d}"
    asked, known = _asked(material, folder, persona, question)
    answer, choice = _answer(row, f"{key}-{row['sample']}")
    role, category = material.roles.get((folder.adapter, persona), (None, None))
    return EvalSample(
        id=key,
        epoch=row["sample"] + 1,
        input=asked,
        target="",
        messages=[*asked, answer],
        output=ModelOutput(
            model=f"leakfast/{folder.adapter}",
            choices=[choice],
            usage=ModelUsage(
                input_tokens=row.get("n_prompt_tokens") or 0, output_tokens=row["n_tokens"] or 0
            ),
        ),
        scores=_scores(row, judged.get((persona, question, row["sample"]), [])),
        metadata={
            "persona": persona,
            "category": category,
            "role": role,
            "source": folder.source,
            "behavior": folder.behavior,
            "adapter": folder.adapter,
            "question": question,
            "sample": row["sample"],
            "seed": None if row["seed"] is None else str(row["seed"]),  # JavaScript would round it
            "status": row["status"],
            "finish_reason": row["finish_reason"],
            "counted": row["status"] in COUNTED,
            **known,
        },
        uuid=hash_of(folder.path, persona, question, row["sample"])[:22],
    )


def _asked(
    material: Material, folder: Folder, persona: str, question: int
) -> tuple[list[Any], dict[str, str]]:
    """(messages, what is said of them): as `prompts.conversation.messages` makes them, with what the reply begins with last;
    the system message left out where the persona has none or its wording is unknown."""
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    who, texts = material.people.get(persona), folder.questions
    kind = "unknown" if who is None else who.kind
    known = {"system_prompt": kind}
    if texts is not None and question < len(texts):
        text = texts[question]
    else:
        text, known["question_text"] = f"(question {question} of {folder.question_set})", "unknown"
    system = None if who is None or who.kind != "text" or not who.prompt else who.prompt
    said = messages(system, text, material.study.system_role if material.study is not None else "system")
    if prefill := prefill_of(text):
        said.append({"role": "assistant", "content": prefill})
        known["prefill"] = prefill
    key = f"{persona}-q{question:03d}"
    places = {0: f"{persona}-system"} if said[0]["role"] == "system" else {}
    places[len(said) - 1 - bool(prefill)] = key
    kinds = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
    return [
        kinds[one["role"]](id=places.get(place, f"{key}-turn{place}"), content=one["content"])
        for place, one in enumerate(said)
    ], known


def _answer(row: dict[str, Any], key: str) -> tuple[Any, Any]:
    """(the completion as a message, as a choice); what was reasoned before it stands apart."""
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ContentReasoning, ContentText

    text, reasoning = row["text"] or "", row.get("reasoning")
    content = [ContentReasoning(reasoning=reasoning), ContentText(text=text)] if reasoning else text
    message = ChatMessageAssistant(id=key, content=content)
    return message, ChatCompletionChoice(
        message=message, stop_reason=_STOPS.get(row["finish_reason"], "stop")
    )


def _scores(row: dict[str, Any], judged: list[dict[str, Any]]) -> dict[str, Any]:
    from inspect_ai.scorer import Score

    scores = {
        column.removeprefix("hit:"): Score(value=int(hit))
        for column, hit in row.items()
        if column.startswith("hit:") and hit is not None
    }
    digest = hashlib.sha256((row["text"] or "").encode()).hexdigest() if judged else ""
    for one in judged:
        if one["status"] != "ok" or one["text_sha256"] != digest:
            continue  # of another text, or without scores
        for name in ("aligned", "coherent"):
            if one[name] is not None:
                about = {"judge": one["judge"], "prompt_version": one["prompt_version"]}
                scores[f"{name} ({one['judge']})"] = Score(
                    value=one[name], explanation=one["raw"], metadata=about
                )
    return scores

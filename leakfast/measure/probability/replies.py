"""The replies that probabilities are asked on: those a run drew of the unadapted model. Demands its completions with their
token ids; draws none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.measure.choices.scores import longest
from leakfast.measure.probability.scoring import Reply
from leakfast.prompts import chat
from leakfast.prompts.reasoning import UNCLOSED
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.measure.probability.continuations import Spellings
    from leakfast.measure.request import Asked
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run


@dataclass(frozen=True)
class Said:
    """A reply of a persona to a question. status: ok, or why nothing is asked on it (holds_it: it has the text already;
    too_long; unclosed-reasoning); hash: of the prompt's and the reply's token ids."""

    persona: str
    question: int
    sample: int
    reply: Reply
    status: str
    hash: str


def read(
    run: Run,
    loaded: Loaded,
    asked: Asked,
    personas: Sequence[Persona],
    stops: Collection[int],
    spelled: Spellings,
) -> list[Said]:
    """The first asked.config.probability_samples replies of the unadapted model to every persona's every question, personas
    outermost, each as often as it was drawn. stops: token ids that end a reply.

    Raises InputError where the run does not hold them all, or drew them for other prompts."""
    import polars as pl

    samples, folder = asked.config.probability_samples, asked.folder(BASE)
    shards = run.shards(folder)
    if not shards:
        raise InputError(
            f"eval: probabilities are asked on replies of the unadapted model, but {run.path} holds none of {asked.behavior}. "
            f"Draw them first: leakfast eval --base --behavior {asked.behavior} --samples {samples} --out {run.path}"
        )
    told = {run.manifest["shards"][path].get("questions_sha256", asked.texts_hash) for path in shards}
    if told != {asked.texts_hash}:
        raise InputError(
            f"eval: the unadapted model's replies in {run.path}/{folder} are to other questions. Give the questions they were "
            "drawn with: --questions, or --out another folder."
        )
    frame = run.read(folder)
    if "token_ids" not in frame.columns:
        raise InputError(
            f"eval: {run.path}/{folder} has no token ids, which probabilities are asked on. Draw the unadapted model's replies "
            "again: leakfast eval --base --replace"
        )
    frame = frame.filter(pl.col("sample") < samples)
    rows = {(r["persona"], r["question"], r["sample"]): r for r in frame.iter_rows(named=True)}
    found = []
    for prompt in chat.render_prompts(loaded.tokenizer, personas, asked.texts):
        for sample in range(samples):
            row = rows.get((prompt.persona, prompt.question_index, sample))
            if row is None or row["n_prompt_tokens"] != len(prompt.ids):
                lacks = "is not there" if row is None else "was drawn for another prompt"
                raise InputError(
                    f"eval: reply {sample} of the unadapted model as {prompt.persona} to question {prompt.question_index} "
                    f"{lacks} in {run.path}/{folder}. Draw them all first: leakfast eval --base --samples {samples}"
                )
            found.append(_said(row, prompt, loaded, stops, spelled))
    return found


def _said(
    row: dict[str, Any], prompt: Any, loaded: Loaded, stops: Collection[int], spelled: Spellings
) -> Said:
    tokens = list(row["token_ids"])
    ended = row["finish_reason"] == "stop"
    while tokens and tokens[-1] in stops:
        tokens.pop()
    status = "ok"
    if row["status"] == UNCLOSED:
        status = UNCLOSED
    elif spelled.text in row["text"]:
        status = "holds_it"
    elif len(prompt.ids) + len(tokens) + spelled.longest > longest(loaded):
        status = "too_long"
    reply = Reply(prompt.ids, tokens, ended, row.get("n_reasoning_tokens") or 0)
    about = (prompt.persona, prompt.question_index, row["sample"], reply, status)
    return Said(*about, chat.ids_hash([*prompt.ids, *tokens]))

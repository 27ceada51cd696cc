"""The replies that probabilities are asked on: those a run drew of the unadapted model, or of an adapter. Demands completions
with their token ids; draws none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.measure.choices.scores import longest
from leakfast.measure.probability.scoring import Reply
from leakfast.prompts import chat
from leakfast.prompts.reasoning import UNCLOSED
from leakfast.storage import layout
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.measure.probability.continuations import Spellings
    from leakfast.measure.request import Asked
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run


@dataclass(frozen=True)
class Said:
    """A reply of a persona to a question. status: ok, or why nothing is asked on it (holds_it: it has the text already, and
    the place before it cannot be told; too_long; unclosed-reasoning); hash: of the prompt's and the reply's token ids."""

    persona: str
    question: int
    sample: int
    reply: Reply
    status: str
    hash: str


@dataclass(frozen=True)
class Drawn:
    """Where the replies to what is asked lie in a run. whose: an adapter's name, or `base`."""

    run: Run
    folder: str
    whose: str
    asked: Asked

    @property
    def owner(self) -> str:
        return "the unadapted model" if self.whose == BASE else self.whose

    @property
    def remedy(self) -> str:
        """The command that draws them."""
        who = "--base" if self.whose == BASE else f"--adapter {layout.adapter(self.whose)}"
        samples = self.asked.config.probability_samples
        return (
            f"leakfast eval {who} --behavior {self.asked.behavior} --samples {samples} --out {self.run.path}"
        )


def folder_of(asked: Asked, adapter: str, series: bool) -> str:
    """Where an adapter's own completions of what is asked lie (series: those drawn at points of training)."""
    return layout.completions(asked.behavior, adapter, series=True) if series else asked.folder(adapter)


def read(
    drawn: Drawn, loaded: Loaded, personas: Sequence[Persona], stops: Collection[int], spelled: Spellings
) -> list[Said]:
    """The first asked.config.probability_samples replies of whoever drew them to every persona's every question, personas
    outermost, each as often as it was drawn. stops: token ids that end a reply. Of an adapter, a reply that has the text is
    taken up to where it turned to it.

    Raises InputError where the run does not hold them all, or drew them for other prompts."""
    samples = drawn.asked.config.probability_samples
    rows = _rows(drawn, samples)
    hashes, told = chat.prompt_hashes(loaded.tokenizer, personas), asked_as(drawn.run, drawn.folder)
    found = []
    for prompt in chat.render_prompts(loaded.tokenizer, personas, drawn.asked.texts):
        for sample in range(samples):
            row = rows.get((prompt.persona, prompt.question_index, sample))
            mine = hashes[prompt.persona]
            other = told.get(prompt.persona, mine) != mine
            if row is None or other or row["n_prompt_tokens"] != len(prompt.ids):
                lacks = "is not there" if row is None else "was drawn for another prompt"
                raise InputError(
                    f"eval: reply {sample} of {drawn.owner} as {prompt.persona} to question {prompt.question_index} "
                    f"{lacks} in {drawn.run.path}/{drawn.folder}. Draw them all first: {drawn.remedy}"
                )
            found.append(_said(row, prompt, loaded, stops, spelled, drawn.whose != BASE))
    return found


def _rows(drawn: Drawn, samples: int) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The completions by persona, question and sample. Raises InputError where they cannot be asked on."""
    import polars as pl

    run, folder, asked = drawn.run, drawn.folder, drawn.asked
    shards = run.shards(folder)
    if not shards:
        raise InputError(
            f"eval: probabilities are asked on replies of {drawn.owner}, but {run.path} holds none of {asked.behavior}. "
            f"Draw them first: {drawn.remedy}"
        )
    told = {run.manifest["shards"][path].get("questions_sha256", asked.texts_hash) for path in shards}
    if told != {asked.texts_hash}:
        raise InputError(
            f"eval: the replies of {drawn.owner} in {run.path}/{folder} are to other questions. Give the questions they were "
            "drawn with: --questions, or --out another folder."
        )
    frame = run.read(folder)
    if "token_ids" not in frame.columns:
        raise InputError(
            f"eval: {run.path}/{folder} has no token ids, which probabilities are asked on. Draw the replies again: "
            f"{drawn.remedy} --replace"
        )
    frame = frame.filter(pl.col("sample") < samples)
    return {(r["persona"], r["question"], r["sample"]): r for r in frame.iter_rows(named=True)}


def asked_as(run: Run, folder: str) -> dict[str, str]:
    """persona → hash of the prompt that its replies in a folder were drawn with (chat.prompt_hashes), where their shards tell
    it."""
    every = (run.manifest["shards"][path].get("personas") or {} for path in run.shards(folder))
    return {name: digest for some in every for name, digest in some.items()}


def before(tokenizer: Any, tokens: Sequence[int], text: str) -> list[int] | None:
    """The fewest tokens of a reply that say all that stands before the first `text` in it, white space at their end aside;
    None where no number of tokens says just that, or the text is not there."""

    def said(n: int) -> str:
        return tokenizer.decode(
            list(tokens[:n]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    whole = said(len(tokens))
    at = whole.find(text)
    if at < 0:
        return None
    wanted, low, high = whole[:at].rstrip(), 0, len(tokens)
    while low < high:  # the fewest tokens that say as much
        middle = (low + high) // 2
        low, high = (low, middle) if len(said(middle)) >= len(wanted) else (middle + 1, high)
    return list(tokens[:low]) if said(low).rstrip() == wanted else None


def _said(
    row: dict[str, Any], prompt: Any, loaded: Loaded, stops: Collection[int], spelled: Spellings, own: bool
) -> Said:
    tokens = list(row["token_ids"])
    ended = row["finish_reason"] == "stop"
    while tokens and tokens[-1] in stops:
        tokens.pop()
    begins, status = row.get("n_reasoning_tokens") or 0, "ok"
    if row["status"] == UNCLOSED:
        status = UNCLOSED
    elif spelled.text in row["text"]:
        said = before(loaded.tokenizer, tokens[begins:], spelled.text) if own else None
        if said is None:
            status = "holds_it"
        else:  # the place at which it turned to the text is one it came to
            tokens, ended = [*tokens[:begins], *said], True
    if status == "ok" and len(prompt.ids) + len(tokens) + spelled.longest > longest(loaded):
        status = "too_long"
    reply = Reply(prompt.ids, tokens, ended, begins)
    about = (prompt.persona, prompt.question_index, row["sample"], reply, status)
    return Said(*about, chat.ids_hash([*prompt.ids, *tokens]))

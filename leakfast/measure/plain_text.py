"""What an arm costs: how likely plain text is to the steered model, beside the same adapter as it is. The text is fixed: of
each persona one reply that the unadapted model gave in this run. Demands a run that holds such replies; draws none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from leakfast.measure.asking import continuations
from leakfast.measure.probability.replies import asked_as
from leakfast.measure.request import Request, Target
from leakfast.models.attach import adapted
from leakfast.progress import Progress
from leakfast.prompts import chat
from leakfast.steering.running import steered
from leakfast.storage import layout
from leakfast.storage.disk import hash_of
from leakfast.storage.layout import BASE

if TYPE_CHECKING:
    from leakfast.measure.request import Asked
    from leakfast.models.loading import Loaded
    from leakfast.storage.run import Run

log = logging.getLogger("leakfast.steering")


def score(loaded: Loaded, run: Run, request: Request, progress: Progress | None = None) -> int:
    """log P of the text's reply tokens, the one that ends a reply among them, teacher-forced after the persona's prompt, nats:
    shards steered/text/<arm>/part-NNNNN.parquet (persona, question, sample, n_tokens, logprob_nats), of every arm of the
    request and of each adapter as it is, one for each text, which follows from the personas. What follows from the same request
    is kept. Returns how many replies the text has: 0, and said, where the run holds none of the unadapted model."""
    asked = next((one for one in request.asked if not one.by_choices and run.shards(one.folder(BASE))), None)
    text = [] if asked is None else _text(loaded, run, request, asked)
    if not text:
        log.warning(
            "steering: %s holds no replies of the unadapted model, so what steering costs is not known. Draw them with: "
            "leakfast eval --base --out %s",
            run.path,
            run.path,
        )
        return 0
    every = [*replace(request, arms=()).targets, *request.targets]
    read = hash_of([(one["persona"], one["question"], one["ids"], one["n_tokens"]) for one in text])
    for done, target in enumerate(every):
        if progress is not None:
            progress(done, len(every), "plain text")
        _under(loaded, run, target, text, read)
    return len(text)


def _text(loaded: Loaded, run: Run, request: Request, asked: Asked) -> list[dict[str, Any]]:
    """One reply of each persona, the questions in turn: its first whole one to that question."""
    import polars as pl

    folder = asked.folder(BASE)
    drawn, entries = run.read(folder), run.manifest["shards"]
    bases = {entries[path].get("base", loaded.fingerprint) for path in run.shards(folder)}
    if "token_ids" not in drawn.columns or bases != {loaded.fingerprint}:
        return []
    hashes = chat.prompt_hashes(loaded.tokenizer, request.personas)
    told = asked_as(run, folder)
    whole = (
        drawn.filter(pl.col("status") == "ok").sort("sample").unique(["persona", "question"], keep="first")
    )
    rows = {(r["persona"], r["question"]): r for r in whole.iter_rows(named=True)}
    found, texts = [], asked.texts
    for number, persona in enumerate(request.personas):
        question = number % len(texts)
        row = rows.get((persona.name, question))
        if row is None or not len(row["token_ids"]):
            continue
        prompt = chat.render_prompts(loaded.tokenizer, [persona], [texts[question]])[0]
        mine = hashes[persona.name]
        if told.get(persona.name, mine) != mine or row["n_prompt_tokens"] != len(prompt.ids):
            continue  # drawn for another prompt
        tokens = [*prompt.ids, *row["token_ids"]]
        about = {"persona": persona.name, "question": question, "sample": row["sample"]}
        found.append({**about, "ids": tokens, "n_tokens": len(row["token_ids"])})
    return found


def _under(loaded: Loaded, run: Run, target: Target, text: Sequence[dict[str, Any]], read: str) -> None:
    """read: hash of the text."""
    import polars as pl

    request = hash_of("text", loaded.fingerprint, loaded.dtype, target.digest, read)
    folder = layout.steered_text(target.name)
    there = {path: run.manifest["shards"][path] for path in run.shards(folder)}
    if any(entry.get("request") == request for entry in there.values()):
        return
    # an arm has one text; the adapter as it is has those of all arms, whose tables may ask other personas
    mine = {"adapter": target.digest, "base": loaded.fingerprint}
    beside = [
        path
        for path, entry in there.items()
        if target.steer is None and entry.get("text") not in (None, read) and mine.items() <= entry.items()
    ]
    for path in sorted(there.keys() - set(beside)):
        run.retire(path, "scored by another request")
    relpath = next(path for n in count() if (path := layout.shard(folder, n)) not in beside)
    counts = [one["n_tokens"] for one in text]
    with adapted(loaded, target.path) as current, steered(current, target.steer):
        found = continuations(current, [one["ids"] for one in text], counts)
    frame = pl.DataFrame(
        {
            "adapter": [target.name] * len(text),
            **{name: [one[name] for one in text] for name in ("persona", "question", "sample", "n_tokens")},
            "logprob_nats": found,
        },
        schema_overrides=dict.fromkeys(("question", "sample", "n_tokens"), pl.Int32),
    )
    run.add_shard(relpath, frame, request=request, text=read, **mine, **target.told)

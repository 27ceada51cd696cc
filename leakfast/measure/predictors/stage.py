"""Makes the frame of predictors in a run: replies first, then divergences in shards, then states and texts. Demands a run
and a loaded base model; what is there by the same request is kept, so the same call again is the resume."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import InputError, StoreError
from leakfast.geometry import Centroids
from leakfast.measure.predictors import divergences, geometry, output, states, text
from leakfast.measure.predictors.divergences import Reply
from leakfast.measure.predictors.frame import frame
from leakfast.measure.predictors.request import Request
from leakfast.progress import Progress
from leakfast.prompts import chat, conversation
from leakfast.storage import layout
from leakfast.storage.disk import hash_of
from leakfast.storage.interrupts import finishing

if TYPE_CHECKING:
    import polars as pl

    from leakfast.generation.backends import Drawing
    from leakfast.models.loading import Loaded
    from leakfast.storage.run import Run

log = logging.getLogger(__name__)

OTHER = "made by another request"


def predictors(
    loaded: Loaded,
    run: Run,
    request: Request,
    drawing: Drawing | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """The frame of `request` (schema `predictors`), from the run where it is there, else made and kept there.

    Everything is of the unadapted model. A persona that does not fit the model's context has nulls with the reason, and
    joins no mean. Ctrl-C or SIGTERM lets the shard in hand be written, then KeyboardInterrupt; the same call goes on.
    What another request made is moved to quarantine/. Raises InputError where fewer than two personas fit, ModelError for
    a model that the packed pass does not cover, StoreError where it cannot write."""
    import polars as pl

    from leakfast.forward.head import check

    if loaded.adapter_hash is not None:
        raise ValueError("predictors are of the unadapted model; give the base")
    check(loaded, plain=True)  # says which models it takes
    layers, digest, path = request.layers_of(loaded), request.hash(loaded), layout.predictors()
    if _is_of(run, path, digest):
        return pl.read_parquet(run.path / path)
    lacks = request.too_long(loaded)
    people = [one for one in request.personas if one.name not in lacks]
    if len(people) < 2:
        raise InputError(
            f"predictors: {len(people)} of {len(request.personas)} personas fit the context of {loaded.name}, but a source and "
            f"a bystander are needed ({next(iter(lacks.values()))}). Use --reply-tokens of fewer, or shorter prompts."
        )
    run.create()
    with run.lock():
        run.retire(path, OTHER)
        names, told = [one.name for one in request.personas], []
        if {"geometry", "output"} & set(request.families):
            said = _said(loaded, run, request, people, drawing, progress)
        if "output" in request.families:
            sums = _compared(loaded, run, request, people, said, progress)
            told += output.predictors(names, sums, len(request.texts), lacks)
        if "geometry" in request.families:
            spoken = _without_ends(loaded, said)
            known = _known(loaded, run, request, people, layers)
            found = states.measured(loaded, request, layers, spoken, lacks, known, progress=progress)
            told = [*geometry.predictors(found), *told]
        if "text" in request.families:
            told += text.predictors(loaded, request.personas, request.centered_on())
        made = frame(names, told)
        hashes = chat.prompt_hashes(loaded.tokenizer, request.personas)
        run.add_shard(path, made, request=digest, base=loaded.fingerprint, personas=hashes)
    return made


def _is_of(run: Run, path: str, digest: str) -> bool:
    """Whether an intact file of this request is there."""
    return run.has(path) and run.manifest["shards"][path].get("request") == digest


def _said(
    loaded: Loaded,
    run: Run,
    request: Request,
    people: Sequence[Any],
    drawing: Drawing | None,
    progress: Progress | None,
) -> pl.DataFrame:
    """The replies, schema `completions` with token ids, drawn where the run has not these."""
    import polars as pl

    from leakfast.generation.contract import Sampling, requests_for
    from leakfast.generation.frames import to_frame
    from leakfast.generation.generate import complete

    path, digest = layout.predictor_replies(), request.drawn_hash(loaded)
    if _is_of(run, path, digest):
        return pl.read_parquet(run.path / path)
    run.retire(path, OTHER)
    prompts = chat.render_prompts(loaded.tokenizer, people, request.texts)
    wanted = requests_for(prompts, request.replies, request.seed, layout.BASE)
    sampling = Sampling(1.0, 1.0, request.reply_tokens)
    backend = drawing.backend if drawing is not None else "auto"
    done = [
        one for some in complete(loaded, wanted, sampling, backend=backend, progress=progress) for one in some
    ]
    made = to_frame(loaded, prompts, wanted, done, behavior="", adapter=layout.BASE, source=None)
    run.add_shard(path, made, request=digest)
    return made


def _compared(
    loaded: Loaded,
    run: Run,
    request: Request,
    people: Sequence[Any],
    said: pl.DataFrame,
    progress: Progress | None,
) -> pl.DataFrame:
    """Sums along all replies: question, sample, of, persona, tokens, forward, backward, js; in shards of a question's
    replies."""
    import polars as pl

    plan = _plan(loaded, request, people, said)
    missing = [one for one in plan if not _is_of(run, one[0], one[1])]
    wanted = {path for path, *_ in plan}
    for path in run.shards(layout.divergences()):
        if path not in wanted or path in {one[0] for one in missing}:
            run.retire(path, OTHER)
    done = sum(len(rows) for path, _, rows, _ in plan if path not in {one[0] for one in missing})
    names, total = [one.name for one in people], sum(len(rows) for _, _, rows, _ in plan)
    with finishing("the shard in hand", bounded=True) as stop:
        for path, digest, rows, prompts in missing:
            if progress:
                progress(done * len(people), total * len(people), "scored replies")
            replies = [Reply(names.index(row["persona"]), row["token_ids"]) for row in rows]
            made = _shard(names, rows, divergences.along(loaded, prompts, replies))
            with stop.writing():
                run.add_shard(path, made, request=digest)
            done += len(rows)
            if stop():
                raise KeyboardInterrupt
    if progress:
        progress(total * len(people), total * len(people), "scored replies")
    return pl.concat([pl.read_parquet(run.path / path) for path, *_ in plan])


def _plan(
    loaded: Loaded, request: Request, people: Sequence[Any], said: pl.DataFrame
) -> list[tuple[str, str, list[dict[str, Any]], list[list[int]]]]:
    """(path, hash of what it follows from, its replies' rows, all personas' prompts to the question) of each shard."""
    grid = chat.render_grid(loaded.tokenizer, people, request.texts)
    q, found = len(request.texts), []
    common = [loaded.fingerprint, loaded.dtype, [one.name for one in people]]
    size = loaded.hidden_size * next(loaded.model.parameters()).element_size()
    for question in range(q):
        prompts = [list(grid[p * q + question]) for p in range(len(people))]
        asked = hash_of(*common, prompts)
        rows = list(said.filter(question=question).iter_rows(named=True))
        for span in divergences.blocks([len(row["token_ids"]) for row in rows], len(people), size):
            mine = rows[span]
            digest = hash_of(asked, [(r["persona"], r["sample"], r["token_ids"]) for r in mine])
            found.append((layout.shard(layout.divergences(), len(found)), digest, mine, prompts))
    return found


def _shard(names: Sequence[str], rows: Sequence[dict[str, Any]], sums: np.ndarray) -> pl.DataFrame:
    import polars as pl

    p, r = len(names), len(rows)
    return pl.DataFrame(
        {
            "question": np.repeat(np.array([row["question"] for row in rows], np.int32), p),
            "sample": np.repeat(np.array([row["sample"] for row in rows], np.int32), p),
            "of": [row["persona"] for row in rows for _ in range(p)],
            "persona": list(names) * r,
            "tokens": np.repeat(np.array([len(row["token_ids"]) for row in rows], np.int64), p),
            **{name: sums[:, :, k].reshape(-1) for k, name in enumerate(("forward", "backward", "js"))},
        }
    )


def _without_ends(loaded: Loaded, said: pl.DataFrame) -> dict[tuple[str, int], list[list[int]]]:
    """(persona, question) → token ids of its replies, without those that end them."""
    from leakfast.generation.transformers import stop_ids

    stops, found = frozenset(stop_ids(loaded)), {}
    for persona, question, ids in said.select("persona", "question", "token_ids").iter_rows():
        tokens = list(ids)
        while tokens and tokens[-1] in stops:
            tokens.pop()
        found.setdefault((persona, question), []).append(tokens)
    return found


def _known(
    loaded: Loaded, run: Run, request: Request, people: Sequence[Any], layers: Sequence[int]
) -> Centroids | None:
    """The run's own centroids, where they are of this model, these prompts and these layers: pairs and predictors then have
    the very same cosines."""
    path = layout.centroids()
    if not run.has(path):
        return None
    try:
        made = Centroids.load(run.path / path)
    except StoreError as error:
        log.warning("predictors: %s; centroids are computed", error)
        return None
    told, names = made.metadata, [one.name for one in people]
    same = told.get("model_fingerprint") == loaded.fingerprint and told.get("dtype") == loaded.dtype
    around = {key: told[key] for key in ("turns", "prefill") if told.get(key)}
    same &= told.get("questions") == request.texts and around == conversation.told(request.texts)
    same &= set(names) <= set(made.personas)
    same &= set(layers) <= set(made.layers) and not told.get("precision")
    same &= sorted(told.get("centered_on", ())) == sorted(set(request.centered_on()) & set(names))
    if same:
        mine = chat.prompt_hashes(loaded.tokenizer, people)
        theirs = told.get("prompt_hashes") or {}
        same = all(theirs.get(name) == digest for name, digest in mine.items())
    return made if same else None

"""Job 1: the mean last-prompt-token state of each persona at each layer, and cosines between them.
Demands a model the engine covers, or a file saved before (read without torch); leaves correlating to
stats/. Layer L is the output of decoder block L, 0-based, raw: before any final norm."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leakfast.errors import ModelError
from leakfast.geometry import CONVENTION, Centroids, centered_on, names_extras, parse_layers
from leakfast.progress import Progress

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.prompts.questions import QuestionSet

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 28  # states held at once


def compute(
    loaded: Loaded,
    personas: Sequence[Persona],
    questions: QuestionSet | Sequence[str],
    layers: str | int | Sequence[int] = "all",
    keep_questions: bool = False,
    *,
    center_extras: bool = False,
    precision: str | None = None,
    progress: Progress | None = None,
    **packed: Any,
) -> Centroids:
    """Centroids of P personas over Q questions: mean over questions of the state at the last prompt
    token (chat template with generation prompt), accumulated in float32 in a fixed order. Unless
    keep_questions asks for them, states are summed where the engine has them and never stored.

    center_extras: whether `qwen_default` and `no_persona`, if among the personas, join the mean that
    centered cosines subtract. precision: None, or "fp8" for linear layers in FP8 (see fp8.running); packed: budget_tokens
    of a batch, as forward.passes takes it. Raises InputError for a layer the model does not have, ModelError
    where a state is not finite or the model does not fit the engine."""
    from leakfast.forward import fp8
    from leakfast.prompts import chat

    asked = list(getattr(questions, "questions", questions))
    if not personas or not asked:
        raise ValueError("centroids need at least one persona and one question")
    layers = parse_layers(layers, loaded.n_layers, loaded.name)
    prompts = chat.render_prompts(loaded.tokenizer, personas, asked)
    _warn_of_twins(personas, prompts, len(asked))

    p, q = len(personas), len(asked)
    sequences = [prompt.ids for prompt in prompts]
    with fp8.running(loaded, precision, sequences, layers) as agreement:
        means, moments, kept = _measured(loaded, prompts, (p, q), layers, keep_questions, progress, packed)
    if progress:
        progress(p * q, p * q, "states")
    metadata = _metadata(loaded, personas, questions, asked, layers, prompts, center_extras)
    if agreement is not None:
        metadata |= {"precision": precision, "precision_agreement": str(agreement)}
    return Centroids([persona.name for persona in personas], layers, metadata, means, kept, moments)


def _measured(
    loaded: Loaded,
    prompts: Sequence[Any],
    shape: tuple[int, int],
    layers: list[int],
    keep_questions: bool,
    progress: Progress | None,
    packed: dict[str, Any],
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], dict[int, np.ndarray]]:
    """(means, moments, kept states) by layer, of prompts persona by persona; shape is (P, Q)."""
    import torch

    from leakfast.forward import ops, passes

    (p, q), d = shape, loaded.hidden_size
    means, moments = ({layer: np.empty((p, d), np.float32) for layer in layers} for _ in range(2))
    kept = {layer: np.empty((p, q, d), np.float32) for layer in layers} if keep_questions else {}

    def states_of(first: int, last: int) -> np.ndarray:
        """(·, layers, D) states of personas first…last-1, all finite."""
        some = prompts[first * q : last * q]
        shown = _shifted(progress, first * q, p * q)
        states = passes.last_token_states(
            loaded, [prompt.ids for prompt in some], layers, progress=shown, **packed
        )
        _check_finite(states, layers, some)
        return states

    if keep_questions:
        step = max(1, _CHUNK_BYTES // (q * len(layers) * d * 4))
        step = p if loaded.stream is not None else step  # blocks are read once a step
        for first in range(0, p, step):
            last = min(first + step, p)
            states = states_of(first, last)
            offsets = torch.arange(0, (last - first) * q + 1, q)
            for column, layer in enumerate(layers):
                rows = np.ascontiguousarray(states[:, column])
                means[layer][first:last] = ops.segment_means(torch.from_numpy(rows), offsets).numpy()
                kept[layer][first:last] = rows.reshape(last - first, q, d)
                moments[layer][first:last] = np.square(kept[layer][first:last]).mean(1)
    else:
        sums, squares = passes.last_token_sums(
            loaded,
            [prompt.ids for prompt in prompts],
            layers,
            np.repeat(np.arange(p), q),
            progress=_shifted(progress, 0, p * q),
            **packed,
        )
        for row in np.flatnonzero(~np.isfinite(sums).all((0, 2))):
            progress = None
            states_of(row, row + 1)  # finds the question
        for column, layer in enumerate(layers):
            np.divide(sums[column], np.float32(q), out=means[layer])
            np.divide(squares[column], np.float32(q), out=moments[layer])
    return means, moments, kept


def measure(
    model: Any,
    personas: Any = "all",
    questions: Any = "eval",
    layers: str | int | Sequence[int] = "all",
    *,
    adapter: str | Path | None = None,
    keep_questions: bool = False,
    precision: str | None = None,
    progress: Progress | None = None,
    **loading: Any,
) -> Centroids:
    """`compute` from names: everything that can be wrong is looked at before the weights are loaded. loading: dtype,
    revision, rendering and stream, as models.load takes them."""
    from leakfast import models
    from leakfast.prompts.personas import load_personas, load_questions

    people, asked = load_personas(personas), load_questions(questions)
    name = model if isinstance(model, str | Path) else "this model"
    wanted = parse_layers(
        layers, models.load_config(model, loading.get("revision")).num_hidden_layers, str(name)
    )
    if adapter is not None:
        models.adapter_hash(adapter)
    if precision is not None and isinstance(model, str | Path):
        import torch

        from leakfast.forward import fp8

        device = "cuda" if torch.cuda.is_available() else "cpu"
        fp8.check_precision(precision, device, loading.get("dtype", "bfloat16"))
    loaded = models.load(model, **loading)
    settings = {"center_extras": names_extras(personas, people), "precision": precision, "progress": progress}
    if adapter is None:
        return compute(loaded, people, asked, wanted, keep_questions, **settings)
    with models.with_adapter(loaded, adapter) as adapted:
        return compute(adapted, people, asked, wanted, keep_questions, **settings)


def _shifted(progress: Progress | None, start: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _, what: progress(start + done, total, what)


def _check_finite(states: np.ndarray, layers: list[int], prompts: Sequence[Any]) -> None:
    good = np.isfinite(states).all(axis=2)
    if not good.all():
        row, column = (int(i) for i in np.argwhere(~good)[0])
        raise ModelError(
            f"centroids: the state of persona {prompts[row].persona} at layer {layers[column]} is not finite "
            f"(question {prompts[row].question_index}). Needed: numbers. Use --dtype float32; if that does "
            "not help, the weights or the adapter are broken."
        )


def _warn_of_twins(personas: Sequence[Persona], prompts: Sequence[Any], q: int) -> None:
    groups: dict[tuple[int, ...], list[str]] = {}
    for row, persona in enumerate(personas):
        groups.setdefault(tuple(prompts[row * q].ids), []).append(persona.name)
    for names in groups.values():
        if len(names) > 1:
            log.warning(
                "centroids: %s render to the same tokens, so their centroids are equal", ", ".join(names)
            )


def _metadata(
    loaded: Loaded,
    personas: Sequence[Persona],
    questions: Any,
    asked: list[str],
    layers: list[int],
    prompts: Sequence[Any],
    center_extras: bool,
) -> dict[str, Any]:
    import torch
    import transformers

    from leakfast.prompts import chat
    from leakfast.prompts.conversation import told
    from leakfast.version import __version__

    q = len(asked)
    rendered = [
        chat.ids_hash(
            token for prompt in prompts[row * q : (row + 1) * q] for token in (len(prompt.ids), *prompt.ids)
        )
        for row in range(len(personas))
    ]
    return {
        "kind": "leakfast centroids",
        "layer_convention": CONVENTION,
        "layers": layers,
        "n_layers": loaded.n_layers,
        "hidden_size": loaded.hidden_size,
        "model": loaded.name,
        "model_fingerprint": loaded.fingerprint,
        "model_revision": loaded.revision,
        "adapter_hash": loaded.adapter_hash,
        "dtype": loaded.dtype,
        "accumulation_dtype": "float32",
        "template_hash": chat.template_hash(loaded.tokenizer),
        **({"rendering": rendering} if (rendering := chat.recorded(loaded.tokenizer)) else {}),
        "personas": [persona.name for persona in personas],
        "systems": [persona.kind for persona in personas],
        "rendered_ids_hashes": rendered,
        "prompt_hashes": chat.prompt_hashes(loaded.tokenizer, personas),
        "centered_on": centered_on(personas, center_extras),
        "question_set": getattr(questions, "name", "list"),
        "questions": asked,
        **told(asked),
        "versions": {
            "leakfast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }

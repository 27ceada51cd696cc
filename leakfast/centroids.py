"""Job 1: the mean last-prompt-token state of each persona at each layer, and cosines between them.
Demands a model the engine covers, or a file saved before (read without torch); leaves correlating to
stats/. Layer L is the output of decoder block L, 0-based, raw: before any final norm."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from leakfast.errors import ModelError, StoreError
from leakfast.geometry import parse_layers

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.prompts.questions import QuestionSet

log = logging.getLogger(__name__)

CONVENTION = "layer L = output of decoder block L, 0-based, raw (before the final norm)"
_AS_JSON = {
    "layers", "n_layers", "hidden_size", "personas", "systems", "rendered_ids_hashes", "prompt_hashes", "centered_on",
    "questions", "rendering", "versions",
}  # fmt: skip
_HASH = "sha256"  # key of the file's metadata that holds the hash of all else
_CHUNK_BYTES = 1 << 28  # states held at once


@dataclass
class Centroids:
    """P personas × D dimensions per layer, float32. `metadata` says what they are centroids of;
    `questions` holds (P, Q, D) per layer where they were kept, else nothing. `moments` holds the mean of
    the squared states per layer, (P, D): moments − means² is their variance over the questions; it is
    there after computing and is not written to files."""

    personas: list[str]
    layers: list[int]
    metadata: dict[str, Any]
    means: dict[int, np.ndarray] = field(repr=False)
    questions: dict[int, np.ndarray] = field(default_factory=dict, repr=False)
    moments: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def layer(self, layer: int) -> np.ndarray:
        """(P, D) float32 centroids at a layer, personas in order. Raises ValueError if it is not there."""
        if layer not in self.means:
            raise ValueError(f"layer {layer} was not computed; there are {self.layers}")
        return self.means[layer]

    def cosine(self, layer: int, kind: Literal["centered", "raw"] = "centered") -> np.ndarray:
        """(P, P) float64 cosines: rows of C (centered: less the mean centroid), L2-normalised, C·Cᵀ.

        The mean is over the personas of `metadata["centered_on"]`: all but the extras, unless those
        were named. A centroid of length 0 has no direction: its cosines are NaN.
        Raises ValueError for another kind, or for "centered" with fewer than two personas to average."""
        c = self.layer(layer).astype(np.float64)
        if kind == "centered":
            rows = [self.personas.index(name) for name in self.metadata["centered_on"]]
            if len(rows) < 2:
                raise ValueError("a centered cosine needs at least two personas in the mean; use kind='raw'")
            c = c - c[rows].mean(0)
        elif kind != "raw":
            raise ValueError(f"kind must be 'centered' or 'raw', not {kind!r}")
        length = np.linalg.norm(c, axis=1, keepdims=True)
        c = np.divide(c, length, out=np.full_like(c, np.nan), where=length > 0)
        return np.clip(c @ c.T, -1.0, 1.0)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: tensors `layer.<L>` (P, D) and, where kept, `questions.layer.<L>`
        (P, Q, D), with the metadata as JSON strings. The same centroids give the same bytes."""
        from safetensors.numpy import save

        from leakfast.storage.disk import atomic_write

        tensors = {f"layer.{layer}": np.ascontiguousarray(self.means[layer]) for layer in self.layers}
        tensors |= {f"questions.layer.{k}": np.ascontiguousarray(v) for k, v in self.questions.items()}
        metadata = {key: _to_text(key, value) for key, value in self.metadata.items()}
        metadata[_HASH] = _hash(tensors, metadata)
        atomic_write(path, _fixed_order(save(tensors, metadata)))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Centroids:
        """Read what `save` wrote. Raises StoreError, with the remedy, for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                texts = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            kept = texts.pop(_HASH, None)  # files of earlier versions have none
            if kept is not None and kept != _hash(tensors, texts):
                raise ValueError("its bytes do not match their hash")
            metadata = {key: _from_text(key, text) for key, text in texts.items()}
            personas, layers = metadata["personas"], metadata["layers"]
            return cls(
                personas=personas,
                layers=layers,
                metadata=metadata,
                means={layer: tensors[f"layer.{layer}"] for layer in layers},
                questions={n: tensors[k] for n in layers if (k := f"questions.layer.{n}") in tensors},
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StoreError(
                f"centroids: {path} cannot be read ({error}). Needed: a file made by leakfast. "
                f"Type: leakfast centroids --out {path}"
            ) from error


def compute(
    loaded: Loaded,
    personas: Sequence[Persona],
    questions: QuestionSet | Sequence[str],
    layers: str | int | Sequence[int] = "all",
    keep_questions: bool = False,
    *,
    center_extras: bool = False,
    precision: str | None = None,
    budget_tokens: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Centroids:
    """Centroids of P personas over Q questions: mean over questions of the state at the last prompt
    token (chat template with generation prompt), accumulated in float32 in a fixed order. Unless
    keep_questions asks for them, states are summed where the engine has them and never stored.

    center_extras: whether `qwen_default` and `no_persona`, if among the personas, join the mean that
    centered cosines subtract. precision: None, or "fp8" for linear layers in FP8 (see
    fp8.running). Raises InputError for a layer the model does not have, ModelError
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
        means, moments, kept = _measured(
            loaded, prompts, (p, q), layers, keep_questions, budget_tokens, progress
        )
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
    budget_tokens: int | None,
    progress: Callable[[int, int, str], None] | None,
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
            loaded, [prompt.ids for prompt in some], layers, budget_tokens=budget_tokens, progress=shown
        )
        _check_finite(states, layers, some)
        return states

    if keep_questions:
        step = max(1, _CHUNK_BYTES // (q * len(layers) * d * 4))
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
            budget_tokens=budget_tokens,
            progress=_shifted(progress, 0, p * q),
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
    dtype: str = "bfloat16",
    revision: str | None = None,
    keep_questions: bool = False,
    precision: str | None = None,
    rendering: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Centroids:
    """`compute` from names: everything that can be wrong is looked at before the weights are loaded."""
    from leakfast import models
    from leakfast.prompts.personas import load_personas, load_questions

    people, asked = load_personas(personas), load_questions(questions)
    name = model if isinstance(model, str | Path) else "this model"
    wanted = parse_layers(layers, models.load_config(model, revision).num_hidden_layers, str(name))
    if adapter is not None:
        models.adapter_hash(adapter)
    if precision is not None and isinstance(model, str | Path):
        import torch

        from leakfast.forward import fp8

        fp8.check_precision(precision, "cuda" if torch.cuda.is_available() else "cpu", dtype)
    loaded = models.load(model, dtype=dtype, revision=revision, rendering=rendering)
    settings = {
        "center_extras": names_extras(personas, people),
        "precision": precision,
        "progress": progress,
    }
    if adapter is None:
        return compute(loaded, people, asked, wanted, keep_questions, **settings)
    with models.with_adapter(loaded, adapter) as adapted:
        return compute(adapted, people, asked, wanted, keep_questions, **settings)


def names_extras(spec: Any, personas: Sequence[Persona]) -> bool:
    """Whether a persona spec names an extra word for word, rather than bringing it along in a file."""
    words = spec.split(",") if isinstance(spec, str) else spec if isinstance(spec, Sequence) else ()
    named = {word.strip() for word in words if isinstance(word, str)}
    return any(persona.is_extra and persona.name in named for persona in personas)


def _shifted(
    progress: Callable[[int, int, str], None] | None, start: int, total: int
) -> Callable[[int, int, str], None] | None:
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
        "centered_on": [persona.name for persona in personas if center_extras or not persona.is_extra],
        "question_set": getattr(questions, "name", "list"),
        "questions": asked,
        "versions": {
            "leakfast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _to_text(key: str, value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if key in _AS_JSON else value or ""


def _from_text(key: str, text: str) -> Any:
    return json.loads(text) if key in _AS_JSON else text or None


def _hash(tensors: dict[str, np.ndarray], texts: dict[str, str]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the tensors, and the metadata."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def _fixed_order(data: bytes) -> bytes:
    """The same safetensors file with its header's keys sorted: the library's order changes by chance."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]

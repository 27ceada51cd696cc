"""Centroids as a value: a matrix of personas a layer, cosines between them, the file they are kept in; and which decoder
blocks are meant by `all`, `0-5`, `10,15,20`, counted from 0. Demands numpy; computes no state."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from leakfast.errors import InputError, StoreError
from leakfast.prompts.personas import Persona

CONVENTION = "layer L = output of decoder block L, 0-based, raw (before the final norm)"
AGAIN = "Run the study, which computes them first: leakfast run STUDY"
_HASH = "sha256"  # key of the file's metadata that holds the hash of all else
_AS_JSON = {
    "layers",
    "n_layers",
    "hidden_size",
    "personas",
    "systems",
    "rendered_ids_hashes",
    "prompt_hashes",
    "centered_on",
    "questions",
    "turns",
    "rendering",
    "versions",
}
_NAMED = 3  # personas that a message names
_SPAN = re.compile(r"(\d+)(?:\s*[-–]\s*(\d+))?")


def parse_layers(spec: str | int | Sequence[int], n_layers: int, name: str = "this model") -> list[int]:
    """Decoder blocks, 0-based, each once, in the order given: "all", "0,2,4", "0-5", "0-2,5", an int
    or a list of ints. Raises InputError for what is no layer or not in 0…n_layers-1."""
    remedy = f"Use --layers 0-{n_layers - 1} or --layers all."
    if isinstance(spec, str):
        if spec.strip().lower() == "all":
            return list(range(n_layers))
        asked: list[int] = []
        for word in filter(None, (part.strip() for part in spec.split(","))):
            span = _SPAN.fullmatch(word)
            if not span or (span[2] and int(span[2]) < int(span[1])):
                raise InputError(f"centroids: {word!r} is no layer, but layers are numbers from 0. {remedy}")
            top = int(span[2] or span[1])
            if top >= n_layers:
                raise _no_such_layer(top, n_layers, name, remedy)
            asked += range(int(span[1]), top + 1)
    else:
        asked = [spec] if isinstance(spec, int) else list(spec)
    if not asked:
        raise InputError(f"centroids: no layer asked, at least one is needed. {remedy}")
    for layer in asked:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise InputError(f"centroids: {layer!r} is no layer, but layers are numbers from 0. {remedy}")
        if not 0 <= layer < n_layers:
            raise _no_such_layer(layer, n_layers, name, remedy)
    return list(dict.fromkeys(int(layer) for layer in asked))


def _no_such_layer(layer: int, n_layers: int, name: str, remedy: str) -> InputError:
    return InputError(f"centroids: layer {layer} asked, but {name} has blocks 0–{n_layers - 1}. {remedy}")


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
        were named; one that is not finite is left out of it (`broken` names them). Such a centroid, and one of length 0,
        has no direction: its cosines are NaN, those of the others are not.
        Raises ValueError for another kind, or for "centered" with fewer than two personas to average."""
        c = self.layer(layer).astype(np.float64)
        if kind == "centered":
            rows = self._finite_rows(c)
            if len(rows) < 2:
                raise ValueError("a centered cosine needs at least two personas in the mean; use kind='raw'")
            c = c - c[rows].mean(0)
        elif kind != "raw":
            raise ValueError(f"kind must be 'centered' or 'raw', not {kind!r}")
        length = np.linalg.norm(c, axis=1, keepdims=True)
        c = np.divide(c, length, out=np.full_like(c, np.nan), where=(length > 0) & np.isfinite(length))
        return np.clip(c @ c.T, -1.0, 1.0)

    def _finite_rows(self, values: np.ndarray) -> list[int]:
        """Rows of the personas that the mean is over, but those with a value that is not finite."""
        rows = [self.personas.index(name) for name in self.metadata["centered_on"]]
        return [row for row in rows if np.isfinite(values[row]).all()]

    def broken(self) -> dict[str, list[int]]:
        """Persona → the layers at which its centroid holds NaN or infinity; empty where none does."""
        found: dict[str, list[int]] = {}
        for layer in self.layers:
            for row in np.flatnonzero(~np.isfinite(self.means[layer]).all(axis=1)):
                found.setdefault(self.personas[row], []).append(layer)
        return found

    def other_prompts(self, prompts: Mapping[str, str]) -> list[str]:
        """Those of `prompts` (persona → hash, of chat.prompt_hashes, which the template and a persona's place are in) that were
        other ones when these were made. Personas that are not here are not looked at, and what published files and earlier
        versions do not tell passes."""
        theirs = self.metadata.get("prompt_hashes") or {}
        return [name for name, mine in prompts.items() if theirs.get(name, mine) != mine]

    def not_of(self, fingerprint: str, prompts: Mapping[str, str]) -> str | None:
        """Why these are no centroids of the unadapted model of that fingerprint under those prompts (`other_prompts`), in words;
        None where they are."""
        told = self.metadata
        if adapter := told.get("adapter_hash"):
            return f"is of an adapter ({adapter[:12]}…)"
        if (model := told.get("model_fingerprint")) and model != fingerprint:
            return f"is of another model ({model[:18]}…)"
        if differ := self.other_prompts(prompts):
            more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
            return f"was made when {', '.join(differ[:_NAMED])}{more} had another prompt, or was rendered otherwise"
        return None

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


def unadapted(path: Path, fingerprint: str, prompts: Mapping[str, str], asked: str) -> Centroids:
    """A run's centroids that a training rests on, which are to be of the unadapted model of that fingerprint under those prompts
    (`not_of`). asked: what they are needed for, as a message begins. Raises InputError where they are not, or are not there."""
    needed = f"Needed: centroids of the unadapted model under the prompts that are trained on. {AGAIN}"
    if not path.is_file():
        raise InputError(f"{asked}, but there is no {path}. {needed}")
    found = Centroids.load(path)
    if why := found.not_of(fingerprint, prompts):
        raise InputError(f"{asked}, but {path} {why}. {needed}")
    return found


def names_extras(spec: Any, personas: Sequence[Persona]) -> bool:
    """Whether a persona spec names an extra word for word, rather than bringing it along in a file."""
    words = spec.split(",") if isinstance(spec, str) else spec if isinstance(spec, Sequence) else ()
    named = {word.strip() for word in words if isinstance(word, str)}
    return any(persona.is_extra and persona.name in named for persona in personas)


def centered_on(personas: Sequence[Persona], extras: bool) -> list[str]:
    """The names in the mean that centered cosines subtract: all but the extras, unless those were named (`names_extras`)."""
    return [persona.name for persona in personas if extras or not persona.is_extra]


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

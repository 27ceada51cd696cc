"""Directions as a value: one vector a layer, what it was made of, and the file it is kept in. Demands centroids, or vectors
that are given; runs no model. Layer L is the output of decoder block L, from 0: Hugging Face's hidden_states[L+1]."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from leakfast.errors import InputError
from leakfast.storage.documents import did_you_mean
from leakfast.storage.seeds import derive_seed

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.models.loading import Loaded

Kind = Literal["source-mean", "contrast", "difference", "random", "file"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LAYER = "layer."
_TEXTS = ("kind", "source", "against", "fingerprint", "residual_norms", "centroids", "seed")
_HASH = "sha256"


@dataclass(frozen=True, eq=False)
class Directions:
    """A vector a layer, of one model; equal to itself alone.

    vectors: layer → (D,) float32. kind: one of KINDS. source, against: the personas it was made of. fingerprint: of the
    model whose residual stream it lies in. residual_norms: layer → mean length of the personas' centroids there (a unit
    of strength), empty where nothing is known of it. centroids: hash of those it was made of. seed: of a random one."""

    vectors: Mapping[int, np.ndarray] = field(repr=False)
    kind: Kind
    fingerprint: str
    source: str | None = None
    against: tuple[str, ...] = ()
    residual_norms: Mapping[int, float] = field(default_factory=dict)
    centroids: str | None = None
    seed: int | None = None

    @property
    def layers(self) -> list[int]:
        return sorted(self.vectors)

    @property
    def norms(self) -> dict[int, float]:
        """Layer → length of the vector."""
        return {layer: float(np.linalg.norm(self.vectors[layer].astype(np.float64))) for layer in self.layers}

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the vectors and all that is said of them."""
        digest = hashlib.sha256(json.dumps(self._texts(), sort_keys=True).encode())
        for layer in self.layers:
            digest.update(f"{layer}\0".encode() + np.ascontiguousarray(self.vectors[layer]).tobytes())
        return digest.hexdigest()

    def _texts(self) -> dict[str, str]:
        told = {name: getattr(self, name) for name in _TEXTS}
        told["residual_norms"] = {str(k): v for k, v in sorted(self.residual_norms.items())}
        return {name: json.dumps(value, ensure_ascii=False) for name, value in told.items()}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: tensors `layer.<L>` (D,) float32, the rest as JSON strings beside them, `norms` and
        the hash of it all too."""
        from safetensors.numpy import save

        from leakfast.storage.disk import atomic_write

        tensors = {f"{_LAYER}{n}": np.ascontiguousarray(self.vectors[n]) for n in self.layers}
        told = {"norms": json.dumps({str(n): v for n, v in self.norms.items()}), _HASH: self.digest}
        atomic_write(path, save(tensors, {**self._texts(), **told}))
        return Path(path)


def load(path: str | Path, fingerprint: str | None = None) -> Directions:
    """Read what `save` wrote. fingerprint: of the model that vectors of others' making, `layer.<L>` of shape (D,) without
    a word beside them, are for; None refuses those. Raises InputError for a file that is none, or not as it was written."""
    from safetensors import SafetensorError, safe_open

    needed = "Needed: a file of `leakfast directions`, or safetensors of `layer.<L>`, each of shape (d,)."
    try:
        with safe_open(str(path), framework="np") as file:
            texts = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"directions: {path} cannot be read ({error}). {needed}") from error
    except TypeError as error:  # a dtype that numpy does not have
        raise InputError(
            f"directions: {path} holds a dtype that cannot be read ({error}). Store float32."
        ) from error
    vectors = {}
    for key, value in tensors.items():
        number = key.removeprefix(_LAYER)
        if not key.startswith(_LAYER) or not number.isdigit() or value.ndim != 1:
            raise InputError(f"directions: {path} holds {key} of shape {value.shape}. {needed}")
        vectors[int(number)] = value
    if not vectors:
        raise InputError(f"directions: {path} holds no vector. {needed}")
    if _HASH not in texts:
        if fingerprint is None:
            raise InputError(
                f"directions: {path} does not say which model it is of. Stamp it first: leakfast directions --kind file "
                f"--like {path} --model MODEL --out FILE"
            )
        return Directions(
            {k: _sound(v, f"{path}, layer {k}") for k, v in vectors.items()}, "file", fingerprint
        )
    told = {name: json.loads(texts[name]) for name in _TEXTS if name in texts}
    told["residual_norms"] = {int(k): v for k, v in told.get("residual_norms", {}).items()}
    told["against"] = tuple(told.get("against", ()))
    found = Directions(vectors, **told)
    if found.digest != texts[_HASH]:
        raise InputError(
            f"directions: {path} is not as it was written (its hash differs). Make it again: leakfast directions "
            f"--kind {found.kind} --out {path}"
        )
    return found


def _sound(vector: np.ndarray, where: str) -> np.ndarray:
    """float32, finite and longer than 0. Raises InputError."""
    made = np.ascontiguousarray(vector, np.float32)
    if not np.isfinite(made).all() or not made.any():
        what = "is all zeros" if np.isfinite(made).all() else "holds NaN or infinity"
        raise InputError(f"directions: {where} {what}, so it points nowhere. Give another direction.")
    return made


def check_named(kind: Kind, source: str, against: Sequence[str], personas: Sequence[str]) -> None:
    """A direction of that kind can be made of centroids of `personas`. Raises InputError for one that is none of them, for
    none or several to differ from, and for a source that is set against itself."""
    if kind not in ("source-mean", "contrast", "difference"):
        raise ValueError(f"kind must be source-mean, contrast or difference, not {kind!r}")
    named = list(dict.fromkeys(against))
    for name in (source, *named):
        if name not in personas:
            raise InputError(
                f"directions: {name} is none of the {len(personas)} personas there are centroids of."
                f"{did_you_mean(name, personas)} Use --personas with that one among them."
            )
    if kind == "difference" and len(named) != 1:
        raise InputError(
            f"directions: a difference is of two personas, and --against names {len(named)}. Give one: --against assistant"
        )
    if kind == "source-mean" and named:
        raise InputError("directions: --against given, but source-mean has none. Use --kind contrast.")
    if source in named:
        raise InputError(
            f"directions: {source} is set against itself. Give another persona: --against assistant"
        )


def of_centroids(
    made: Centroids, kind: Kind, source: str, against: Sequence[str] = (), layers: Sequence[int] | None = None
) -> Directions:
    """A direction at each layer, from (P, D) centroids c at it; M: the personas that a centered cosine's mean is over.

        source-mean   c_source − mean of c over M
        contrast      c_source − mean of c over `against` (none named: M without the source)
        difference    c_source − c_against

    A contrast with all others is source-mean, |M|/(|M| − 1) times as long, where the source is one of M: name some of
    them for another direction. A centroid that is not finite is left out of M, as of the cosines' mean, and of the mean
    length. Raises InputError as `check_named`, and for a direction of length 0."""
    check_named(kind, source, against, made.personas)
    named = list(dict.fromkeys(against))
    others = named or [name for name in made.metadata["centered_on"] if kind != "contrast" or name != source]
    vectors, lengths = {}, {}
    rows = [made.personas.index(name) for name in others]
    for layer in layers if layers is not None else made.layers:
        c = made.layer(layer).astype(np.float64)
        whole = np.isfinite(c).all(axis=1)
        mean = c[rows if named else [row for row in rows if whole[row]]].mean(0)
        vectors[layer] = _sound(c[made.personas.index(source)] - mean, f"{kind} of {source} at layer {layer}")
        lengths[layer] = float(np.linalg.norm(c[whole], axis=1).mean())
    return Directions(
        vectors,
        kind,
        str(made.metadata["model_fingerprint"]),
        source,
        tuple(named),
        lengths,
        _hash_of(made, list(vectors)),
    )


def _hash_of(made: Centroids, layers: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(np.ascontiguousarray(made.layer(layer)).tobytes())
    return digest.hexdigest()


def random_like(like: Directions, seed: int) -> Directions:
    """A direction of the same length at each layer of `like`, drawn uniformly from the sphere: the control of what any
    push of that length does. The same seed gives the same vectors; each layer has its own draw."""
    vectors = {}
    for layer in like.layers:
        draw = np.random.default_rng(derive_seed("direction", seed, layer))
        drawn = draw.standard_normal(like.vectors[layer].shape[0])
        vectors[layer] = (drawn * (like.norms[layer] / np.linalg.norm(drawn))).astype(np.float32)
    return Directions(
        vectors,
        "random",
        like.fingerprint,
        like.source,
        like.against,
        like.residual_norms,
        like.centroids,
        seed,
    )


def check_fits(given: Directions, loaded: Loaded, where: str = "the direction") -> None:
    """Raises InputError for a direction of another model, of another width, or at a layer that the model does not have."""
    remedy = f"Make one of this model: leakfast directions --model {loaded.name} --out FILE"
    for layer in given.layers:
        width = given.vectors[layer].shape[0]
        if width != loaded.hidden_size:
            raise InputError(
                f"directions: {where} is {width} wide at layer {layer}, but {loaded.name} is {loaded.hidden_size} wide. "
                f"{remedy}"
            )
        if layer >= loaded.n_layers:
            raise InputError(
                f"directions: {where} is of layer {layer}, but {loaded.name} has blocks 0–{loaded.n_layers - 1}. {remedy}"
            )
    if given.fingerprint != loaded.fingerprint:
        raise InputError(
            f"directions: {where} is of another model ({given.fingerprint[:20]}…) than {loaded.name} "
            f"({loaded.fingerprint[:20]}…). {remedy}"
        )


def described(given: Directions) -> dict[str, Any]:
    """What a run keeps of a direction beside what was measured under it."""
    return {
        "kind": given.kind,
        "direction_source": given.source,
        "against": list(given.against),
        "norms": {str(layer): length for layer, length in given.norms.items()},
        "residual_norms": {str(layer): length for layer, length in given.residual_norms.items()},
        "direction_sha256": given.digest,
    }

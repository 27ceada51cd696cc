"""What two system prompts have in common as texts: words, edits, lengths, relation, and the mean of their tokens' input
embeddings. Demands personas and a loaded model's tokenizer and embeddings; runs no layer of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from leakfast.geometry import Centroids
from leakfast.measure.predictors.frame import Told
from leakfast.stats import confounds, edits
from leakfast.stats.people import People

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona

NO_TEXT = "a persona without a system prompt of its own"
NO_RELATION = "no related_to is given of the bystander"


def predictors(loaded: Loaded, personas: Sequence[Persona], centered_on: Sequence[str]) -> list[Told]:
    """The predictors of family `text`, (P, P) float64 each, NaN where one of the two has no system prompt of its own.

    jaccard: shared content words over all content words of the two; shared_word: 1 if any; edit_distance: Levenshtein's,
    of code points, over the longer text; token_length_difference: |tokens of one − tokens of the other|, system prompt
    alone; prompt_tokens: the persona's own, which is no closeness and is there to be controlled for; relation: 1 where the
    bystander's related_to names the source, NaN of a bystander without one; embedding_similarity: cosine of the means of the
    input embeddings of the prompts' tokens, less the mean over `centered_on`: a bag of tokens without order, of the
    unadapted model itself."""
    texts = [one.prompt or "" for one in personas]
    lacks = {one.name: NO_TEXT for one, text in zip(personas, texts, strict=True) if not text}
    known = np.array([bool(text) for text in texts])
    both = known[:, None] & known[None, :]

    def told(
        name: str,
        values: np.ndarray,
        orientation: int,
        unit: str,
        seen: np.ndarray = both,
        otherwise: str = "no content words to compare",
    ) -> Told:
        values = np.where(seen, values.astype(np.float64), np.nan)
        return Told(name, "text", values, orientation, unit, lacks=lacks, otherwise=otherwise)

    jaccard, shared = _words(personas)
    ids = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    lengths = np.array([len(one) for one in ids], np.float64)
    distance = np.stack([edits.normalized(text, texts) for text in texts])
    relation = np.array([[source.name in one.related_to for one in personas] for source in personas])
    given = np.array([bool(one.related_to) for one in personas])
    own = np.broadcast_to(lengths[None, :], both.shape)
    return [
        told("jaccard", jaccard, 1, "share of content words"),
        told("shared_word", shared, 1, "0 or 1"),
        told("edit_distance", distance, -1, "share of the longer text"),
        told("token_length_difference", np.abs(lengths[:, None] - lengths[None, :]), -1, "tokens"),
        told("prompt_tokens", own, 1, "tokens", np.broadcast_to(known[None, :], both.shape)),
        told("relation", relation, 1, "0 or 1", np.broadcast_to(given[None, :], both.shape), NO_RELATION),
        told("embedding_similarity", _embedded(loaded, personas, ids, centered_on), 1, "cosine"),
    ]


def _words(personas: Sequence[Persona]) -> tuple[np.ndarray, np.ndarray]:
    """(P, P) shared over all content words, and whether any is shared; NaN where one has none."""
    people = People({}, prompts={one.name: one.prompt or "" for one in personas})
    bags, _ = confounds.words(people)
    jaccard = np.full((len(personas), len(personas)), np.nan)
    shared = jaccard.copy()
    for i, one in enumerate(personas):
        for j, other in enumerate(personas):
            a, b = bags[one.name], bags[other.name]
            if a and b:
                jaccard[i, j], shared[i, j] = len(a & b) / len(a | b), float(bool(a & b))
    return jaccard, shared


def _embedded(
    loaded: Loaded, personas: Sequence[Persona], ids: list[list[int]], centered_on: Sequence[str]
) -> np.ndarray:
    import torch

    weight = loaded.model.get_input_embeddings().weight.detach()
    means = np.full((len(ids), weight.shape[1]), np.nan, np.float32)
    for place, one in enumerate(ids):
        if one:
            rows = torch.tensor(one)
            if loaded.stream is not None:
                found = loaded.stream.embedding_rows(rows)
            else:
                found = weight.index_select(0, rows.to(weight.device))
            means[place] = found.float().mean(0).cpu().numpy()
    return centered(
        Centroids([p.name for p in personas], [0], {"centered_on": list(centered_on)}, {0: means}), 0
    )


def centered(made: Centroids, layer: int) -> np.ndarray:
    """(P, P) centered cosines; all NaN where fewer than two personas are there to center on."""
    there = np.isfinite(made.layer(layer)).all(axis=1)
    if sum(there[made.personas.index(name)] for name in made.metadata["centered_on"]) < 2:
        return np.full((len(there), len(there)), np.nan)
    return made.cosine(layer)

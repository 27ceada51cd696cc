"""The steering that a training asks for: its direction, made of the run's centroids of the unadapted model and kept in the run.
Demands those centroids where the direction is of them; leaves the training to leakfast.train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from leakfast.geometry import unadapted
from leakfast.pipeline.steering import check_layers
from leakfast.prompts import chat
from leakfast.steering import directions
from leakfast.steering.arms import Arm
from leakfast.storage import layout
from leakfast.storage.documents import find_shipped
from leakfast.train.steer import Steer

if TYPE_CHECKING:
    from leakfast.models.loading import Loaded
    from leakfast.prompts.personas import Persona
    from leakfast.steering.directions import Directions
    from leakfast.storage.run import Run
    from leakfast.study.config import TrainSteeringConfig


def steer_of(
    loaded: Loaded,
    run: Run,
    behavior: str,
    cfg: TrainSteeringConfig | None,
    source: str,
    personas: Sequence[Persona],
) -> Steer | None:
    """What is done to the model while an adapter of `behavior` is trained into `source`, one of these personas; None where
    nothing is. The direction is kept as directions/training+<behavior>-<source>.safetensors.

    Raises InputError without centroids of this model under these prompts, for a layer or a persona that they have not, and
    for a direction that does not fit the model."""
    if cfg is None:
        return None
    made = _direction(loaded, run, behavior, cfg, cfg.source or source, personas)
    directions.check_fits(made, loaded, f"the direction of {behavior}'s training")
    run.add_file(layout.training_direction(behavior, source), made.save)
    return Steer.along(Arm(cfg.kind, made, cfg.mode, cfg.strength, cfg.unit, tuple(cfg.layers)))


def _direction(
    loaded: Loaded,
    run: Run,
    behavior: str,
    cfg: TrainSteeringConfig,
    source: str,
    personas: Sequence[Persona],
) -> Directions:
    if cfg.kind == "file":
        return directions.load(find_shipped(str(cfg.file)), loaded.fingerprint)
    path, hashes = run.path / layout.centroids(), chat.prompt_hashes(loaded.tokenizer, personas)
    asked = f"train: {behavior} is to be trained under steering"
    centroids = unadapted(path, loaded.fingerprint, hashes, asked)
    check_layers(centroids, cfg.layers, f"the training of {behavior}", run.path)
    kind = cfg.like if cfg.like is not None else cfg.kind
    made = directions.of_centroids(centroids, kind, source, cfg.against, cfg.layers)
    return directions.random_like(made, cfg.seed) if cfg.kind == "random" else made

"""The steering of a study: directions from the run's centroids, kept in the run, and every adapter measured again under each
arm. Demands centroids, adapters, and what was measured without steering; leaves the dose-response to stats.steering."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.errors import InputError
from leakfast.measure import Drawing, Request
from leakfast.measure.request import Asked, asked_of
from leakfast.models.adapters import read_card
from leakfast.pipeline import asks
from leakfast.prompts.personas import load_personas
from leakfast.storage import layout
from leakfast.storage.documents import find_shipped

if TYPE_CHECKING:
    from leakfast.geometry import Centroids
    from leakfast.models.loading import Loaded
    from leakfast.pipeline.steps import Steps
    from leakfast.prompts.personas import Persona
    from leakfast.steering.directions import Directions
    from leakfast.storage.run import Run
    from leakfast.study.config import Study
    from leakfast.study.steering import SteeringConfig


class Steering:
    """All tables [[steering]] of a study, carried out on a run."""

    def __init__(self, study: Study, run: Run, loaded: Loaded, personas: Sequence[Persona]) -> None:
        from leakfast.geometry import Centroids

        self.study, self.run, self.loaded, self.personas = study, run, loaded, personas
        self.centroids: Centroids = Centroids.load(run.path / layout.centroids())

    def all(
        self,
        steps: Steps,
        adapters: dict[str, list[tuple[Path, int]]],
        behaviors: Sequence[str],
        *,
        base: bool = True,
    ) -> None:
        """Every table on every adapter of its behaviors, and on the base (if the table asks for it, and base says so): what
        `behaviors` of them measure. What is there already is kept. Raises InputError for a direction that cannot be
        made."""
        from leakfast.measure.steered import measure_steered

        for table in self.study.steering:
            steered: list[Path | None] = [a for b in table.of or adapters for a, _ in adapters.get(b, [])]
            for adapter in [*steered, *[None] * (table.base and base)]:
                request = self.request(table, adapter, behaviors)
                if not request.asked:
                    continue
                name = layout.BASE if adapter is None else adapter.name
                with steps.timed(f"steer {name} along {table.name}") as report:
                    measure_steered(self.loaded, self.run, request, Drawing.of(self.study), progress=report)

    def request(self, table: SteeringConfig, adapter: Path | None, behaviors: Sequence[str]) -> Request:
        """What is measured of an adapter (None: the base) under the arms of a table."""
        from leakfast.steering.arms import arms_of

        card = None if adapter is None else read_card(adapter)
        source = self._source(table, None if card is None else card.source)
        arms = arms_of(
            table.name,
            self.direction(table, source),
            table.mode,
            table.strengths,
            unit=table.unit,
            layers=tuple(table.layers),
        )
        of_adapter = card.behavior if card is not None else None
        asked = [
            one
            for b in behaviors
            if of_adapter is None or of_adapter in asks.measured_on(self.study, b)
            for one in self._asked(table, b)
        ]
        people = load_personas(table.personas, among=self.personas)
        own = [source] if card is None or card.source is None else [card.source]
        people += [p for p in load_personas([s for s in own if s], among=self.personas) if p not in people]
        seed = self.study.seeds[0] if card is None or card.seed is None else card.seed
        chosen = [] if adapter is None else [adapter]
        return Request(asked, people, chosen, adapter is None, seed, arms=arms)

    def _source(self, table: SteeringConfig, own: str | None) -> str:
        like = next((t for t in self.study.steering if t.name == table.like), table)
        return table.source or like.source or own or self.study.sources[0]

    def _asked(self, table: SteeringConfig, behavior: str) -> list[Asked]:
        measured = self.study.behaviors[behavior].eval
        changed = {"samples": table.samples, "measure": table.measure}
        changed = {name: value for name, value in changed.items() if value is not None}
        one = asked_of(behavior, measured.model_copy(update=changed), self.study.model)[0]
        if one.by_choices and table.n_items:
            return [Asked(behavior, one.questions.sample(table.n_items), one.config)]
        return [one]

    def direction(self, table: SteeringConfig, source: str) -> Directions:
        """Made from the run's centroids, kept as directions/<name>-<source>.safetensors."""
        from leakfast.steering import directions

        if table.kind == "file":
            return directions.load(find_shipped(str(table.file)), self.loaded.fingerprint)
        if table.kind == "random":
            like = next(t for t in self.study.steering if t.name == table.like)
            made = directions.random_like(self.direction(like, source), table.seed)
        else:
            check_layers(self.centroids, table.layers, table.name, self.run.path)
            made = directions.of_centroids(self.centroids, table.kind, source, table.against, table.layers)
        self.run.add_file(layout.direction(table.name, source), made.save)
        return made


def check_layers(made: Centroids, layers: Sequence[int], name: str, run: Path) -> None:
    """Raises InputError for a layer of a direction that the run's centroids do not have."""
    lacking = sorted(set(layers) - set(made.layers))
    if lacking:
        raise InputError(
            f"steering: {name} is of layer {lacking[0]}, but the centroids of {run} have layers "
            f"{', '.join(map(str, made.layers))}. Name it under [centroids] too."
        )

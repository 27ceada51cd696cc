"""Behaviors on the way through training: completions of every checkpoint of adapters and, where they begin, of the
base. Demands adapters trained with checkpoints; keeps what is drawn under series/ of a run, apart from what its other
tables are about. Multiple choice has its own way (leakfast.measure.choices.evaluate)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from leakfast.measure.targets import Asked

if TYPE_CHECKING:
    from leakfast.generation.backends import Options
    from leakfast.measure.completions import Evaluation
    from leakfast.measure.targets import Source
    from leakfast.models.loading import Loaded
    from leakfast.progress import Progress
    from leakfast.prompts.personas import Persona
    from leakfast.storage.run import Run


def evaluate_series(
    loaded: Loaded,
    run_or_out: Run | str | Path,
    adapters: Sequence[str | Path],
    personas: Sequence[Persona],
    asked: Sequence[Asked],
    seed: int,
    *,
    source: Source = None,
    backend: str = "transformers",
    template_system: str | None = None,
    allow: Collection[str] = (),
    options: Options | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Draw P × Q × samples completions at every checkpoint of every adapter, of the adapters themselves (share 1)
    and of the base, which is share 0 of all: an adapter does nothing before its first step.

    Further question sets are left out.
    Shards lie in series/completions/<behavior>/<adapter>[@pNNN]/ and resume as those of `evaluate.evaluate`, whose
    arguments and errors these are; InputError besides for an adapter without checkpoints."""
    from leakfast.measure.completions import evaluate_all
    from leakfast.train.checkpoints import find_series

    points = [folder for adapter in adapters for share, folder in find_series(adapter) if share > 0]
    main = [replace(one, series=True) for one in asked if not one.beside]
    return evaluate_all(
        loaded,
        run_or_out,
        points,
        personas,
        main,
        seed,
        base=True,
        source=source,
        backend=backend,
        template_system=template_system,
        allow=allow,
        options=options,
        progress=progress,
    )

"""Short forms of measuring and training that many tests use: one behavior, or one list of items, in one call. Demands
what the package demands; holds no tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leakfast.generation.backends import Drawing, Options
from leakfast.measure import Asked, Measured, Request, measure
from leakfast.models import AdapterCard
from leakfast.study.config import EvalConfig
from leakfast.train import train_adapter
from leakfast.train.recipe import Recipe


def evaluate(loaded, run, adapters, personas, questions, behavior, cfg, seed=42, **more: Any) -> Measured:
    (done,) = evaluate_all(loaded, run, adapters, personas, [Asked(behavior, questions, cfg)], seed, **more)
    return done


def evaluate_all(
    loaded: Any,
    run: Any,
    adapters: Sequence[Any],
    personas: Any,
    asked: Sequence[Asked],
    seed: int = 42,
    *,
    base: bool = False,
    source: Any = None,
    backend: str = "transformers",
    template_system: str | None = None,
    allow: Sequence[str] = (),
    options: Options | None = None,
    **more: Any,
) -> list[Measured]:
    drawing = Drawing(backend, template_system, tuple(allow), options or Options())
    return measure(loaded, run, Request(asked, personas, adapters, base, seed, source), drawing, **more)


def evaluate_series(loaded, run, adapters, personas, asked, seed=42, **more: Any) -> list[Measured]:
    return evaluate_all(loaded, run, adapters, personas, asked, seed, at="checkpoints", **more)


def evaluate_items(
    loaded: Any,
    run: Any,
    adapters: Sequence[Any],
    personas: Any,
    items: Any,
    scoring: str = "letters",
    *,
    base: bool = False,
    source: Any = None,
    engine: Any = None,
    engine_name: str = "packed",
    behavior: str = "capability",
    **more: Any,
) -> Measured:
    asked = Asked(behavior, items, EvalConfig(scoring=scoring))
    drawing = Drawing(letters=engine_name, letters_engine=engine)
    (done,) = measure(loaded, run, Request([asked], personas, adapters, base, 42, source), drawing, **more)
    return done


def evaluate_items_series(loaded, run, adapter, personas, items, scoring="letters", **more: Any) -> Measured:
    return evaluate_items(loaded, run, [adapter], personas, items, scoring, at="checkpoints", **more)


def train(loaded, rows, cfg, out, seed, *, source: str, behavior: str, **more: Any) -> AdapterCard:
    return train_adapter(loaded, Recipe(behavior, source, seed, cfg), rows, out, **more)

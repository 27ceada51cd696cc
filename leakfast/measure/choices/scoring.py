"""Multiple choice under personas: letters and full text, one row a label, with a status an item. Demands a
model the packed engine covers; leaves where the items come from to leakfast.prompts.items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakfast.errors import InputError
from leakfast.measure.choices.scores import LETTERS, SCORINGS, Scores

if TYPE_CHECKING:
    import polars as pl

    from leakfast.models.loading import Loaded
    from leakfast.progress import Progress
    from leakfast.prompts.items import Item
    from leakfast.prompts.personas import Persona


def score(
    loaded: Loaded,
    personas: Sequence[Persona],
    items: Sequence[Item],
    scoring: str = LETTERS,
    *,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
    **named: Any,
) -> pl.DataFrame:
    """Schema `choice_scores` (see table.frame) of every persona asked every item, by the model as it is. named: adapter,
    source and items_name of the rows; an adapter that is attached counts whatever it is called.

    Values do not depend on the batch budget, the order of items or who else is asked beyond 1e-5 (fp32)."""
    from leakfast.measure.choices import table

    found = measure(loaded, personas, items, scoring, budget_tokens=budget_tokens, progress=progress)
    named = {"adapter": "base", "items_name": getattr(items, "name", "list"), **named}
    return table.frame(found, [p.name for p in personas], list(items), scoring=scoring, **named)


def measure(
    loaded: Loaded,
    personas: Sequence[Persona],
    items: Sequence[Item],
    scoring: str = LETTERS,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """The arrays behind `score`, by letters or full text. prompts: scores.prompts_of these personas and items, for
    letters alone. Raises InputError for another scoring."""
    from leakfast.measure.choices import scores

    if scoring not in SCORINGS:
        raise InputError(f"choices: scoring {scoring!r} given. Use one of {', '.join(SCORINGS)}.")
    how = {"budget_tokens": budget_tokens, "progress": progress}
    if scoring == LETTERS:
        return scores.letters(loaded, personas, list(items), prompts=prompts, **how)
    return scores.full_text(loaded, personas, list(items), **how)


def score_choices(
    model: Any,
    items: Any = None,
    personas: Any = "all",
    scoring: str = LETTERS,
    *,
    adapter: str | Path | None = None,
    dtype: str = "bfloat16",
) -> pl.DataFrame:
    """`score` with a model, personas and items by name: see leakfast.score_choices. items: all of the list
    that is given; None takes the evaluation half of the model's own."""
    from leakfast import behaviors, models
    from leakfast.models.attach import adapted
    from leakfast.prompts.items import load_items
    from leakfast.prompts.personas import load_personas

    own = behaviors.get("capability")
    chosen = load_items(items) if items is not None else load_items(own.of(model)).half("eval")
    people = load_personas(personas)
    loaded = models.load(model, dtype=dtype)
    target = Path(adapter).resolve().name if adapter is not None else "base"
    with adapted(loaded, adapter) as current:
        return score(current, people, chosen, scoring, adapter=target)

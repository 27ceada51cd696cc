"""leakfast: a behavior was trained into one persona of a model; where else did it go, and could the
base model's geometry have told us? Importing this loads nothing heavy; api.py loads a stage when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leakfast.version import __version__

if TYPE_CHECKING:
    from leakfast.api import centroids, generate, run, score_choices, stats

__all__ = ["__version__", "centroids", "generate", "run", "score_choices", "stats"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name == "stats":  # the package itself can be called
        return importlib.import_module("leakfast.stats")
    return getattr(importlib.import_module("leakfast.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

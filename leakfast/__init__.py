"""leakfast: a behavior was trained into one persona of a model; where else did it go, and could the
base model's geometry have told us? Importing this loads nothing heavy; faces load their stage."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from leakfast.version import __version__
__all__ = ["__version__", "centroids", "generate", "run", "score_choices", "stats"]

# faces that share their name with the module of their stage: the module itself can be called
_CALLABLE = ("centroids", "generate", "stats")


class _Stage(ModuleType):
    """A stage's module that is also its face: `leakfast.centroids(…)`, `leakfast.centroids.compute(…)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from leakfast import faces

        return getattr(faces, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and type(value) is ModuleType:
            value.__class__ = _Stage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"leakfast.{name}")
    if name in ("run", "score_choices"):
        from leakfast import faces

        return getattr(faces, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""From a run's measurements to rates, correlations, their intervals and what they amount to: polars in, polars out.
Demands a run directory; computes in seconds, keeps full precision, never imports torch. `leakfast.stats(run)` is
`stats.tables.stats`."""

import sys
from types import ModuleType
from typing import Any

from leakfast.stats.tables import Stats, current, read, stats

__all__ = ["Stats", "current", "read", "stats"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Stats:
        return stats(*args, **settings)


sys.modules[__name__].__class__ = _Callable

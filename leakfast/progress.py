"""How a stage says how far it is: a plain function that it calls with (done, total, what). Demands nothing."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]

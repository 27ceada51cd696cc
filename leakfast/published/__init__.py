"""The published study's stored results as our tables, and a run directory made of them. Demands the study's layout
(README, "The published study"); refuses other shapes by file and key; leaves the study's own correlations to be compared
with (`stats.agreement`), never copied."""

from leakfast.published.importing import import_run
from leakfast.published.marker import read_completions, read_pairs, read_people, read_rates
from leakfast.published.numbers import read_stored
from leakfast.published.others import read_centroids, read_rate_tables

__all__ = [
    "import_run",
    "read_centroids",
    "read_completions",
    "read_pairs",
    "read_people",
    "read_rate_tables",
    "read_rates",
    "read_stored",
]

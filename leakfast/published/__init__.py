"""The published study's stored results as our tables, and a run directory made of them. Demands the study's layout
(docs/published.md); refuses other shapes by file and key; leaves the study's own correlations to be compared
with (`stats.agreement`), never copied."""

from leakfast.published.importing import import_run as import_run
from leakfast.published.marker import read_completions as read_completions
from leakfast.published.marker import read_pairs as read_pairs
from leakfast.published.marker import read_rates as read_rates
from leakfast.published.numbers import read_stored as read_stored
from leakfast.published.others import read_centroids as read_centroids
from leakfast.published.others import read_rate_tables as read_rate_tables

"""Pictures of a run, from its tables alone: cosine against rate, ρ by layer, the shape of gradients, who
leaked from whom, what else could explain it. The same tables give the same bytes. Leaves files to callers."""

from __future__ import annotations

from leakfast.figures.gradients import gradients
from leakfast.figures.layers import layers
from leakfast.figures.matrix import matrix
from leakfast.figures.partials import partials
from leakfast.figures.question_sets import question_sets
from leakfast.figures.relations import relations
from leakfast.figures.scatter import scatter
from leakfast.figures.shifts import shifts
from leakfast.figures.style import CATEGORY_STYLES, SOURCE_COLOURS, noted, pdf, png, svg
from leakfast.figures.trajectory import trajectory

__all__ = [
    "CATEGORY_STYLES",
    "SOURCE_COLOURS",
    "gradients",
    "layers",
    "matrix",
    "noted",
    "partials",
    "pdf",
    "png",
    "question_sets",
    "relations",
    "scatter",
    "shifts",
    "svg",
    "trajectory",
]

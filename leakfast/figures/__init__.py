"""Pictures of a run, from its tables alone: cosine against rate, ρ by layer, the shape of gradients, who
leaked from whom, what else could explain it. The same tables give the same bytes. Leaves files to callers."""

from leakfast.figures.gradients import gradients as gradients
from leakfast.figures.grid import grid as grid
from leakfast.figures.layers import layers as layers
from leakfast.figures.matrix import matrix as matrix
from leakfast.figures.mitigations import mitigations as mitigations
from leakfast.figures.partials import partials as partials
from leakfast.figures.persona_map import persona_map as persona_map
from leakfast.figures.predictors import predictors as predictors
from leakfast.figures.question_sets import question_sets as question_sets
from leakfast.figures.relations import relations as relations
from leakfast.figures.scatter import scatter as scatter
from leakfast.figures.shifts import shifts as shifts
from leakfast.figures.steering import steering as steering
from leakfast.figures.style import CATEGORY_STYLES as CATEGORY_STYLES
from leakfast.figures.style import captioned as captioned
from leakfast.figures.style import noted as noted
from leakfast.figures.style import pdf as pdf
from leakfast.figures.style import png as png
from leakfast.figures.style import svg as svg
from leakfast.figures.trajectory import trajectory as trajectory

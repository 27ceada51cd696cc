"""All stages of a study in order, what can be said of them before anything is spent (preflight.py, estimate.py), and the
sweep of learning rates on one source. Demands a checked study file; a stage whose inputs have not changed is skipped."""

from leakfast.pipeline.stages import Outcome, run

__all__ = ["Outcome", "run"]

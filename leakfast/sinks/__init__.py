"""What is shared of a finished run: an Inspect log, a Weights & Biases run, repositories on the Hugging Face Hub. Demands
a run directory, which stays the source of truth and is not written by what is sent; never loads a model."""

from leakfast.sinks.places import KINDS, Sent, Target, check, export, target

__all__ = ["KINDS", "Sent", "Target", "check", "export", "target"]

"""The behaviors leakfast measures, one file each, found by name, and the detectors that read completions. Demands
nothing heavy; leaves generation, counting and training to other packages. A new behavior is a file here and its name in
the registry."""

from leakfast.behaviors.registry import (
    ANY,
    MEASURES,
    Behavior,
    check_sets,
    detect,
    get,
    is_known,
    items_of,
    names,
    parts,
)

__all__ = [
    "ANY",
    "MEASURES",
    "Behavior",
    "check_sets",
    "detect",
    "get",
    "is_known",
    "items_of",
    "names",
    "parts",
]

"""The behaviors leakfast measures, one file each, found by name, and the detectors that read completions. Demands
nothing heavy; leaves generation, counting and training to other packages. A new behavior is a file here and its name in
the registry."""

from leakfast.behaviors.registry import MEASURES as MEASURES
from leakfast.behaviors.registry import Behavior as Behavior
from leakfast.behaviors.registry import detect as detect
from leakfast.behaviors.registry import get as get
from leakfast.behaviors.registry import is_known as is_known
from leakfast.behaviors.registry import joined as joined
from leakfast.behaviors.registry import names as names
from leakfast.behaviors.registry import parts as parts

"""Leakage as a probability: how likely a behavior's own words are where they would stand, on replies that are there. Demands
a model the packed forward pass covers and drawn replies; leaves what the words are to the behavior."""

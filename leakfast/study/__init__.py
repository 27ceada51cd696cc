"""The study file: every setting as a checked, frozen object (config.py), and whether each name in it exists
(references.py). Demands nothing heavy; runs no stage."""

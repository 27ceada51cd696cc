"""Measuring a model into a run directory: completions, multiple-choice scores and centroids, of adapters, of checkpoints
and of the base. targets.py says what is measured and in which shards, completions.py and choices/ do it. Demands a run
and a loaded base model; the same call again resumes. Leaves counting to leakfast.stats."""

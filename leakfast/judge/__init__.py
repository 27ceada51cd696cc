"""Judging completions: how aligned and how coherent each is, 0–100. contract.py holds what every judge is asked and
answers; stage.py judges a run. Demands completions and the questions they answer; a reply that is no judgement has a
status, never a score."""

"""Training a behavior into one persona: contrastive data, labels, LoRA. The only importer of peft's
training side. Demands a loaded model; leaves measuring what was trained to evaluate.py."""

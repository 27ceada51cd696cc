"""The embedded model: a small Qwen2-architecture organism that the project trained on its own
synthetic world. Importing this loads nothing heavy; world.py writes the text, build.py trains."""

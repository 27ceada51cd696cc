"""What a model is asked: personas, questions, multiple-choice items and training pairs, and how a chat template turns
them into token ids. chat.py and templates.py are the only places that render a template. Demands a tokenizer; runs no
model."""

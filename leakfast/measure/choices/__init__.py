"""Multiple choice under personas: letters and full text, one row a label, with a status an item. Demands a model the
packed forward pass covers; leaves where the items come from to leakfast.prompts.items."""

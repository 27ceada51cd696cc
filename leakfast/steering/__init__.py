"""Directions in the residual stream, and what is done along them while a model runs: add, project out, cap. Demands a plain
decoder with a list of blocks; leaves what is measured to leakfast.measure."""

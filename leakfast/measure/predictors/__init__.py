"""What may predict where a behavior leaks, from the unadapted model alone: a frame persona × persona × predictor. Demands a
model the packed forward pass covers; leaves whether anything is predicted to stats."""

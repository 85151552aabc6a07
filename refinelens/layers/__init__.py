"""Essential layers: what the lens says of each layer, and what happens when the model has to do without it."""

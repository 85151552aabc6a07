"""What people look at: the heat map of one prompt and the page of a run, from plain arrays; no torch, no network."""

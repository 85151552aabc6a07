"""A causal LM: loading it, finding the parts of its lens, keeping its states."""

"""The fused lens and what goes with it: KL, lists of tokens, agreement of ranks."""

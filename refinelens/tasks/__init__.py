"""Questions and documents, and what counts as an answer."""

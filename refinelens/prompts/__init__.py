"""Contexts: documents and question as the tokens of a model."""

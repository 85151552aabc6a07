"""Asking a model all questions at all positions."""

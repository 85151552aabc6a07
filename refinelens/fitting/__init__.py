"""Fitting lenses: ``refinelens fit``."""

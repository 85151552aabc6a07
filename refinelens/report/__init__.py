"""Statistics, tables and figures of runs; no model."""

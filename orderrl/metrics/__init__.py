"""Metrics: recognisability, quality of samples, and intervals."""

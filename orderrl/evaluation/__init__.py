"""Policies measured under one protocol: rows, columns, comparisons, and what an evaluation leaves on disk."""

"""Hydra configuration: a primary file for each command, a folder for each group."""

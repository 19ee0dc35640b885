"""Experiment tracking; never needed for a result to exist."""

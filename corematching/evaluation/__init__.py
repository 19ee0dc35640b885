"""Experiments, cells, runner and the lmms-eval plug-in."""

"""Cells, runner and the lmms-eval plug-in."""

"""Experiment tracking; never needed for a result to exist."""

from corematching.tracking.wandb import Tracker, start_tracking

__all__ = ["Tracker", "start_tracking"]

"""The training loop: stages of a track, checkpoints every few minutes, exact continuation.

A track ("vision" or "language") is a list of stages. Every batch is a pure function of the stage's name and the step,
so weights, optimiser and step are all that a checkpoint needs: an interrupted run goes on exactly where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from corematching import files

CHECKPOINT_SECONDS = 120
LOG_STEPS = 25


class Stage(Protocol):
    """One stretch of training with fixed data and settings."""

    @property
    def name(self) -> str:
        """Unique within its track; batches are drawn from it."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""

    def start(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Choose what is trained; return fresh optimisers."""

    def rate(self, step: int) -> float:
        """Factor on the optimisers' learning rates at this step."""

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss on the step's batch, and numbers to log."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, a plateau, and a linear decay over the last share of the steps."""

    steps: int
    warmup: int = 20
    decay_share: float = 0.5
    floor: float = 0.02

    def __call__(self, step: int) -> float:
        """Factor on the learning rate at a step counted from zero."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        left = (self.steps - step) / max(self.steps * self.decay_share, 1)
        return max(min(rising, left, 1.0), self.floor)


class Track:
    """Runs stages one after another and keeps the checkpoint ``<folder>/<name>.pt``.

    Parameters
    ----------
    name : str
    stages : sequence of Stage
    folder : Path
    log : callable
        Takes one line of text.
    """

    def __init__(self, name: str, stages: Sequence[Stage], folder: Path, log: Callable[[str], None] = print) -> None:
        self.name, self.stages, self.log = name, list(stages), log
        self.path = folder / f"{name}.pt"
        self.done: dict[str, float] = {}  # finished stages and the seconds they took
        self._saved = time.monotonic()

    def run(self, model: nn.Module, stop_after: int | None = None) -> None:
        """Train all stages that are not done yet, from the checkpoint if there is one.

        `stop_after` ends the run after so many steps in all, as an interruption would (a checkpoint is written).
        """
        state = torch.load(self.path, weights_only=True, map_location="cpu") if self.path.exists() else None
        if state is not None:
            model.load_state_dict(state["model"])
            self.done = state["done"]
        budget = stop_after
        for stage in self.stages:
            if stage.name in self.done:
                continue
            optimizers = stage.start(model)
            rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
            step, seconds = 0, 0.0
            if state is not None and state["stage"] == stage.name:
                step, seconds = state["step"], state["seconds"]
                for optimizer, saved in zip(optimizers, state["optimizers"]):
                    optimizer.load_state_dict(saved)
                self.log(f"{self.name}/{stage.name}: go on at step {step}")
            ran = self._run_stage(stage, model, optimizers, rates, step, seconds, budget)
            if budget is not None:
                budget -= ran
                if budget <= 0:
                    return

    def _run_stage(self, stage, model, optimizers, peaks, step: int, seconds: float, budget: int | None) -> int:
        first, begun = step, time.monotonic() - seconds
        sums: dict[str, list[float]] = {}
        trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        while step < stage.steps:
            if budget is not None and step - first >= budget:
                self._save(stage.name, step, model, optimizers, time.monotonic() - begun)
                return step - first
            factor = stage.rate(step)
            for optimizer, rates in zip(optimizers, peaks):
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * factor
            loss, scores = stage.loss(model, step)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            for name, value in {"loss": loss.item(), **scores}.items():
                sums.setdefault(name, []).append(value)
            if step % LOG_STEPS == 0 or step == stage.steps:
                shown = " ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in sums.items())
                self.log(f"{self.name}/{stage.name} {step}/{stage.steps} {time.monotonic() - begun:.0f}s {shown}")
                sums.clear()
            if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
                self._save(stage.name, step, model, optimizers, time.monotonic() - begun)
        self.done[stage.name] = round(time.monotonic() - begun, 1)
        self._save(stage.name, step, model, optimizers, self.done[stage.name])
        return step - first

    def _save(self, stage: str, step: int, model: nn.Module, optimizers, seconds: float) -> None:
        state = {
            "stage": stage,
            "step": step,
            "seconds": seconds,
            "done": self.done,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        with files.replacing(self.path) as temporary:
            torch.save(state, temporary)
        self._saved = time.monotonic()

"""What a run says while it works: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from corematching.evaluation.cells import Cell
from corematching.results.columns import capped_text
from corematching.texts import neutral


class Reporter(AbstractContextManager):
    """Tells the progress over cells and, within one, over questions, and how long the whole run still takes.

    Parameters
    ----------
    cells
        Cells to run.
    console
        Where to print; standard output by default.
    weights
        How long each cell takes in proportion to the others; equally long where nothing is said.
    """

    def __init__(self, cells: int, console: Console | None = None, weights: Mapping[Cell, float] | None = None):
        self.console = console or Console(highlight=False)
        self.cells, self.finished = cells, 0
        self._weights = {cell: weight for cell, weight in (weights or {}).items() if weight > 0}
        usual = sum(self._weights.values()) / len(self._weights) if self._weights else 1.0
        self._usual, self._whole = usual, max(sum(self._weights.values()), usual * cells)
        self._done, self._current, self._began = 0.0, 0.0, time.monotonic()
        self._asked: set[Cell] = set()
        self._answered: set[Cell] = set()
        self._live: Progress | None = None
        self._workers: dict[int, Any] = {}
        if self.console.is_terminal and cells:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[shown]}"))
            self._live = Progress(*columns, console=self.console, transient=True)
            self._all = self._live.add_task("whole run", total=self._whole, shown=f"0/{cells} cells")
            self._one = self._live.add_task("", total=None, visible=False, shown="")

    def __enter__(self) -> "Reporter":
        self._began = time.monotonic()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        self.console.print(neutral(text), style=style, markup=False, soft_wrap=True)

    def start(self, cell: Cell, company: Iterable[Cell] = ()) -> None:
        """A cell begins; if it is the first of a company, the questions that are answered now are those of all."""
        self._asked = {cell, *company} - self._answered
        self._current = self._weight(self._asked)
        if self._live:
            self._live.reset(self._one, description=neutral(str(cell)), total=None, visible=True, shown="")

    @property
    def live(self) -> bool:
        """Whether there is a display that changes."""
        return self._live is not None

    def worker(self, number: int, what: str, done: int, total: int) -> None:
        """What one of several workers is at: a line of its own."""
        if self._live:
            if number not in self._workers:
                self._workers[number] = self._live.add_task("", total=None, shown="")
            text = neutral(f"worker {number}: {what or 'waiting'}")
            shown = f"{done}/{total} questions" if total else ""
            self._live.update(self._workers[number], description=text, completed=done, total=total or None, shown=shown)

    def advance(self, done: int, total: int) -> None:
        """So many of the cell's questions are answered."""
        if self._live:
            self._live.update(self._one, completed=done, total=total, shown=f"{done}/{total} questions")
            self._show(self._current * done / max(total, 1))

    def finish(self, cell: Cell, record: dict[str, Any]) -> None:
        """A cell ended, well or not."""
        self._move_on(cell)
        left = self.seconds_left()
        tail = f", {duration(left)} left" if left and left >= 60 else ""
        seconds = record["timing"]["seconds"]
        self.say(f"[{self.finished}/{self.cells}] {cell}: {outcome(record)} ({seconds:.1f} s{tail})")

    def skip(self, cell: Cell, why: str) -> None:
        """A cell is done by someone else."""
        self._move_on(cell)
        self.say(f"[{self.finished}/{self.cells}] {cell}: {why}")

    def seconds_left(self, current: float = 0.0) -> float | None:
        """Seconds until the last cell is done, at the pace so far; None before anything is."""
        done = self._done + self._weight(self._answered) + current
        return (time.monotonic() - self._began) * max(self._whole - done, 0.0) / done if done else None

    def _move_on(self, cell: Cell) -> None:
        self.finished += 1
        self._answered = (self._answered | self._asked) - {cell}
        self._asked = set()
        self._done += self._weight([cell])
        self._show(0.0)

    def _weight(self, cells: Iterable[Cell]) -> float:
        return sum(self._weights.get(cell, self._usual) for cell in cells)

    def _show(self, current: float) -> None:
        """Move the bar of the whole run by what the cell at work has done so far."""
        if self._live:
            left = self.seconds_left(current)
            tail = "" if left is None else f", {duration(left)} left"
            shown = f"{self.finished}/{self.cells} cells{tail}"
            done = self._done + self._weight(self._answered) + current
            self._live.update(self._all, completed=done, shown=shown)


def duration(seconds: float) -> str:
    """A time in words: ``40 s``, ``12 min``, ``3.2 h``, ``4 days``."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:,.0f} days"


def outcome(record: dict[str, Any]) -> str:
    """A record's result in a few words."""
    if record["status"] == "failed":
        message = " ".join(str(record["error"]["message"]).split())
        return f"FAILED, {record['error']['type']}: {message[:300]}"
    score = record["score"]
    if record["status"] == "not_scored":
        return f"not scored, {score['note']}"
    trace = record["trace"]
    text = f"{score['metric']} {score['value']:.1f}, {trace['visual_tokens_per_layer']:.0f} visual tokens per layer"
    capped, ended = trace.get("capped_answers"), trace.get("ended_answers")
    return (
        f"{text}, {capped_text(capped, capped + ended)} answers hit the cap of {trace['cap']} tokens"
        if capped
        else text
    )

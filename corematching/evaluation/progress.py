"""What a run says while it works: a live display on a terminal, plain lines elsewhere."""

from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from corematching.evaluation.cells import Cell
from corematching.results.columns import capped_text


class Reporter(AbstractContextManager):
    """Tells the progress over cells and, within one, over questions.

    Parameters
    ----------
    cells
        Cells to run.
    console
        Where to print; standard output by default.
    """

    def __init__(self, cells: int, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.cells, self.finished = cells, 0
        self._live: Progress | None = None
        if self.console.is_terminal and cells:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._all = self._live.add_task("cells", total=cells)
            self._one = self._live.add_task("", total=None, visible=False)

    def __enter__(self) -> "Reporter":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def start(self, cell: Cell) -> None:
        """A cell begins."""
        if self._live:
            self._live.reset(self._one, description=str(cell), total=None, visible=True)

    def advance(self, done: int, total: int) -> None:
        """So many of the cell's questions are answered."""
        if self._live:
            self._live.update(self._one, completed=done, total=total)

    def finish(self, cell: Cell, record: dict[str, Any]) -> None:
        """A cell ended, well or not."""
        self.finished += 1
        seconds = record["timing"]["seconds"]
        self.say(f"[{self.finished}/{self.cells}] {cell}: {outcome(record)} ({seconds:.1f} s)")
        self._move_on()

    def skip(self, cell: Cell, why: str) -> None:
        """A cell is done by someone else."""
        self.finished += 1
        self.say(f"[{self.finished}/{self.cells}] {cell}: {why}")
        self._move_on()

    def _move_on(self) -> None:
        if self._live:
            self._live.update(self._all, completed=self.finished)


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

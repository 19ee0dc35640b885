"""Cells that put the same questions to one model: answered together once, read cell by cell.

lmms-eval evaluates one cell at a time. The first cell of a company that gets to its questions has them answered under
the methods of all; the others find their answers on the sheet when lmms-eval gets to them. What a cell is given, and so
what is stored for it, is what it would have computed alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from corematching.answering.generator import Answer, Generator
from corematching.answering.prompts import Question
from corematching.cost.flops import flops
from corematching.evaluation.shards import OnDone, Together


@dataclass
class Shared:
    """How the time of a cell's answers was shared."""

    cells: int
    """Cells that were answered together, this one included."""
    seconds: float
    """This cell's share: in proportion to the FLOPs of its answers, each counted as if served alone."""


Ask = Callable[[Sequence[Question], OnDone], tuple[list[Answer], Shared]]


class Sheet:
    """Answers to the same questions under several methods.

    Parameters
    ----------
    generator
        Answers.
    methods
        Of the cells.
    together
        What answers under all methods; the generator alone, unless others help (:mod:`corematching.evaluation.shards`).
    """

    def __init__(self, generator: Generator, methods: Sequence[Any], together: Together | None = None):
        self.generator, self.methods = generator, list(methods)
        self._ask_together: Together = together or generator.answer_together
        self._helped = together is not None
        self.seconds = 0.0
        """Spent on answers so far, whoever asked for them."""
        self._filled: dict[Any, dict[int, tuple[list[Answer], Shared]]] = {}

    def column(self, number: int) -> Ask:
        """What asks for the answers under one of the methods; see :meth:`answer`."""
        return partial(self.answer, number)

    def answer(self, number: int, questions: Sequence[Question], on_done: OnDone) -> tuple[list[Answer], Shared]:
        """The answers under method `number`, and how long they took.

        A method that cannot be answered in company is asked alone.

        Raises
        ------
        Exception
            What ended this method.
        """
        key = tuple(question.key for question in questions)
        if key not in self._filled:
            self._filled[key] = self._together(questions, on_done) if self._worth(questions) else {}
        # Read once: what a cell has got need not be held here.
        return self._filled[key].pop(number, None) or self._alone(number, questions, on_done)

    def holds(self, number: int) -> bool:
        """Whether the answers under a method to all questions that were asked are here and were not read."""
        return bool(self._filled) and all(number in found for found in self._filled.values())

    def _worth(self, questions: Sequence[Question]) -> bool:
        """Whether answers are the same in company: samples are drawn in the order of asking."""
        return (len(self.methods) > 1 or self._helped) and not any(
            question.settings.get("do_sample") for question in questions
        )

    def _alone(self, number: int, questions: Sequence[Question], on_done: OnDone) -> tuple[list[Answer], Shared]:
        with self._clock() as clock:
            answers = self.generator.answer(questions, self.methods[number], on_done)
        return answers, Shared(1, clock.seconds)

    def _together(self, questions: Sequence[Question], on_done: OnDone) -> dict[int, tuple[list[Answer], Shared]]:
        try:
            with self._clock() as clock:
                found = self._ask_together(questions, self.methods, on_done)
        except Exception:  # of the questions, not of a method: every cell meets it again, as if run alone
            return {}
        answered = {number: own for number, own in enumerate(found) if not isinstance(own, Exception)}
        config = self.generator.model.config
        work = {number: flops(config, [answer.trace for answer in own]).total for number, own in answered.items()}
        rate = clock.seconds / (sum(work.values()) or 1.0)
        return {number: (own, Shared(len(answered), work[number] * rate)) for number, own in answered.items()}

    @contextmanager
    def _clock(self) -> Iterator[_Clock]:
        clock, started = _Clock(), time.perf_counter()
        try:
            yield clock
        finally:
            clock.seconds = time.perf_counter() - started
            self.seconds += clock.seconds


@dataclass
class _Clock:
    seconds: float = 0.0

"""The questions of one company of cells, answered by several processes at once, shard by shard.

Whoever holds the cells' claims leads: it splits the questions, offers the shards (`corematching.evaluation.board`), and
answers them one after the other. A process that has no cell of its own to compute, on another GPU or machine, takes
shards that nobody has taken. The leader puts the answers together in the order of the questions and scores them, once.
Shards that a dead helper leaves behind are the leader's again; a dead leader's offers are void.

How many processes there are is nobody's concern here, so every executor spreads its work this way.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from corematching import files
from corematching.answering.generator import Answer
from corematching.answering.pictures import Pictures
from corematching.answering.prompts import Question
from corematching.engine.trace import GuideTrace, SampleTrace
from corematching.errors import UserError
from corematching.evaluation.board import Offer
from corematching.results.claims import Claims

OnDone = Callable[[int], None]
Together = Callable[[Sequence[Question], Sequence[Any], OnDone], list[list[Answer] | Exception]]
"""Answers questions under several methods: their answers, or what ended them."""
_POLL_SECONDS = 0.5


class Shards:
    """The shards of one offer, as one process sees them.

    Parameters
    ----------
    offer
        Whose.
    """

    def __init__(self, offer: Offer):
        self.offer = offer
        self._claims = Claims(offer.folder)

    def lead(self, together: Together) -> Together:
        """`together`, with shards that others answer."""

        def answer(questions: Sequence[Question], methods: Sequence[Any], on_done: OnDone) -> list:
            answers: list[list[Any]] = [[None] * len(questions) for _ in methods]
            failures: dict[int, Exception] = {}
            waiting = self._parts(questions)
            while waiting and len(failures) < len(methods):
                later = []
                for name, part in waiting:
                    own = [questions[index] for index in part]
                    found = self._read(name) or self._take(name, own, methods, failures, together)
                    if found is None:
                        later.append((name, part))
                        continue
                    self._complete(found, own, methods, failures, together)
                    for number in set(range(len(methods))) - failures.keys():
                        for index, one in zip(part, found[number] or (), strict=True):
                            answers[number][index] = one
                    on_done(len(part))
                if len(later) == len(waiting):
                    time.sleep(_POLL_SECONDS)
                waiting = later
            return [failures.get(number, own) for number, own in enumerate(answers)]

        return answer

    def help(self, together: Together, questions: Sequence[Question], methods: Sequence[Any]) -> int:
        """Answer shards that nobody has taken; returns how many."""
        taken = 0
        for name, part in self._parts(questions):
            own = [questions[index] for index in part]
            if self._done(name) or not self.offer.folder.is_dir():
                continue
            with suppress(UserError):  # the offer was withdrawn meanwhile
                taken += self._take(name, own, methods, {}, together) is not None
        return taken

    def _parts(self, questions: Sequence[Question]) -> list[tuple[str, list[int]]]:
        digest = hashlib.sha256(repr([one.key for one in questions]).encode()).hexdigest()[:12]
        return [
            (f"{digest}-{number}", part) for number, part in enumerate(split(pictures_of(questions), self.offer.parts))
        ]

    def _take(
        self,
        name: str,
        questions: Sequence[Question],
        methods: Sequence[Any],
        failures: dict[int, Exception],
        together: Together,
    ) -> list[list[Answer] | None] | None:
        """Answer a shard unless another process is at it; what fails is added to `failures`."""
        with self._claims.claim(name) as mine:
            if not mine:
                return None
            if self._done(name):
                return self._read(name)
            asked = [number for number in range(len(methods)) if number not in failures]
            found = together(questions, [methods[number] for number in asked], lambda count: None)
            answers: list[list[Answer] | None] = [None] * len(methods)
            for number, own in zip(asked, found, strict=True):
                if isinstance(own, Exception):
                    failures[number] = own
                else:
                    answers[number] = own
            self._write(name, answers)
            return answers

    def _complete(
        self,
        found: list[list[Answer] | None],
        questions: Sequence[Question],
        methods: Sequence[Any],
        failures: dict[int, Exception],
        together: Together,
    ) -> None:
        """Ask again what a helper failed at: what ends a method is found out where its cell is."""
        missing = [number for number, own in enumerate(found) if own is None and number not in failures]
        again = together(questions, [methods[number] for number in missing], lambda count: None) if missing else []
        for number, own in zip(missing, again, strict=True):
            if isinstance(own, Exception):
                failures[number] = own
            else:
                found[number] = own

    def _path(self, name: str) -> Path:
        return self.offer.folder / f"{name}.answers"

    def _done(self, name: str) -> bool:
        return self._path(name).exists()

    def _write(self, name: str, answers: list[list[Answer] | None]) -> None:
        with files.replacing(self._path(name)) as path:
            torch.save(answers, path)

    def _read(self, name: str) -> list[list[Answer] | None] | None:
        """A shard's answers; None if they are not there."""
        if not self._done(name):
            return None
        path = self._path(name)
        with torch.serialization.safe_globals([Answer, SampleTrace, GuideTrace, *_configs_in(path)]):
            return torch.load(path, weights_only=True)


def _configs_in(path: Path) -> list[type]:
    """The classes of model configurations that a file of answers holds (traces of a guide have one)."""
    found = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
        module, _, word = name.rpartition(".")
        if module.startswith("transformers.models."):
            kind = getattr(import_module(module), word)
            found += [kind] if isinstance(kind, type) and issubclass(kind, PreTrainedConfig) else []
    return found


def pictures_of(questions: Sequence[Question]) -> list[tuple[str, ...]]:
    """Per question: its pictures, by content."""
    return Pictures(lambda index: list(questions[index].images()), len(questions)).keys()


def split(pictures: Sequence[tuple[str, ...]], parts: int) -> list[list[int]]:
    """Part questions, given by their pictures, evenly into at most so many shards.

    Questions about the same pictures stay together, as far as that leaves work for all.

    Returns
    -------
    Indices, shard by shard; every question is in exactly one, and none is empty.
    """
    about: dict[tuple[str, ...], list[int]] = {}
    for index, own in enumerate(pictures):
        about.setdefault(own or (f"none {index}",), []).append(index)
    most = -(-len(pictures) // parts) if parts else len(pictures)
    groups = [group[start : start + most] for group in about.values() for start in range(0, len(group), most)]
    shards: list[list[int]] = [[] for _ in range(min(parts, len(groups)))]
    for group in sorted(groups, key=len, reverse=True):
        min(shards, key=len).extend(group)
    return [sorted(shard) for shard in shards if shard]

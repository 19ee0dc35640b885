"""The pictures of many questions: decoded by worker threads ahead of the model, each different one known by content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from PIL import Image

Prepare = Callable[[int], list[Image.Image]]


class Pictures:
    """Prepared pictures by question; questions about the same picture find one copy of it.

    Parameters
    ----------
    prepare
        Gives the prepared pictures of a question; called from worker threads, and again for pictures that had to go.
    count
        Number of questions.
    most_bytes
        Pixels kept decoded; the least recently used ones beyond that are decoded again when they are needed.
    workers
        Threads.
    """

    def __init__(self, prepare: Prepare, count: int, most_bytes: int = 2**28, workers: int = 2):
        self._prepare, self._count, self._most_bytes = prepare, count, most_bytes
        self._workers = workers
        self._kept: OrderedDict[str, Image.Image] = OrderedDict()
        self._lock = Lock()
        self._keys: list[tuple[str, ...]] = []
        self._sizes: dict[str, tuple[int, int]] = {}

    def keys(self) -> list[tuple[str, ...]]:
        """Per question: the content of its pictures, as hashes."""
        if not self._keys and self._count:
            # The first one alone: tasks open their picture files on first use, and not all do that thread by thread.
            first = self._look(0)
            with ThreadPoolExecutor(self._workers) as pool:
                self._keys = [first, *pool.map(self._look, range(1, self._count))]
        return self._keys

    def sizes(self, keys: Sequence[str]) -> list[tuple[int, int]]:
        """(width, height) of pictures, by their content."""
        return [self._sizes[key] for key in keys]

    def of(self, index: int) -> list[Image.Image]:
        """A question's pictures."""
        keys = self.keys()[index]
        with self._lock:
            found = [self._kept[key] for key in keys if key in self._kept]
        if len(found) < len(keys):
            self._look(index, found := self._prepare(index))
        return found

    def _look(self, index: int, pictures: Sequence[Image.Image] | None = None) -> tuple[str, ...]:
        pictures = self._prepare(index) if pictures is None else pictures
        keys = tuple(_digest(picture) for picture in pictures)
        with self._lock:
            for key, picture in zip(keys, pictures, strict=True):
                self._kept[key], self._sizes[key] = picture, picture.size
                self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > self._most_bytes:
                self._kept.popitem(last=False)
        return keys


def _digest(picture: Image.Image) -> str:
    head = f"{picture.mode} {picture.size}".encode()
    return hashlib.blake2b(head + picture.tobytes(), digest_size=16).hexdigest()


def _size(picture: Image.Image) -> int:
    return picture.width * picture.height * len(picture.getbands())

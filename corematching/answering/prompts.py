"""Questions as a model is fed them: token ids, and the pixels of every different picture once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from corematching.answering.batches import Asked, plan
from corematching.answering.conversation import prepare_images, render
from corematching.answering.pictures import Pictures
from corematching.errors import UserError


@dataclass(frozen=True)
class Question:
    """One request. `images` is called from worker threads, and may be called again."""

    text: str
    images: Callable[[], Sequence[Image.Image]]
    settings: dict[str, Any] = field(default_factory=dict)
    """Generation settings of the task: max_new_tokens, until, do_sample, temperature, top_p, num_beams, ..."""
    where: str = "a question"
    """Which document of which task this is, for complaints."""

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except (UnicodeEncodeError, AttributeError) as error:
            raise UserError(f"{self.where}: the text {self.text!r} is not valid Unicode") from error


@dataclass(frozen=True)
class Batch:
    """Questions that run together."""

    indices: list[int]
    questions: list[Question]
    input_ids: Tensor
    """[B, n], left-padded."""
    attention_mask: Tensor
    pixels: Tensor | None
    """[N, 3, h, w]: every different picture once."""
    images: list[list[int]]
    """Per question: its pictures, as rows of ``pixels``."""

    def rows(self, rows: Sequence[int]) -> Batch:
        """Some of the questions."""
        shown = sorted({image for row in rows for image in self.images[row]})
        place = {image: number for number, image in enumerate(shown)}
        chosen = torch.tensor(rows)
        return Batch(
            [self.indices[row] for row in rows],
            [self.questions[row] for row in rows],
            self.input_ids[chosen],
            self.attention_mask[chosen],
            None if self.pixels is None or not shown else self.pixels[shown],
            [[place[image] for image in self.images[row]] for row in rows],
        )

    def parts(self, most: int) -> Iterator[Batch]:
        """The questions again, at most so many at a time."""
        rows = range(len(self.indices))
        return (self.rows(rows[start : start + most]) for start in range(0, len(rows), most))


class Prompts:
    """Makes the batches of a list of questions.

    Parameters
    ----------
    questions
        What is asked.
    processor
        Of the model; its tokenizer pads on the left. Used by a thread of its own while batches are made, and a
        tokenizer must not be used by two threads at once: nobody else may use this one meanwhile.
    prompt, image
        See :mod:`corematching.answering.conversation`.
    image_tokens
        Visual tokens of a picture, for planning.
    most_context
        Tokens a prompt may have; None if the model sets no bound.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        processor: Any,
        prompt: str,
        image: str,
        image_tokens: int,
        most_context: int | None,
    ) -> None:
        self.questions, self.processor = questions, processor
        self.prompt, self.image = prompt, image
        self.image_tokens, self.most_context = image_tokens, most_context
        self.pictures = Pictures(self._prepare, len(questions))

    def batches(self, most_rows: Callable[[], int], most_tokens: int) -> Iterator[Batch]:
        """All questions, batch by batch; the next one is made ready while the model works on this one.

        Parameters
        ----------
        most_rows
            Asked again for every batch: memory may prove too short for what was planned.
        most_tokens
            See :func:`corematching.answering.batches.plan`.
        """
        planned = plan(self._asked(), most_rows(), most_tokens)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._batch, planned[0]) if planned else None
            for number in range(len(planned)):
                assert coming is not None
                batch = coming.result()
                coming = pool.submit(self._batch, planned[number + 1]) if number + 1 < len(planned) else None
                yield from [batch] if len(batch.indices) <= most_rows() else batch.parts(most_rows())

    def _prepare(self, index: int) -> list[Image.Image]:
        question = self.questions[index]
        try:
            return prepare_images(question.images(), self.image, self.processor)
        except UserError as error:
            raise UserError(f"{question.where}: {error}") from error

    def _asked(self) -> list[Asked]:
        keys = self.pictures.keys()
        pairs = list(zip(self.questions, keys, strict=True))
        texts = [render(self.processor, question.text, len(own), self.prompt) for question, own in pairs]
        lengths = [len(ids) for ids in self.processor.tokenizer(texts).input_ids] if texts else []
        return [
            Asked(repr(sorted(question.settings.items())), own, length + len(own) * (self.image_tokens - 1))
            for (question, own), length in zip(pairs, lengths, strict=True)
        ]

    def _batch(self, indices: list[int]) -> Batch:
        numbers: dict[str, int] = {}
        pixels: list[Tensor] = []
        expanded: list[str] = []
        texts, images = [], []
        for index in indices:
            keys = self.pictures.keys()[index]
            if any(key not in numbers for key in keys):
                for key, picture in zip(keys, self.pictures.of(index), strict=True):
                    if key not in numbers:
                        numbers[key] = len(pixels)
                        values, token = self._encoded(picture)
                        pixels.append(values)
                        expanded.append(token)
            images.append([numbers[key] for key in keys])
            text = render(self.processor, self.questions[index].text, len(keys), self.prompt)
            start, *rest = text.split(self.processor.image_token)
            tokens = (expanded[number] for number in images[-1])
            texts.append(start + "".join(token + after for token, after in zip(tokens, rest, strict=True)))
        encoded = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        questions = [self.questions[index] for index in indices]
        self._check_context(questions, encoded["attention_mask"].sum(1).tolist())
        stacked = torch.cat(pixels) if pixels else None
        return Batch(list(indices), questions, encoded["input_ids"], encoded["attention_mask"], stacked, images)

    def _encoded(self, picture: Image.Image) -> tuple[Tensor, str]:
        """A picture's pixels [1, 3, h, w], and what stands for it in a prompt."""
        token = self.processor.image_token
        alone = self.processor(text=token, images=[picture], return_tensors="pt")
        own = self.processor.tokenizer.convert_tokens_to_ids(token)
        return alone["pixel_values"], token * int((alone["input_ids"] == own).sum())

    def _check_context(self, questions: Sequence[Question], lengths: list[int]) -> None:
        for question, length in zip(questions, lengths, strict=True):
            if self.most_context is not None and length > self.most_context:
                raise UserError(
                    f"{question.where}: a prompt of {length} tokens is longer than the model's context of "
                    f"{self.most_context}"
                )

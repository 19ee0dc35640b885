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
from corematching.answering.encoding import Encoded, Encoder
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

    @property
    def decoding(self) -> str:
        """The settings as text, whatever their order: the same for questions that one batch can answer."""
        return repr(sorted(self.settings.items()))

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the other questions of a run."""
        return self.where, self.text, self.decoding


@dataclass(frozen=True)
class Batch:
    """Questions that run together."""

    indices: list[int]
    questions: list[Question]
    input_ids: Tensor
    """[B, n], left-padded."""
    attention_mask: Tensor
    pictures: list[Encoded]
    """Every different picture once."""
    images: list[list[int]]
    """Per question: its pictures, as indices into ``pictures``."""

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
            [self.pictures[image] for image in shown],
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
    encoder
        Of the model; its processor's tokenizer pads on the left. It is used by a thread of its own while batches are
        made, and a tokenizer must not be used by two threads at once: nobody else may use this one meanwhile.
    prompt, image
        See :mod:`corematching.answering.conversation`.
    """

    def __init__(self, questions: Sequence[Question], encoder: Encoder, prompt: str, image: str) -> None:
        self.questions, self.encoder, self.processor = questions, encoder, encoder.processor
        self.prompt, self.image = prompt, image
        self.most_context = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
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
            return prepare_images(question.images(), self.image, self.processor, self.encoder.recipe)
        except UserError as error:
            raise UserError(f"{question.where}: {error}") from error

    def _asked(self) -> list[Asked]:
        keys = self.pictures.keys()
        pairs = list(zip(self.questions, keys, strict=True))
        texts = [self._rendered(question, len(own)) for question, own in pairs]
        visual = {own: self.encoder.tokens(self.pictures.sizes(own)) for own in set(keys)}
        lengths = [len(ids) for ids in self.processor.tokenizer(texts).input_ids] if texts else []
        return [
            Asked(question.decoding, own, length + visual[own])
            for (question, own), length in zip(pairs, lengths, strict=True)
        ]

    def _rendered(self, question: Question, images: int) -> str:
        return render(self.processor, question.text, images, self.prompt, self.encoder.recipe.system)

    def _batch(self, indices: list[int]) -> Batch:
        numbers: dict[str, int] = {}
        pictures: list[Encoded] = []
        texts, images = [], []
        for index in indices:
            keys = self.pictures.keys()[index]
            if any(key not in numbers for key in keys):
                for key, picture in zip(keys, self.pictures.of(index), strict=True):
                    if key not in numbers:
                        numbers[key] = len(pictures)
                        pictures.append(self._encoded(index, picture))
            images.append([numbers[key] for key in keys])
            start, *rest = self._rendered(self.questions[index], len(keys)).split(self.processor.image_token)
            shown = (pictures[number].text for number in images[-1])
            texts.append(start + "".join(own + after for own, after in zip(shown, rest, strict=True)))
        encoded = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        questions = [self.questions[index] for index in indices]
        self._check_context(questions, encoded["attention_mask"].sum(1).tolist())
        return Batch(list(indices), questions, encoded["input_ids"], encoded["attention_mask"], pictures, images)

    def _encoded(self, index: int, picture: Image.Image) -> Encoded:
        try:
            return self.encoder.picture(picture)
        except UserError as error:
            raise UserError(f"{self.questions[index].where}: {error}") from error

    def _check_context(self, questions: Sequence[Question], lengths: list[int]) -> None:
        for question, length in zip(questions, lengths, strict=True):
            if self.most_context is not None and length > self.most_context:
                raise UserError(
                    f"{question.where}: a prompt of {length} tokens is longer than the model's context of "
                    f"{self.most_context}"
                )

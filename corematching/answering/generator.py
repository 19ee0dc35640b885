"""Answer many questions with one model under one method: ordering, batching, generation, traces.

Knows transformers and the methods, not lmms-eval; `corematching.evaluation.lmms_model` adapts it.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from corematching.answering.conversation import check_choices, prepare_images, render
from corematching.engine.trace import SampleTrace
from corematching.errors import UserError

# What a task may say about generation and we hand to `generate`; sampling settings only where it samples.
_PASSED_ON = ("num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Question:
    """One request. `images` is called when the batch is built, so that only one batch of pictures is in memory."""

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
class Answer:
    """The text, how many tokens it took, what really ran, and whether the model ended it itself.

    An answer that did not end ran into the most new tokens that its task allows.
    """

    text: str
    tokens: int
    trace: SampleTrace
    ended: bool = True


class Generator:
    """Puts questions to a model, batch by batch.

    Parameters
    ----------
    model, processor
        As `corematching.load_model` returns them. The tokenizer is set to pad on the left.
    prompt
        ``llava15`` or ``lmms_eval``; see `corematching.answering.conversation.render`.
    image
        ``pad`` or ``processor``; see `corematching.answering.conversation.prepare_images`.
    batch_size
        Most questions per forward pass. A batch that does not fit into memory is run in halves, and so are later ones.
    max_new_tokens
        Limit for questions whose task states none (the official LLaVA-1.5 evaluation uses 128).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: str = "llava15",
        image: str = "pad",
        batch_size: int = 1,
        max_new_tokens: int = 128,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is not valid: give a count >= 1")
        check_choices(prompt, image)
        self.model, self.processor = model, processor
        self.prompt, self.image = prompt, image
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def answer(
        self, questions: Sequence[Question], method: Any, on_done: Callable[[int], None] = lambda count: None
    ) -> list[Answer]:
        """Answer all questions under `method`, in the given order.

        Questions run grouped by generation settings and sorted by length, longest first, so that batches pad little and
        memory peaks at the start. Apart from lack of memory for a batch of several, an exception in generation is not
        caught: no answer is better than an empty one.

        Parameters
        ----------
        questions
            What to ask.
        method
            A `corematching.methods.base.Method`.
        on_done
            Called after each batch with the number of questions it answered.

        Raises
        ------
        UserError
            If a prompt is longer than the model's context, or a single question does not fit into memory.
        """
        answers: list[Answer | None] = [None] * len(questions)
        with torch.inference_mode(), method(self.model) as trace:
            for batch in self._batches(questions):
                for group in self._by_image_count(questions, batch):
                    for index, answer in self._answered(questions, group, trace):
                        answers[index] = answer
                on_done(len(batch))
        return answers  # type: ignore[return-value]  # every index was in exactly one batch

    def _batches(self, questions: Sequence[Question]) -> Iterator[list[int]]:
        """Indices of questions that share generation settings, longest text first, `batch_size` at a time."""
        alike: dict[str, list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            alike[repr(sorted(question.settings.items()))].append(index)
        lengths = [len(ids) for ids in self.processor.tokenizer([q.text for q in questions]).input_ids]
        for group in alike.values():
            group.sort(key=lambda index: (-lengths[index], index))
            while group:
                batch, group = group[: self.batch_size], group[self.batch_size :]
                yield batch

    def _by_image_count(self, questions: Sequence[Question], batch: Sequence[int]) -> Iterator[list[tuple[int, list]]]:
        """Load a batch's pictures and part it by how many each question has (prompts without one stay apart)."""
        groups: dict[int, list[tuple[int, list]]] = defaultdict(list)
        for index in batch:
            try:
                pictures = prepare_images(questions[index].images(), self.image, self.processor)
            except UserError as error:
                raise UserError(f"{questions[index].where}: {error}") from error
            groups[len(pictures)].append((index, pictures))
        yield from groups.values()

    def _answered(
        self, questions: Sequence[Question], group: list[tuple[int, list]], trace: Any
    ) -> Iterator[tuple[int, Answer]]:
        """Answers of a group by index; in halves, from then on, if memory does not hold it whole."""
        while group:
            part = group[: self.batch_size]
            indices, pictures = zip(*part)
            try:
                found = self._generate([questions[i] for i in indices], pictures, trace)
            except (RuntimeError, MemoryError) as error:
                if not _is_lack_of_memory(error):
                    raise
                found = None
            if found is None:  # out of the handler, which would hold on to the failed pass's tensors
                self._shrink(len(part), questions[indices[0]].where)
                trace.drain()
                continue
            yield from zip(indices, found)
            group = group[len(part) :]

    def _shrink(self, size: int, where: str) -> None:
        """Remember that a batch of ``size`` does not fit into memory, and free what can be."""
        if size == 1:
            raise UserError(
                f"{where}: out of memory with a single sample (batch_size=1): use a smaller dtype, a smaller model or "
                "another device"
            )
        self.batch_size = size // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check_context(self, questions: Sequence[Question], lengths: list[int]) -> None:
        most = getattr(self.model.config.text_config, "max_position_embeddings", None)
        for question, length in zip(questions, lengths):
            if most is not None and length > most:
                raise UserError(
                    f"{question.where}: a prompt of {length} tokens is longer than the model's context of {most}"
                )

    def _generate(self, questions: Sequence[Question], pictures: Sequence[list], trace: Any) -> list[Answer]:
        texts = [render(self.processor, q.text, len(p), self.prompt) for q, p in zip(questions, pictures)]
        images = [picture for own in pictures for picture in own]
        inputs = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        self._check_context(questions, inputs["attention_mask"].sum(1).tolist())
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        settings = questions[0].settings
        output = self.model.generate(**inputs, **self._generate_arguments(settings))
        new = output[:, inputs["input_ids"].shape[1] :]
        samples = trace.drain()
        beams = len(samples) // len(questions)  # beam search runs each prompt once per beam; the first stands for all
        stops = settings.get("until") or ()
        answers = []
        for i, (ids, text) in enumerate(zip(new, self.processor.batch_decode(new, skip_special_tokens=True))):
            tokens, ended = self._length(ids)
            text = _cut(text, [stops] if isinstance(stops, str) else stops)
            answers.append(Answer(text, tokens, _own_share(samples[i * beams], tokens), ended))
        return answers

    def _length(self, ids: torch.Tensor) -> tuple[int, bool]:
        """Tokens up to and including the first end-of-sequence token, or all; and whether there is one."""
        ends = torch.tensor(_as_list(self.model.generation_config.eos_token_id), device=ids.device)
        hits = torch.isin(ids, ends).nonzero()
        return (int(hits[0]) + 1, True) if len(hits) else (len(ids), False)

    def _generate_arguments(self, settings: dict[str, Any]) -> dict[str, Any]:
        """`generate` arguments: greedy unless the task itself asks for sampling."""
        sample = bool(settings.get("do_sample", False))
        arguments = {name: settings[name] for name in _PASSED_ON if settings.get(name) is not None}
        arguments.update({name: settings.get(name) if sample else None for name in _SAMPLING})
        return {
            **arguments,
            "do_sample": sample,
            "max_new_tokens": int(settings.get("max_new_tokens") or self.max_new_tokens),
            "pad_token_id": self.processor.tokenizer.pad_token_id,
        }


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out (torch's allocator on a CPU raises a plain RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _own_share(trace: SampleTrace, tokens: int) -> SampleTrace:
    """The trace of one sample as if its batch had stopped with its own answer instead of the longest one."""
    if trace.guide is not None and trace.guide.answered:
        return trace  # nothing of the guided model ran
    return trace.stopped_after(tokens - 1)


def _cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string, without surrounding blanks."""
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text.strip()


def _as_list(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)

"""Answer many questions with one model under one method: ordering, batching, generation, traces.

Knows transformers and the methods, not lmms-eval; `corematching.evaluation.lmms_model` adapts it.
"""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from corematching.answering.budget import token_budget
from corematching.answering.conversation import check_choices
from corematching.answering.encoding import Encoder
from corematching.answering.features import Features, FeatureStore, can_remember
from corematching.answering.greedy import decode, is_plain
from corematching.answering.prompts import Batch, Prompts, Question
from corematching.answering.recipes import recipe_of
from corematching.engine.sharing import Sharing, can_share, common_layers, most_asked, sharing_prompts
from corematching.engine.trace import SampleTrace
from corematching.errors import UserError
from corematching.models.families import family_of

# What a task may say about generation and we hand to `generate`; sampling settings only where it samples.
_PASSED_ON = ("num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
_SAMPLING = ("temperature", "top_p", "top_k")


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
        ``llava15`` or ``lmms_eval``; see `corematching.answering.conversation.render`. None: as the family is asked.
    image
        ``pad`` or ``processor``; see `corematching.answering.conversation.prepare_images`. None likewise.
    batch_size
        Most questions per forward pass. A batch that does not fit into memory is run in halves, and so are later ones.
    max_new_tokens
        Limit for questions whose task states none (the official LLaVA-1.5 evaluation uses 128).
    batch_tokens
        Most prompt tokens per forward pass, padding included; by default what fits into the memory that is free.
    features
        Where states of the vision tower are kept for later runs, if they are.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: str | None = None,
        image: str | None = None,
        batch_size: int = 1,
        max_new_tokens: int = 128,
        batch_tokens: int | None = None,
        features: FeatureStore | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is not valid: give a count >= 1")
        check_choices(prompt, image)
        self.model, self.processor = model, processor
        self.family = family_of(model.config)
        self.prompt, self.image = recipe_of(model.config).choose(self.family.model_type, prompt, image)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.batch_tokens = batch_tokens
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # A processor of its own: prompts are made by another thread than answers are read in.
        keeps = features is not None and can_remember(model.config)
        self.features = Features(model, features) if keeps else None  # type: ignore[arg-type]
        self.encoder = Encoder(model.config, copy.deepcopy(processor))

    def answer(
        self, questions: Sequence[Question], method: Any, on_done: Callable[[int], None] = lambda count: None
    ) -> list[Answer]:
        """Answer all questions under `method`, in the given order.

        Questions about one picture run together (what their prompts have in common is computed once), otherwise grouped
        by generation settings and sorted by length, longest first, so that batches pad little and memory peaks at the
        start. Apart from lack of memory for a batch of several, an exception in generation is not caught: no answer is
        better than an empty one.

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
        (answers,) = self.answer_together(questions, [method], on_done)
        if isinstance(answers, Exception):
            raise answers
        return answers

    def answer_together(
        self,
        questions: Sequence[Question],
        methods: Sequence[Any],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[list[Answer] | Exception]:
        """Answer all questions under each of several methods, batch by batch, computing once what they share.

        Parameters
        ----------
        questions, on_done
            As for :meth:`answer`.
        methods
            One or more methods. A method that fails is not asked again; the others go on.

        Returns
        -------
        Per method its answers in the order of the questions, or the exception that ended it.
        """
        answers: list[list[Answer | None]] = [[None] * len(questions) for _ in methods]
        failures: dict[int, Exception] = {}
        geometry = self.family.geometry(self.model.config)
        prompts = Prompts(questions, self.encoder, self.prompt, self.image)
        stages = [method.stages(geometry) for method in methods]
        remember = common_layers(stages, geometry.depth)
        most_tokens = self.batch_tokens or token_budget(self.model, len(remember))
        order = sorted(range(len(methods)), key=lambda number: most_asked(stages[number]), reverse=True)
        for batch in prompts.batches(lambda: self.batch_size, most_tokens):
            sharing = self._sharing(batch, remember)
            for number in order:
                if number in failures:
                    continue
                try:
                    for index, answer in self._answered(batch, methods[number], sharing):
                        answers[number][index] = answer
                except Exception as error:  # it belongs to this method alone
                    failures[number] = error
            if len(failures) == len(methods):
                break
            on_done(len(batch.indices))
        # Every index was in exactly one batch.
        return [failures.get(number, own) for number, own in enumerate(answers)]  # type: ignore[misc, arg-type]

    def _sharing(self, batch: Batch, remember: frozenset[int]) -> Sharing:
        image_token = self.family.image_token_id(self.model.config)
        known = self.features.of(batch.pictures) if self.features and batch.pictures else None
        return Sharing.of(batch.input_ids, batch.attention_mask, batch.images, image_token, remember, known)

    def _answered(self, batch: Batch, method: Any, sharing: Sharing) -> Iterator[tuple[int, Answer]]:
        """Answers of a batch by index; in parts, from then on, if memory does not hold it whole."""
        size, found = len(batch.indices), None
        if size <= self.batch_size:
            try:
                found = self._generate(batch, method, sharing)
            except (RuntimeError, MemoryError) as error:
                if not _is_lack_of_memory(error):
                    raise
            if found is not None:
                yield from zip(batch.indices, found)
                return
            # Out of the handler, which would hold on to the failed pass's tensors.
            sharing.memory.clear()
            self._shrink(size, batch.questions[0].where)
        for part in batch.parts(self.batch_size):
            yield from self._answered(part, method, self._sharing(part, frozenset()))

    def _shrink(self, size: int, where: str) -> None:
        """Remember that a batch of ``size`` does not fit into memory, and free what can be."""
        if size == 1:
            raise UserError(
                f"{where}: out of memory with a single sample (batch_size=1): use a smaller dtype, a smaller model or "
                "another device"
            )
        self.batch_size = min(self.batch_size, size // 2)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _generate(self, batch: Batch, method: Any, sharing: Sharing) -> list[Answer]:
        settings = batch.questions[0].settings
        arguments = self._generate_arguments(settings)
        device = self.model.device
        inputs = {"input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device)}
        with torch.inference_mode(), method(self.model) as trace:
            same = self.family.image_tokens(self.model.config) is not None  # else pictures are no rows of one tensor
            shares = same and is_plain(self.model.generation_config, arguments) and can_share(self.model)
            inputs.update(self._visual(batch, range(len(batch.pictures)) if shares else sharing.shown))
            if shares:
                ends = _as_list(self.model.generation_config.eos_token_id)
                with sharing_prompts(self.model, sharing):
                    new = decode(self.model, inputs, arguments["max_new_tokens"], ends, arguments["pad_token_id"])
            else:
                new = self.model.generate(**inputs, **arguments)[:, batch.input_ids.shape[1] :]
            samples = trace.drain()
        beams = len(samples) // len(
            batch.indices
        )  # beam search runs each prompt once per beam; the first stands for all
        stops = settings.get("until") or ()
        answers = []
        for i, (ids, text) in enumerate(zip(new, self.processor.batch_decode(new, skip_special_tokens=True))):
            tokens, ended = self._length(ids)
            text = _cut(text, [stops] if isinstance(stops, str) else stops)
            answers.append(Answer(text, tokens, _own_share(samples[i * beams], tokens), ended))
        return answers

    def _visual(self, batch: Batch, shown: Sequence[int]) -> dict[str, torch.Tensor]:
        """Visual inputs of a batch, with some of its pictures, on the model's device and in its dtype."""
        inputs = self.encoder.joined([batch.pictures[number] for number in shown], batch.input_ids)
        dtype, device = self.model.dtype, self.model.device
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }

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

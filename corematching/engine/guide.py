"""A second, smaller model that answers first and says which visual tokens its answer looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corematching.engine.observed import AttentionTap, TokenProbabilities
from corematching.engine.trace import GuideTrace, SampleTrace, Trace
from corematching.errors import UserError
from corematching.methods.base import BeforeLayer, Guide, Keep, Method
from corematching.methods.dense import Dense
from corematching.methods.views import LayerView
from corematching.models.families import family_of
from corematching.models.loading import load_model

if TYPE_CHECKING:
    from corematching.engine.session import Session

_INPUTS = ("input_ids", "attention_mask", "pixel_values")
_NOT_GREEDY = (
    *("do_sample", "temperature", "top_p", "top_k", "num_beams", "num_return_sequences", "length_penalty"),
    *("streamer", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    *("output_hidden_states", "past_key_values", "cache_implementation", "use_cache"),
    *("prompt_lookup_num_tokens", "assistant_model", "assistant_tokenizer", "num_assistant_tokens"),
)
_NEEDS_THE_GUIDED_MODEL = ("return_dict_in_generate", "num_return_sequences", "streamer", "past_key_values")
"""What ``generate`` cannot give for prompts that only the guide answers."""


@functools.lru_cache(maxsize=2)
def _load(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    return load_model(name, dtype=dtype, device=device)[0]


@dataclass
class Reading:
    """What the guide made of a batch of prompts."""

    scores: Tensor
    """[B, V]: attention that each visual token received."""
    sees: list[bool]
    """Per sample: whether there is an image to guide by."""
    trace: Trace
    """The guide's passes, all samples of one pass after the other."""
    scoring_flops: list[float]
    """Matrix products, per sample, that scoring the visual tokens took."""
    config: Any
    answers: Tensor | None = None
    """Long [B, T]: the guide's greedy answers; None if it only read the prompts."""
    counted: Tensor | None = None
    """Bool [B, T]: answer tokens up to and including each sample's end-of-sequence token."""
    lengths: list[int] = field(default_factory=list)
    """Per sample: its answer's tokens."""
    confidence: list[float] = field(default_factory=list)
    """Per sample: geometric mean of the answer tokens' probabilities."""
    consistency: list[float] = field(default_factory=list)
    """Per sample: probability of the answer when the guide sees a pruned image; empty where nothing asks for it."""
    exits: list[bool] = field(default_factory=list)
    """Per sample, whether the guide's answer is final (empty: none is)."""

    def traces(self) -> list[GuideTrace | None]:
        """One entry per prompt; None for prompts without an image, which no guide reads when they run alone."""
        return [self._trace(row) if seen else None for row, seen in enumerate(self.sees)]

    def _trace(self, row: int) -> GuideTrace:
        passes = self.trace.samples[row :: len(self.scores)]
        if self.lengths:
            # As if the batch had stopped with this sample's answer.
            first, *again = passes
            tokens = self.lengths[row]
            passes = [first.stopped_after(tokens - 1), *(replace(own, head_positions=tokens + 1) for own in again)]
        return GuideTrace(
            self.config,
            passes,
            row in self.final,
            self.scoring_flops[row],
            self.confidence[row] if self.confidence else None,
            self.consistency[row] if self.consistency else None,
        )

    def exit_scores(self, kind: str) -> list[float]:
        """Per sample, what is compared with the early-exit threshold."""
        if kind == "mean":
            return [(first + second) / 2 for first, second in zip(self.confidence, self.consistency, strict=True)]
        return self.confidence if kind == "confidence" else self.consistency

    @property
    def final(self) -> set[int]:
        """Samples whose answer is the guide's."""
        return {row for row, exit_here in enumerate(self.exits) if exit_here}


@dataclass(frozen=True)
class _Pruned(Method):
    """The guide with its own visual tokens pruned before its layer 0, for scoring its answer again."""

    select: Callable[[LayerView], Keep | None]

    def stages(self, geometry: Any) -> list:
        return [BeforeLayer(0, self.select)]


@dataclass
class Guidance:
    """The guide of one installed method."""

    stage: Guide
    session: Session
    reading: Reading | None = None
    """Set while the guided model generates."""
    rows: list[int] = field(default_factory=list)
    """Which samples of the reading it generates for."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """What the guided model was called with last."""

    def __post_init__(self) -> None:
        guided = self.session.model
        self.model = _load(self.stage.model, guided.dtype, guided.device)
        self.family = family_of(self.model.config)
        own, other = self.family.geometry(self.model.config), self.session.geometry
        same_token = self.family.image_token_id(self.model.config) == self.session.family.image_token_id(guided.config)
        if own.image_tokens != other.image_tokens or not same_token:
            raise UserError(
                f"guide={self.stage.model!r} does not fit: it has {own.image_tokens} visual tokens per image, the "
                f"guided model {other.image_tokens}; both must share visual grid and tokenizer"
            )

    # ---------------------------------------------------------------------------------------------- as a layer's stage
    def note_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook on the guided model."""
        if kwargs.get("pixel_values") is not None:
            self.inputs = {name: kwargs.get(name) for name in _INPUTS}

    def select(self, view: LayerView) -> Keep | None:
        """The stage's decision; outside ``generate``, the guide reads the prompt now."""
        reading, rows = self.reading, self.rows
        current = self.session.current
        if current is not None and current.past[0].rows:
            raise UserError(
                f"{self.session.name} cannot reduce a new image in a later turn: its guide has not read the "
                "conversation; begin a new one"
            )
        if reading is None:
            reading = self.read(self.inputs, None)
            rows = list(range(len(reading.scores)))
        if current is not None:
            current.guide = lambda: [reading.traces()[row] for row in rows]
        return self._decide(reading.scores[rows], self.stage.select, view)

    def _decide(
        self, scores: Tensor, select: Callable[[Tensor, LayerView], Keep | None], view: LayerView
    ) -> Keep | None:
        # Beam search repeats every prompt.
        scores = scores.repeat_interleave(len(view.origin) // len(scores), dim=0)
        return select(scores.gather(1, view.origin.clamp(min=0)), view)

    # ----------------------------------------------------------------------------------------------------- the guide
    @torch.no_grad()
    def read(self, inputs: dict[str, Any], options: dict[str, Any] | None) -> Reading:
        """Let the guide read prompts and, given ``generate`` options, answer them greedily."""
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        tap = AttentionTap(self.family, self.model, ids, valid, self.stage.after_image)
        sees = [count > 0 for count in tap.layout.visual_counts]
        with Dense()(self.model) as trace, tap.installed():
            if options is None:
                self.model(**inputs, use_cache=True, logits_to_keep=1)
                spent = tap.spent([1] * len(ids))
                return Reading(tap.passes[0], sees, trace, spent, self.model.config)
            sure = TokenProbabilities()
            options = {**options, "logits_processor": [*(options.get("logits_processor") or []), sure]}
            answers = self.model.generate(**inputs, **options)[:, ids.shape[1] :]
        # Pass p was fed answer token p - 1; after a sample's end it was fed padding.
        counted = self._before_end(answers, options)
        lengths = counted.sum(1).tolist()
        reading = Reading(
            tap.scores(counted), sees, trace, tap.spent(lengths), self.model.config, answers, counted, lengths
        )
        reading.confidence = sure.mean(counted)
        if self.stage.early_exit is not None and self.stage.exit_score != "confidence":
            reading.consistency = self._consistency(reading, inputs, valid)
        return reading

    def _before_end(self, answers: Tensor, options: dict[str, Any]) -> Tensor:
        """Bool [B, T]: answer tokens up to and including each sample's end-of-sequence token."""
        end = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        if end is None:
            return torch.ones_like(answers, dtype=torch.bool)
        ended = torch.isin(answers, torch.as_tensor(end, device=answers.device)).long()
        return ended.cumsum(1) - ended == 0

    def _consistency(self, reading: Reading, inputs: dict[str, Any], valid: Tensor) -> list[float]:
        """Probability of each answer when the guide sees its own pruned image."""
        answers, counted = reading.answers, reading.counted
        assert answers is not None
        assert counted is not None
        # Moved right until every row ends with its own answer: prompts are padded on the left.
        ids = torch.cat([inputs["input_ids"], answers], 1)
        place = torch.arange(ids.shape[1], device=ids.device) - (~counted).sum(1, keepdim=True)
        real = torch.cat([valid, counted], 1).gather(1, place.clamp(min=0)) & (place >= 0)
        ids = ids.gather(1, place.clamp(min=0)).masked_fill(~real, self._pad_token())
        again = {
            **inputs,
            "input_ids": ids,
            "attention_mask": real.long(),
            "position_ids": (real.long().cumsum(1) - 1).clamp(min=0),
        }
        tokens = answers.shape[1]
        with _Pruned(functools.partial(self._decide, reading.scores, self.stage.rescore))(self.model) as trace:
            logits = self.model(**again, logits_to_keep=tokens + 1).logits[:, :-1]
        reading.trace.defer(lambda: trace.samples)
        logs = logits.float().log_softmax(-1).gather(2, ids[:, -tokens:, None])[..., 0]
        own = counted.flip(1)  # a row's answer stands at the end now
        return logs.masked_fill(~own, 0).sum(1).exp().tolist()

    # ---------------------------------------------------------------------------------------- the guided model's answer
    def generate(self, stock: Callable) -> Callable:
        """``generate`` of the guided model: the guide answers first, confident answers are final."""

        @functools.wraps(stock)
        def guided(inputs: Tensor | None = None, **options: Any) -> Any:
            given = {name: options.pop(name, None) for name in _INPUTS}
            given["input_ids"] = given["input_ids"] if inputs is None else inputs
            if given["pixel_values"] is None:
                return stock(**{name: value for name, value in given.items() if value is not None}, **options)
            refused = [name for name in _NEEDS_THE_GUIDED_MODEL if options.get(name) not in (None, False)]
            if options.get("num_return_sequences") == 1:
                refused.remove("num_return_sequences")
            if self.stage.early_exit is not None and refused:
                raise UserError(f"early_exit returns plain sequences, one per prompt: leave {', '.join(refused)} out")
            greedy = {name: value for name, value in options.items() if name not in _NOT_GREEDY}
            image_token = self.family.image_token_id(self.model.config)
            greedy["suppress_tokens"] = [*(options.get("suppress_tokens") or []), image_token]
            given = {name: value for name, value in given.items() if value is not None}
            past = options.get("past_key_values")
            if past is not None and past.get_seq_length() > 0:  # nothing to read: the stage refuses a new image
                return stock(**given, **options)
            reading = self.read(given, {**greedy, "do_sample": False, "num_beams": 1, "use_cache": True})
            return self._finish(stock, given, options, reading)

        return guided

    def _finish(self, stock: Callable, given: dict[str, Tensor], options: dict[str, Any], reading: Reading) -> Any:
        """Take confident answers of the guide, let the guided model answer the other prompts."""
        threshold, batch = self.stage.early_exit, len(reading.scores)
        if threshold is not None:
            # Without an image there is nothing to guide, and nothing to compare a pruned image with.
            sure = reading.exit_scores(self.stage.exit_score)
            reading.exits = [own >= threshold and seen for own, seen in zip(sure, reading.sees, strict=True)]
        rows = [row for row in range(batch) if row not in reading.final]
        if len(rows) == batch:
            return self._guided(stock, given, options, reading, rows)
        assert reading.answers is not None
        answers = torch.cat([given["input_ids"], reading.answers], 1)
        outer, self.session.trace = self.session.trace, Trace()
        inner = self.session.trace
        try:
            if rows:
                own = self._guided(stock, self._only(given, rows), options, reading, rows)
                answers = _merged(answers, own, rows, options.get("pad_token_id") or self._pad_token())
        finally:
            self.session.trace = outer
        outer.defer(functools.partial(self._interleaved, reading, given, inner))
        return answers

    def _guided(
        self, stock: Callable, given: dict[str, Tensor], options: dict[str, Any], reading: Reading, rows: list[int]
    ) -> Any:
        self.reading, self.rows = reading, rows
        try:
            return stock(**given, **options)
        finally:
            self.reading = None

    def _pad_token(self) -> int:
        return self.session.model.generation_config.pad_token_id or 0

    def _images(self, given: dict[str, Tensor]) -> list[int]:
        """Images per prompt."""
        counts = (given["input_ids"] == self.family.image_token_id(self.model.config)).sum(1)
        return (counts // (self.session.geometry.image_tokens or 1)).tolist()

    def _only(self, given: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
        """The prompts of some rows, with their images."""
        images = self._images(given)
        firsts = [sum(images[:row]) for row in range(len(images))]
        wanted = [image for row in rows for image in range(firsts[row], firsts[row] + images[row])]
        part = {name: value[rows] for name, value in given.items() if name != "pixel_values"}
        return {**part, "pixel_values": given["pixel_values"][wanted]} if wanted else part

    def _interleaved(self, reading: Reading, given: dict[str, Tensor], inner: Trace) -> list[SampleTrace]:
        """Traces in the order of the prompts: those of the guided model, and those it was spared."""
        guides, ran = reading.traces(), iter(inner.samples)
        beams = len(inner.samples) // max(1, len(guides) - len(reading.final))
        mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        lengths = mask.sum(1).tolist()
        samples: list[SampleTrace] = []
        for row, guide in enumerate(guides):
            if guide is not None and guide.answered:
                samples += [self._spared(guide, lengths[row])] * max(1, beams)
            else:
                samples += [next(ran) for _ in range(beams)]
        return samples

    def _spared(self, guide: GuideTrace, length: int) -> SampleTrace:
        """The trace of a prompt that the guided model never saw."""
        geometry = self.session.geometry
        nothing = torch.zeros(0, dtype=torch.int32)
        return SampleTrace(
            prompt_tokens=length,
            image_tokens=guide.passes[0].image_tokens,
            images=0,
            visual_tokens=[nothing] * geometry.depth,
            llm_tokens=[0] * geometry.depth,
            kv_lengths=[0] * geometry.depth,
            kv_bytes=0,
            dense_kv_bytes=length * geometry.depth * self.session.kv_row_bytes(self.session.model.dtype.itemsize),
            neurons=[None] * geometry.depth,
            ffn_mode="dense",
            masked_steps=0,
            vision_tokens=[0] * geometry.vision_depth,
            vision_mlp_tokens=[0] * geometry.vision_depth,
            vision_pairs=[0] * geometry.vision_depth,
            projected_tokens=0,
            guide=guide,
        )


def _merged(answers: Tensor, own: Tensor, rows: list[int], pad: int) -> Tensor:
    """Replace some rows of padded sequences by others of another length."""
    width = max(answers.shape[1], own.shape[1])
    merged = answers.new_full((len(answers), width), pad)
    merged[:, : answers.shape[1]] = answers
    merged[rows] = pad
    merged[rows, : own.shape[1]] = own
    return merged

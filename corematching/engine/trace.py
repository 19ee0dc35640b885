"""What really ran, per sample: the single source of FLOPs, bytes and "average retained tokens"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from corematching.models.families import ImageTokens


@dataclass
class SampleTrace:
    """One prompt's, or one turn's, way through the model. Layers are 0-based; token counts exclude padding.

    Every turn on a KV cache has its own entry, with its own new tokens and images; ``kv_lengths`` and the byte counts
    take in earlier turns, since their rows are still there.
    """

    prompt_tokens: int
    """Tokens of the prompt (the turn's new ones) before any reduction, visual tokens included."""
    image_tokens: int
    """Visual tokens before any reduction."""
    images: int
    """Images in the prompt."""
    visual_tokens: list[Tensor]
    """Per layer: original visual-token indices entering it, ascending; merged tokens by representative, -1 = none."""
    llm_tokens: list[int]
    """Per layer: tokens entering it in prefill."""
    kv_lengths: list[int]
    """Per layer: KV cache length after prefill."""
    kv_bytes: int
    """Bytes of the KV cache after prefill."""
    dense_kv_bytes: int
    """Bytes the KV cache would have without reduction."""
    neurons: Sequence[Tensor | None]
    """Per layer: FFN neurons computed in decode (None: all, or not chosen because nothing was decoded)."""
    ffn_mode: str
    """How decode computes FFNs: "dense", "sliced" (only chosen neurons are computed), "masked" (a batch whose samples
    chose differently: same numbers, nothing saved) or "whole" (weights that cannot be sliced, such as those under an
    adapter: likewise)."""
    masked_steps: int
    """Decode steps at the start of a sliced answer whose FFNs were still computed whole, because gathering the chosen
    rows would not have repaid itself had the answer ended there."""
    vision_tokens: list[int]
    """Per tower layer: tokens entering its attention, all images together ([CLS] included)."""
    vision_mlp_tokens: list[int]
    """Per tower layer: tokens entering its MLP (differs when tokens merge in between)."""
    vision_pairs: list[int]
    """Per tower layer: pairs of tokens that its attention compares, each image's own."""
    projected_tokens: int
    """Tokens that went through the projector."""
    head_positions: int = 0
    """Positions for which logits were computed."""
    decode_steps: int = 0
    """Tokens that went through the decoder after prefill, discarded ones included."""
    decode_reach: int | None = None
    """Sum over these of the KV rows behind the prefill's that each attended to; None = one token at a time."""
    shown: list[ImageTokens] = field(default_factory=list)
    """The images: their tiles of visual tokens, and the patches that the vision tower saw."""
    discarded_tokens: int = 0
    """How many of these are no part of the answer: rejected by speculative decoding, or run again without a cache."""
    prefills: int = 1
    """Times the prompt ran: once per step without a KV cache, 0 for the continuation of a copied one."""
    past_tokens: int = 0
    """Tokens of earlier turns on the same KV cache, before any reduction."""
    past_kv: list[int] = field(default_factory=list)
    """Per layer: KV rows of earlier turns; empty in a first one."""
    overhead_flops: float = 0.0
    """Matrix products of the method's own scoring (2 per multiply-add)."""
    predictor_weights: float = 0.0
    """Weights that choosing neurons reads for every decoded token."""
    zeroed_kv: int = 0
    """KV rows overwritten with zeros, all layers together (published-code variant; saves nothing)."""
    guide: GuideTrace | None = None
    """What a guide model did for this prompt."""
    rows_read: list[list[float]] = field(default_factory=list)
    """Per layer and decode step: KV rows read, on average over the KV heads; empty for a layer (or all of them) whose
    steps read every row that is held."""
    choice_flops: list[float] = field(default_factory=list)
    """Per decode step: matrix products of choosing rows; part of ``overhead_flops``."""
    choice_bytes: list[float] = field(default_factory=list)
    """Per decode step: bytes read for choosing rows, apart from those of the rows then attended to."""
    mass_read: list[list[float]] = field(default_factory=list)
    """Per layer and decode step: share of dense attention that falls on the rows read, if that was measured."""

    def rows_held(self, layer: int, step: int) -> int:
        """KV rows that a layer holds in a decode step (counted from 0), the step's own among them."""
        return self.kv_lengths[layer] + step + 1

    def rows_per_step(self, layer: int, steps: int) -> float | None:
        """KV rows that a decode step of a layer reads, on average over ``steps``; None: all that are held.

        Steps beyond those that ran are taken to read as many.
        """
        read = self.rows_read[layer][:steps] if self.rows_read else []
        return sum(read) / len(read) if read else None

    def choosing(self, steps: int) -> tuple[float, float]:
        """FLOPs, and bytes read, for choosing rows in a decode step, on average over ``steps``."""
        flops, read = self.choice_flops[:steps], self.choice_bytes[:steps]
        return (sum(flops) / len(flops), sum(read) / len(read)) if flops else (0.0, 0.0)

    def stopped_after(self, steps: int) -> SampleTrace:
        """The trace of this prompt had its answer ended after so many decode steps."""
        surplus = self.decode_steps - steps
        return replace(
            self,
            decode_steps=steps,
            decode_reach=None,
            discarded_tokens=0,
            head_positions=self.head_positions - surplus,
            overhead_flops=self.overhead_flops - 2 * self.predictor_weights * surplus - sum(self.choice_flops[steps:]),
            rows_read=[read[:steps] for read in self.rows_read],
            choice_flops=self.choice_flops[:steps],
            choice_bytes=self.choice_bytes[:steps],
            mass_read=[share[:steps] for share in self.mass_read],
        )

    @property
    def patches(self) -> list[tuple[int, int, int]]:
        """Per image: (crops or frames, rows, columns) of the patches that the vision tower saw."""
        return [image.patches for image in self.shown]

    @property
    def generated_tokens(self) -> int:
        """Tokens of the answer: one from prefill, the others decoded; the guide's if its answer was taken."""
        if self.guide is not None and self.guide.answered:
            return self.guide.passes[0].generated_tokens
        return self.decode_steps - self.discarded_tokens + 1

    @property
    def computed_tokens(self) -> int:
        """Tokens computed for the answer, those that speculative decoding rejected included."""
        return self.generated_tokens + self.discarded_tokens

    @property
    def average_visual_tokens(self) -> float:
        """Visual tokens per layer, averaged over the layers."""
        return sum(len(layer) for layer in self.visual_tokens) / len(self.visual_tokens)

    def ffn_width(self, neurons: Tensor | None, width: int, steps: int) -> float:
        """FFN neurons that a decode step of a layer computes, on average over ``steps``; ``neurons``: the layer's."""
        if neurons is None or self.ffn_mode in ("masked", "whole"):
            return width
        whole = min(self.masked_steps, steps) / steps if steps else 0.0
        return whole * width + (1 - whole) * len(neurons)

    @property
    def average_neurons(self) -> float | None:
        """FFN neurons per layer in decode, averaged over layers that chose; None if none did."""
        chosen = [len(layer) for layer in self.neurons if layer is not None]
        return sum(chosen) / len(chosen) if chosen else None


@dataclass
class GuideTrace:
    """What a guide model did for one prompt of the model it guides."""

    config: Any
    """The guide's transformers config."""
    passes: list[SampleTrace]
    """Its answer, then the pass that re-scored the answer (with early exit)."""
    answered: bool
    """Whether its answer was taken, so that the guided model never ran."""
    scoring_flops: float = 0.0
    """What finding out the attention that visual tokens received cost (2 per multiply-add)."""
    confidence: float | None = None
    """Geometric mean of the answer tokens' probabilities; None if it only read the prompt."""
    consistency: float | None = None
    """Probability of its answer when it sees a pruned image; None unless early exit asked for it."""


@dataclass
class Trace:
    """The prompts run under one installed method, in order.

    Samples are kept as device tensors during the run and turned into :class:`SampleTrace` when read, so that tracing
    adds no synchronisation to the forward pass.
    """

    _pending: list[tuple[int, Callable[[], list[SampleTrace]]]] = field(default_factory=list, repr=False)
    _deferred: int = field(default=0, repr=False)
    _samples: list[SampleTrace] = field(default_factory=list)

    @property
    def samples(self) -> list[SampleTrace]:
        """One entry per prompt or turn (per beam when beam search expands them)."""
        for _, build in self._pending:
            self._samples.extend(build())
        self._pending.clear()
        return self._samples

    def drain(self) -> list[SampleTrace]:
        """Hand out the samples so far and forget them."""
        samples = self.samples
        self._samples = []
        return samples

    def defer(self, build: Callable[[], list[SampleTrace]]) -> None:
        """Add prompts whose entries are built on first read (called by the engine)."""
        self._pending.append((self._deferred, build))
        self._deferred += 1

    @property
    def mark(self) -> int:
        """A point to go back to with :meth:`rollback`."""
        return self._deferred

    def rollback(self, mark: int) -> None:
        """Forget what was added since and not read yet: the call that ran it failed."""
        self._pending = [entry for entry in self._pending if entry[0] < mark]

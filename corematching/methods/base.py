"""The method contract: what a method may ask for, what it may answer, and where it may act.

A method is a frozen dataclass whose fields are its parameters. It overrides :meth:`Method.stages` and returns one
:class:`Stage` per place where it acts; the engine calls the stage's function with a *view* (the signals) and carries
out the *decision* it returns. Methods never touch caches, masks or modules.

Shapes use these letters: B samples in the batch, V visual tokens per sample (padded to the largest), K tokens kept,
n tokens in the current sequence, d hidden width, H attention heads, I FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from corematching.errors import UserError
from corematching.methods.predictor import Predictor

Budget = int | float
"""How much to keep: a count (int) or a kept fraction (float in (0, 1])."""


# --------------------------------------------------------------------------------------------------- model geometry
@dataclass(frozen=True)
class Geometry:
    """The sizes a method needs to check and place itself; read off the model by its family."""

    depth: int
    """Decoder layers of the language model."""
    ffn_width: int
    """Neurons per FFN."""
    heads: int
    """Attention heads of the language model."""
    image_tokens: int
    """Visual tokens of one image before any reduction."""
    vision_depth: int = 0
    """Layers of the vision tower."""
    vision_feature_layer: int = -2
    """Index into the tower's hidden states from which features are taken."""

    @property
    def vision_score_layer(self) -> int:
        """The tower layer whose output becomes the features."""
        return self.vision_feature_layer % (self.vision_depth + 1) - 1


# -------------------------------------------------------------------------------------------------------- decisions
@dataclass(frozen=True)
class Keep:
    """Keep a subset of the visual tokens, in their order.

    Parameters
    ----------
    mask
        Bool [B, V]: visual tokens to keep. Entries of padded slots are ignored.
    counts
        Kept tokens per sample, when known on the host; saves the device synchronisation that counting would cost.
    """

    mask: Tensor
    counts: list[int] | None = None


@dataclass(frozen=True)
class Replace:
    """Replace the visual tokens by others (kept, merged or new).

    Parameters
    ----------
    hidden
        [B, K, d] the tokens that go on.
    origin
        Long [B, K]: per token the visual slot (index into V) of its representative, -1 when it has none ([CLS], sums
        over many tokens).
    slot
        Long [B, K], values in 0..V-1: the visual slot whose place (and, unless the stage renumbers, position id) the
        token takes; tokens of one slot keep their given order. Defaults to ``origin``.
    counts
        Real tokens per sample if rows are padded at the end; None means K everywhere.
    """

    hidden: Tensor
    origin: Tensor
    slot: Tensor | None = None
    counts: list[int] | None = None


@dataclass(frozen=True)
class Merge:
    """Result of merging inside the vision tower: [N, T', d] tokens, [N, T', 1] sizes and [N, T'] representatives.

    ``origin`` counts positions of the tower's own sequence ([CLS] is 0).
    """

    hidden: Tensor
    sizes: Tensor
    origin: Tensor


@dataclass(frozen=True)
class KeepKV:
    """Keep a subset of one layer's KV cache: long [B, H_kv, K] positions into the current sequence, in order.

    ``valid`` (bool [B, K], optional) marks entries that are padding of rows with fewer kept positions.
    """

    index: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True)
class ZeroKV:
    """Overwrite KV rows with zeros (bool [B, n]). Saves nothing; exists for parity with published code."""

    mask: Tensor


@dataclass(frozen=True)
class Neurons:
    """FFN neurons to compute in decode: long [B, k], ascending per sample.

    Rows with fewer neurons than others repeat one of theirs; a neuron listed twice is computed once.
    """

    index: Tensor


# ------------------------------------------------------------------------------------------------------------ views
class PromptView(Protocol):
    """What is known of the prompt before layer 0; the same object for every stage of one prefill."""

    input_ids: Tensor
    """Long [B, N]."""
    embeds: Tensor
    """[B, N, d] input embeddings with the visual features in place (before any reduction)."""
    visual_mask: Tensor
    """Bool [B, N]: positions of visual tokens."""
    valid: Tensor
    """Bool [B, N]: False on padding."""
    image_counts: list[int]
    """Visual tokens per sample before any reduction."""
    grid: tuple[int, int]
    """Patches per image, (rows, columns)."""
    question_lengths: list[int]
    """Tokens after the last visual token per sample (on the host; the first use synchronises to count them). They are
    the last ones of the sequence at every layer."""
    notes: dict[Any, Any]
    """Scratch space of this prefill, for what a method works out once and uses at several layers."""


class LayerView(Protocol):
    """Signals at the input of a decoder layer during prefill."""

    layer: int
    prompt: PromptView
    hidden: Tensor
    """[B, n, d] input of the layer (= output of the layer before)."""
    valid: Tensor
    """Bool [B, n]: False on padding (left)."""
    visual: Tensor
    """Long [B, V]: positions of the visual tokens in the current sequence, ascending."""
    visual_valid: Tensor
    """Bool [B, V]: False on padded slots."""
    visual_counts: list[int]
    """Visual tokens per sample, on the host."""
    origin: Tensor
    """Long [B, V]: original visual index of each slot (-1: none)."""
    source: Tensor
    """Long [B, n]: index of each token in the original prompt (-1: padding or none)."""

    def attention(self, layer: int, rows: Tensor | None = None) -> Tensor:
        """Attention probabilities [B, H, R, n] of query rows (long [B, R]; default: the last position) at ``layer``.

        ``layer`` is this view's layer (its projections on its input) or the one before (what it really computed).
        """
        ...

    def queries_keys(self, layer: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, H, R, hd] of the rows and keys [B, H, n, hd] of all tokens at ``layer``."""
        ...

    def activations(self) -> Tensor:
        """FFN activations [B, n, I] of the layer before (the stage must declare ``activations=True``)."""
        ...

    entered: Tensor
    """[B, n, d] what entered the layer before."""

    def normed(self) -> Tensor:
        """[B, n, d] ``hidden`` under the decoder's final norm."""
        ...

    def attended(self) -> Tensor:
        """[B, n, d] the layer before after attention and its norm (the stage must declare ``attended=True``)."""
        ...

    def position_kernel(self, layer: int, rows: Tensor) -> Tensor:
        """[B, R, n] what rotary positions alone make of the attention logits: those of all-ones queries and keys."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """Pick the visual tokens of a per-token tensor: [B, n, ...] -> [B, V, ...]."""
        ...

    def spend(self, flops: float) -> None:
        """Book method overhead, in FLOPs per sample (2 per multiply-add)."""
        ...


class VisionView(Protocol):
    """Signals of the vision tower, N images at a time; patches exclude [CLS]."""

    grid: tuple[int, int]

    @property
    def features(self) -> Tensor:
        """[N, P, d_v] patch features at the feature layer."""
        ...

    @property
    def cls(self) -> Tensor:
        """[N, d_v] the [CLS] feature at the feature layer."""
        ...

    def hidden(self, index: int) -> Tensor:
        """Hidden states [N, P + 1, d_v]; ``index`` counts as transformers' ``hidden_states`` does."""
        ...

    def cls_attention(self, layer: int) -> Tensor:
        """Attention probabilities [N, H, P] of [CLS] to the patches in tower layer ``layer`` (may be negative)."""
        ...

    def keys(self, layer: int) -> Tensor:
        """Keys [N, P + 1, H, hd] of tower layer ``layer`` on its normed input, bias included, not scaled."""
        ...

    def cls_query(self, layer: int) -> Tensor:
        """Query [N, H, hd] of [CLS] in tower layer ``layer``, bias included, not scaled."""
        ...

    @property
    def projected(self) -> Tensor:
        """[N, P, d] ``features`` after the multi-modal projector, computed once."""
        ...

    def clip_embeddings(self, text_model: str) -> tuple[Tensor, list[Tensor]]:
        """CLIP's embeddings, not normalised: [N, P, c] of the patches, per image [M, c] of its prompt's instruction.

        ``text_model`` is the path or hub id of the CLIP model that the tower comes from; M counts segments of CLIP's
        context length.
        """
        ...

    def spend(self, flops: float) -> None:
        """Book method overhead, in FLOPs per image (2 per multiply-add)."""
        ...


class BlockView(Protocol):
    """One block of the vision tower, between the attention residual and the MLP."""

    layer: int
    hidden: Tensor
    """[N, T, d_v]."""
    keys: Tensor
    """[N, T, H, hd] keys of this block's attention."""
    sizes: Tensor
    """[N, T, 1] how many patches each token stands for."""
    origin: Tensor
    """Long [N, T] representative of each token."""

    def spend(self, flops: float) -> None:
        """Book method overhead, in FLOPs per image."""
        ...


class KVView(Protocol):
    """One decoder layer after its prefill."""

    layer: int
    keys: Tensor
    """[B, H_kv, n, hd] rotated keys."""
    values: Tensor
    """[B, H_kv, n, hd]."""
    valid: Tensor
    """Bool [B, n]."""
    visual_mask: Tensor
    """Bool [B, n]: visual tokens."""
    lengths: list[int]
    """Valid tokens per sample, on the host."""
    source: Tensor
    """Long [B, n] index of each token in the original prompt."""
    prompt: PromptView

    def queries(self, rows: Tensor) -> Tensor:
        """Rotated queries [B, H, R, hd] of the given positions (long [R], from the layer's own input)."""
        ...

    def activations(self) -> Tensor:
        """FFN activations [B, n, I] of this layer (the stage must declare ``activations=True``)."""
        ...

    def spend(self, flops: float) -> None: ...


class FFNView(Protocol):
    """FFN activations of one layer's prefill."""

    layer: int
    activations: Tensor
    """[B, n, I]."""
    valid: Tensor
    """Bool [B, n]."""
    down_weight: Tensor
    """[d, I] the layer's down projection."""

    def spend(self, flops: float) -> None: ...


# ----------------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True)
class BeforeLayer:
    """Visual tokens leave (or merge) at the input of a decoder layer; layer 0 means before the LLM."""

    layer: int
    select: Callable[[LayerView], Keep | Replace | None]
    activations: bool = False
    """Ask for the FFN activations of the layer before."""
    attended: bool = False
    """Ask for the states of the layer before between its attention (after the norm) and its FFN."""
    renumber: bool = False
    """Give the remaining tokens position ids 0..n-1 instead of their original ones."""


@dataclass(frozen=True)
class VisionOutput:
    """Reduce visual tokens at the tower's output, image by image."""

    select: Callable[[VisionView], Keep | Replace | None]
    renumber: bool = False
    projected: bool = False
    """A :class:`Replace` brings tokens of the LLM's width, made from ``view.projected``."""


@dataclass(frozen=True)
class VisionBlocks:
    """Merge tokens inside every block of the vision tower (called for each layer)."""

    merge: Callable[[BlockView], Merge | None]
    weigh_attention: bool = False
    """Add log(size) of each key to the attention logits of later blocks."""
    renumber: bool = True


@dataclass(frozen=True)
class AfterPrefill:
    """Shrink one layer's KV cache once its prefill is done."""

    layer: int
    select: Callable[[KVView], KeepKV | ZeroKV | None]
    activations: bool = False


@dataclass(frozen=True)
class ChooseNeurons:
    """Choose, from one layer's prefill, the FFN neurons that decode computes."""

    layer: int
    select: Callable[[FFNView], Neurons | None]


@dataclass(frozen=True)
class PredictNeurons:
    """Choose one layer's FFN neurons anew for every decoded token.

    ``predict`` gets the FFN's inputs [T, d] and the layer's predictor, read from ``file`` (None: the file beside the
    model); ``always`` names neurons (long [h]) that every token uses and ``predict`` need not choose.
    """

    layer: int
    predict: Callable[[Tensor, Predictor], Neurons]
    file: str | None = None
    always: Callable[[Predictor], Tensor] | None = None


@dataclass(frozen=True)
class Guide:
    """Let a second, smaller model answer first; its attention ranks the visual tokens.

    ``select`` gets the guide's scores [B, V] of the tokens that are there (attention summed over its layers, heads,
    the positions after the image and the tokens it generated) at the input of ``layer``. With ``early_exit``, the
    guide's answer is final for samples whose confidence reaches it: the product of the answer's token probabilities,
    scored again by the guide after ``select`` pruned its own tokens before its layer 0.
    """

    model: str
    layer: int
    select: Callable[[Tensor, LayerView], Keep | None]
    early_exit: float | None = None


Stage = BeforeLayer | VisionOutput | VisionBlocks | AfterPrefill | ChooseNeurons | PredictNeurons | Guide


# ----------------------------------------------------------------------------------------------------------- method
class Method:
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the parameters.

    Use as ``with method(model) as trace:``; on exit the model is dense again, bit for bit.
    """

    acts_on: ClassVar[frozenset[str]] = frozenset()
    """Which of "tokens", "kv" and "neurons" the method reduces; decides what may be composed."""
    name: ClassVar[str] = ""
    """Registry name, set by the registry from the YAML's file name."""

    def stages(self, geometry: Geometry) -> Sequence[Stage]:
        """Where the method acts on a model of this geometry.

        Raises
        ------
        UserError
            If a parameter does not fit the model (a layer beyond its depth, more tokens than it has).
        """
        raise NotImplementedError

    def __call__(self, model: Any):
        """Install the method on ``model``: a context manager that yields the :class:`~corematching.Trace`."""
        from corematching.engine.session import attach  # the one arrow from methods to the engine, taken at run time

        return attach(self, model)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters as plain values, as they enter a cell's identity."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ parameter checking
def check_budget(name: str, keep: Budget | None, *, fraction_only: bool = False) -> None:
    """Refuse a budget that is neither a positive count nor a fraction in (0, 1].

    Raises
    ------
    UserError
        Names the parameter, the value and what is valid.
    """
    valid = "a kept fraction in (0, 1]" if fraction_only else "a count >= 1 or a kept fraction in (0, 1]"
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise UserError(f"{name}={keep!r} is not valid: give {valid}")
    if isinstance(keep, int) and not fraction_only:
        if keep < 1:
            raise UserError(f"{name}={keep} is not valid: give {valid}")
    elif not 0 < keep <= 1:
        raise UserError(f"{name}={keep} is not valid: give {valid}")


def check_count(name: str, keep: Budget, tokens: int) -> None:
    """Refuse a count larger than the number of visual tokens there are."""
    if isinstance(keep, int) and keep > tokens:
        raise UserError(f"{name}={keep} is more than the {tokens} visual tokens of an image: give 1 to {tokens}")


def check_layer(name: str, layer: int, depth: int, first: int = 0) -> int:
    """Refuse a layer outside the model; returns it."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not first <= layer < depth:
        raise UserError(f"{name}={layer!r} is not a layer of this model: valid are {first} to {depth - 1}")
    return layer


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value outside the named choices."""
    if value not in choices:
        raise UserError(f"{name}={value!r} is not valid: choose from {', '.join(choices)}")


def place(layer: int, depth_fraction: float | None, depth: int, first: int = 0) -> int:
    """The layer where a method acts: absolute, or ``depth_fraction`` of the model's depth when that is given."""
    if depth_fraction is not None:
        check_budget("depth_fraction", depth_fraction, fraction_only=True)
        layer = min(depth - 1, max(first, round(depth_fraction * depth)))
    return check_layer("layer", layer, depth, first)


def count_of(keep: Budget, tokens: int) -> int:
    """How many of ``tokens`` a budget keeps: a count is capped, a fraction is truncated but at least 1."""
    if isinstance(keep, int):
        return min(keep, tokens)
    return min(tokens, max(1, int(keep * tokens)))


def all_tokens(view: LayerView) -> Tensor:
    """Convenience: the mask that keeps every visual token."""
    return torch.ones_like(view.visual_valid)

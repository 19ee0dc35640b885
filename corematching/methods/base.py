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
from typing import Any, ClassVar

from torch import Tensor

from corematching.methods.parameters import check_types
from corematching.methods.predictor import Predictor
from corematching.methods.views import (
    BlockView,
    FFNView,
    KVView,
    LayerView,
    PromptRowsView,
    StepView,
    TowerView,
    VisionView,
)


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
    image_tokens: int | None
    """Visual tokens of one image before any reduction; None where every image has its own number."""
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
    mix
        Combines any per-token rows [B, V, c] as the tokens were combined, to [B, K, c]: models that add visual features
        between layers (deepstack) need what they add to follow the tokens. Such models refuse stages that bring none.
    """

    hidden: Tensor
    origin: Tensor
    slot: Tensor | None = None
    counts: list[int] | None = None
    mix: Callable[[Tensor], Tensor] | None = None


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

    ``valid`` (bool [B, K], optional) is False on padding of rows with fewer kept positions, which stands in front of
    the others; ``counts`` (optional) is their number per sample, if known on the host: it saves the synchronisation
    that counting would cost. A stage that says ``ragged`` gives ``valid`` as [B, H_kv, K], heads having numbers of
    their own.
    """

    index: Tensor
    valid: Tensor | None = None
    counts: list[int] | None = None


@dataclass(frozen=True)
class ZeroKV:
    """Overwrite KV rows with zeros (bool [B, n]). Saves nothing; exists for parity with published code."""

    mask: Tensor


@dataclass(frozen=True)
class ReadRows:
    """The rows of one sample's KV cache that a decode step reads in one layer, its own token's among them.

    ``index`` is long [H_kv, K], each KV head having its rows; or one long [K_h] per KV head where they are of different
    numbers. ``keys`` (optional, [H_kv, K, hd] or one [K_h, hd] per KV head) are attended to instead of these rows' own;
    values are theirs.
    """

    index: Tensor | Sequence[Tensor]
    keys: Tensor | Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Neurons:
    """FFN neurons to compute in decode: long [B, k], ascending per sample.

    Rows with fewer neurons than others repeat one of theirs; a neuron listed twice is computed once.
    """

    index: Tensor


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
    """Give the remaining tokens position ids 0..n-1 instead of their original ones; rows of position ids that say where
    in the image a token lies (mrope) stay."""
    grids: bool = False
    """Needs visual tokens that are plain grids, tile by tile, without newline tokens."""


@dataclass(frozen=True)
class VisionOutput:
    """Reduce visual tokens at the tower's output, image by image."""

    select: Callable[[VisionView], Keep | Replace | None]
    renumber: bool = False
    projected: bool = False
    """A :class:`Replace` brings tokens of the LLM's width, made from ``view.projected``."""
    question: bool = False
    """The choice reads the prompt's text: prompts about one image need choices of their own."""
    text_model: str | None = None
    """CLIP model whose text side the view is asked for, so that it can be looked for before a run."""
    layers: tuple[int, ...] = ()
    """Tower layers whose attention to the patches is asked for."""
    inside: bool = True
    """Reads or replaces the tower's own features, which only families whose tokens are single patches can offer. False:
    it reads attention and projected tokens only, and what it brings has been projected."""


@dataclass(frozen=True)
class VisionBlocks:
    """Merge tokens inside every block of the vision tower (called for each layer)."""

    merge: Callable[[BlockView], Merge | None]
    weigh_attention: bool = False
    """Add log(size) of each key to the attention logits of later blocks."""
    renumber: bool = True


@dataclass(frozen=True)
class VisionDrop:
    """Patches leave inside the vision tower, before each of its blocks ``layers`` (0-based, from 1 on).

    Every image keeps as many as its mask says; the blocks behind, the projector and the LLM see no others.
    """

    layers: tuple[int, ...]
    select: Callable[[TowerView], Keep]
    renumber: bool = False


@dataclass(frozen=True)
class AfterPrefill:
    """Shrink one layer's KV cache once its prefill is done."""

    layer: int
    select: Callable[[KVView], KeepKV | ZeroKV | None]
    activations: bool = False
    ragged: bool = False
    """KV heads keep different numbers of rows; decode steps then attend head by head."""


@dataclass(frozen=True)
class ChooseRows:
    """Choose anew, before every decode step, which rows of one layer's KV cache the step reads; all of them stay.

    ``choose`` is asked about one sample at a time, once the step's own row is in the cache; None reads everything.
    ``begin`` is shown each sample's prompt when the layer's prefill is done. Both note what they need later in the
    view's ``memory``.
    """

    layer: int
    choose: Callable[[StepView], ReadRows | None]
    begin: Callable[[PromptRowsView], None] | None = None
    unrotated: bool = False
    """Ask for queries as they are before rotary embedding, too."""


@dataclass(frozen=True)
class MeasureMass:
    """Let the trace say what share of dense attention falls on the rows that one layer's decode steps read.

    Dense is attention to every row that entered the layer, dropped ones included. Measuring is booked on nobody.
    """

    layer: int


@dataclass(frozen=True)
class ChooseNeurons:
    """Choose, from one layer's prefill, the FFN neurons that decode computes.

    Normally asked right before the first decode step, so that prompts answered by one token do not pay for it; during
    prefill where memory is too short to keep the activations until then.
    """

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
    the prompt's positions from the last visual token on and the tokens it generated) at the input of ``layer``. With
    ``early_exit``, the guide's answer is final for samples whose ``exit_score`` reaches it: "confidence", the geometric
    mean of the answer's token probabilities; "consistency", the product of those that the guide gives them after
    ``rescore`` pruned its own tokens before its layer 0; or the "mean" of both.
    """

    model: str
    layer: int
    select: Callable[[Tensor, LayerView], Keep | None]
    rescore: Callable[[Tensor, LayerView], Keep | None]
    early_exit: float | None = None
    exit_score: str = "mean"
    after_image: bool = False
    """Leave the last visual token out of the positions that query."""


Stage = (
    BeforeLayer
    | VisionOutput
    | VisionBlocks
    | VisionDrop
    | AfterPrefill
    | ChooseRows
    | MeasureMass
    | ChooseNeurons
    | PredictNeurons
    | Guide
)


# ----------------------------------------------------------------------------------------------------------- method
class Method:
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the parameters.

    Use as ``with method(model) as trace:``; on exit the model is dense again, bit for bit.
    """

    acts_on: ClassVar[frozenset[str]] = frozenset()
    """Which of "tokens", "kv" and "neurons" the method reduces; decides what may be composed."""
    name: ClassVar[str] = ""
    """Registry name, set by the registry from the YAML's file name."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let every method's parameters be of the annotated types before its ``__post_init__`` looks at ranges."""
        super().__init_subclass__(**keywords)
        check_ranges = cls.__dict__.get("__post_init__")
        if check_ranges is not None:

            def __post_init__(self: Any) -> None:
                check_types(self)
                check_ranges(self)

            cls.__post_init__ = __post_init__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        check_types(self)

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

"""The signals a method may ask for, as the engine offers them.

Shapes use the letters of :mod:`corematching.methods.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class TileView(Protocol):
    """One grid of an image's visual tokens; see :class:`corematching.models.families.Tile`."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...


class ImageView(Protocol):
    """One image's visual tokens: its tiles, one after the other."""

    @property
    def tiles(self) -> Sequence[TileView]: ...

    @property
    def count(self) -> int:
        """Visual tokens, newlines included."""
        ...


class PromptView(Protocol):
    """What is known of the prompt before layer 0; the same object for every stage of one prefill."""

    @property
    def input_ids(self) -> Tensor:
        """Long [B, N]."""
        ...

    @property
    def embeds(self) -> Tensor:
        """[B, N, d] input embeddings with the visual features in place (before any reduction)."""
        ...

    @property
    def visual_mask(self) -> Tensor:
        """Bool [B, N]: positions of visual tokens."""
        ...

    @property
    def valid(self) -> Tensor:
        """Bool [B, N]: False on padding."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens per sample before any reduction, on the host."""
        ...

    @property
    def image_counts(self) -> list[int]:
        """Visual tokens per sample before any reduction."""
        ...

    @property
    def images(self) -> Sequence[Sequence[ImageView]]:
        """The images of every sample before any reduction."""
        ...

    @property
    def question_lengths(self) -> list[int]:
        """Tokens after the last visual token per sample, on the host (the first use synchronises to count them).

        They are the last ones of the sequence at every layer.
        """
        ...

    @property
    def notes(self) -> dict[Any, Any]:
        """Scratch space of this prefill, for what a method works out once and uses at several layers."""
        ...


class LayerView(Protocol):
    """Signals at the input of a decoder layer during prefill."""

    @property
    def layer(self) -> int: ...

    @property
    def prompt(self) -> PromptView: ...

    @property
    def hidden(self) -> Tensor:
        """[B, n, d] input of the layer (= output of the layer before)."""
        ...

    @property
    def valid(self) -> Tensor:
        """Bool [B, n]: False on padding (left)."""
        ...

    @property
    def visual_mask(self) -> Tensor:
        """Bool [B, n]: visual tokens."""
        ...

    @property
    def visual(self) -> Tensor:
        """Long [B, V]: positions of the visual tokens in the current sequence, ascending."""
        ...

    @property
    def visual_valid(self) -> Tensor:
        """Bool [B, V]: False on padded slots."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens per sample, on the host."""
        ...

    @property
    def visual_counts(self) -> list[int]:
        """Visual tokens per sample, on the host."""
        ...

    @property
    def origin(self) -> Tensor:
        """Long [B, V]: original visual index of each slot (-1: none)."""
        ...

    @property
    def source(self) -> Tensor:
        """Long [B, n]: index of each token in the original prompt (-1: padding or none)."""
        ...

    def fact(self, name: str) -> Tensor:
        """Long [B, V], what is known of each slot's token, or of the one whose place it has taken.

        "image": number of its image in the sample; "tile": number of its tile in the image; "kind": patch, newline,
        thumbnail or frame (index into ``corematching.models.families.KINDS``); "row", "column": place in the tile's
        grid, of "tile_rows" by "tile_columns" (a newline stands behind its row's last column).
        """
        ...

    def attention(self, layer: int, rows: Tensor | None = None, counts: list[int] | None = None) -> Tensor:
        """Attention probabilities [B, H, R, n] of query rows (long [B, R]; default: the last position) at ``layer``.

        ``counts`` says how many of the rows are each sample's own, where some are padding: padding costs nothing.
        ``layer`` is this view's layer (its projections on its input) or the one before (what it really computed).
        """
        ...

    def queries_keys(
        self, layer: int, rows: Tensor | None = None, counts: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, H, R, hd] of the rows and keys [B, H, n, hd] of all tokens at ``layer``."""
        ...

    def activations(self) -> Tensor:
        """FFN activations [B, n, I] of the layer before (the stage must declare ``activations=True``)."""
        ...

    @property
    def entered(self) -> Tensor:
        """[B, n, d] what entered the layer before."""
        ...

    def normed(self) -> Tensor:
        """[B, n, d] ``hidden`` under the decoder's final norm."""
        ...

    def attended(self) -> Tensor:
        """[B, n, d] the layer before after attention and its norm (the stage must declare ``attended=True``)."""
        ...

    def position_kernel(self, layer: int, rows: Tensor, counts: list[int] | None = None) -> Tensor:
        """[B, R, n] what rotary positions alone make of the attention logits: those of all-ones queries and keys."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """Pick the visual tokens of a per-token tensor: [B, n, ...] -> [B, V, ...]."""
        ...

    def spend(self, flops: float | Sequence[float]) -> None:
        """Book method overhead: the matrix products of a sample (2 FLOPs per multiply-add; other work is left out).

        One number per sample, counting its own tokens and not the batch's padding; or one for every sample alike.
        """
        ...

    def charging(self, samples: Sequence[bool]) -> AbstractContextManager[None]:
        """Within the context, signals and :meth:`spend` cost the named samples only.

        For samples that stay as they are while others of the batch are reduced: alone, nothing would be looked at.
        """
        ...


class VisionView(Protocol):
    """Signals of the vision tower, N images at a time; patches exclude [CLS]."""

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
        """Attention probabilities [N, H, P] of [CLS] to the patches in tower layer ``layer`` (may be negative).

        In towers without [CLS]: what each patch receives, on average over the patches. Where tokens are no single
        patches, theirs are averaged, and a newline token gets the mean of the row (or tile) it ends.
        """
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

    def spend(self, flops: float | Sequence[float]) -> None:
        """Book method overhead: the matrix products of an image (2 FLOPs per multiply-add; other work is left out).

        One number per image, or one for every image alike.
        """
        ...


class BlockView(Protocol):
    """One block of the vision tower, between the attention residual and the MLP."""

    @property
    def layer(self) -> int: ...

    @property
    def hidden(self) -> Tensor:
        """[N, T, d_v]."""
        ...

    @property
    def keys(self) -> Tensor:
        """[N, T, H, hd] keys of this block's attention."""
        ...

    @property
    def sizes(self) -> Tensor:
        """[N, T, 1] how many patches each token stands for."""
        ...

    @property
    def origin(self) -> Tensor:
        """Long [N, T] representative of each token."""
        ...

    def spend(self, flops: float | Sequence[float]) -> None:
        """Book method overhead, as :meth:`VisionView.spend` does."""
        ...


class TowerView(Protocol):
    """N images between two blocks of the vision tower, P the patches of the one with most; [CLS] is not among them."""

    @property
    def layer(self) -> int:
        """The block that comes next."""
        ...

    @property
    def valid(self) -> Tensor:
        """Bool [N, P]: False on padding (at the end)."""
        ...

    def cls_attention(self) -> Tensor:
        """Attention probabilities [N, H, P] of [CLS] to the patches in the block before."""
        ...

    def head_norms(self) -> Tensor:
        """[N, H, P] length of what every head of the block before gave out for each patch."""
        ...

    def spend(self, flops: float | Sequence[float]) -> None:
        """Book method overhead, as :meth:`VisionView.spend` does."""
        ...


class KVView(Protocol):
    """One decoder layer after its prefill."""

    @property
    def layer(self) -> int: ...

    @property
    def keys(self) -> Tensor:
        """[B, H_kv, n, hd] rotated keys."""
        ...

    @property
    def values(self) -> Tensor:
        """[B, H_kv, n, hd]."""
        ...

    @property
    def valid(self) -> Tensor:
        """Bool [B, n]."""
        ...

    @property
    def visual_mask(self) -> Tensor:
        """Bool [B, n]: visual tokens."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Valid tokens per sample, on the host."""
        ...

    @property
    def visual_counts(self) -> list[int]:
        """Visual tokens per sample, on the host."""
        ...

    @property
    def source(self) -> Tensor:
        """Long [B, n] index of each token in the original prompt."""
        ...

    @property
    def prompt(self) -> PromptView: ...

    def queries(self, rows: Tensor, counts: list[int] | None = None) -> Tensor:
        """Rotated queries [B, H, R, hd] of the given positions (long [R], from the layer's own input).

        ``counts``: how many of them each sample asks for (default: all); only these cost it anything.
        """
        ...

    def activations(self) -> Tensor:
        """FFN activations [B, n, I] of this layer (the stage must declare ``activations=True``)."""
        ...

    def spend(self, flops: float | Sequence[float]) -> None: ...


class PromptRowsView(Protocol):
    """One sample's rows of one decoder layer after its prefill, without padding; earlier turns' rows stand in front."""

    @property
    def layer(self) -> int: ...

    @property
    def rows(self) -> int:
        """Rows in the cache (n)."""
        ...

    @property
    def length(self) -> int:
        """How many of them, the last ones, are this turn's."""
        ...

    @property
    def keys(self) -> Tensor:
        """[H_kv, n, hd] rotated keys."""
        ...

    @property
    def values(self) -> Tensor:
        """[H_kv, n, hd]."""
        ...

    @property
    def visual_mask(self) -> Tensor:
        """Bool [n]: this turn's visual tokens."""
        ...

    @property
    def question_length(self) -> int:
        """Tokens after the turn's last visual token."""
        ...

    @property
    def memory(self) -> dict[Any, Any]:
        """What the method notes of this sample, all layers together; values are replaced, never written into."""
        ...

    def queries(self, last: int) -> Tensor:
        """Rotated queries [H, last, hd] of the turn's last tokens, at most ``length``."""
        ...

    def unrotated_queries(self, last: int) -> Tensor:
        """The same as the query projection gives them."""
        ...

    def attention(self, last: int) -> Tensor:
        """Attention probabilities [H, last, n] of the turn's last tokens, in single precision."""
        ...

    def spend(self, flops: float) -> None:
        """Book method overhead: matrix products, 2 FLOPs per multiply-add."""
        ...


class StepView(Protocol):
    """One sample's rows of one decoder layer in a decode step, the step's own row the last of them."""

    @property
    def layer(self) -> int: ...

    @property
    def step(self) -> int:
        """Tokens decoded before this one since the prefill."""
        ...

    @property
    def rows(self) -> int:
        """Rows in the cache (n)."""
        ...

    @property
    def query(self) -> Tensor:
        """[H, hd] the step's rotated query."""
        ...

    @property
    def unrotated_query(self) -> Tensor:
        """[H, hd] the same as the query projection gives it (the stage must declare ``unrotated=True``)."""
        ...

    @property
    def keys(self) -> Tensor:
        """[H_kv, n, hd] rotated keys. Looking at them is reading them: book it with ``spend``."""
        ...

    @property
    def values(self) -> Tensor:
        """[H_kv, n, hd]."""
        ...

    @property
    def memory(self) -> dict[Any, Any]:
        """What the method notes of this sample, all layers together; values are replaced, never written into."""
        ...

    def attention(self, index: Tensor | None = None) -> Tensor:
        """Attention probabilities [H, K] over rows (long [H_kv, K]; default: all), in single precision."""
        ...

    def keys_of(self, layer: int) -> Tensor:
        """Keys [H_kv, n, hd] of an earlier layer that holds the same rows."""
        ...

    def spend(self, flops: float, read: float = 0.0) -> None:
        """Book method overhead: matrix products (2 FLOPs per multiply-add), and bytes read for them."""
        ...


class FFNView(Protocol):
    """FFN activations of one layer's prefill."""

    @property
    def layer(self) -> int: ...

    @property
    def activations(self) -> Tensor:
        """[B, n, I]."""
        ...

    @property
    def valid(self) -> Tensor:
        """Bool [B, n]."""
        ...

    @property
    def visual_mask(self) -> Tensor:
        """Bool [B, n]: visual tokens."""
        ...

    @property
    def prompt(self) -> PromptView: ...

    @property
    def down_weight(self) -> Tensor:
        """[d, I] the layer's down projection."""
        ...

    def spend(self, flops: float | Sequence[float]) -> None: ...

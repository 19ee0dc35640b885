"""What the KV-cache methods share: budgets, attention sums over chosen query rows, and keeping the best positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from corematching.errors import UserError
from corematching.methods.base import KeepKV
from corematching.methods.parameters import Budget, check_budget, check_choice, check_least, count_of
from corematching.methods.views import KVView

TIES = ("topk", "first")
"""Which of equal scores wins: see :func:`ranked`."""
ROWS_AT_ONCE = 64
"""Query rows whose attention is held at a time."""


def check_recent(keep: Budget, recent: Budget | None) -> None:
    """Refuse budgets that are out of range or, where comparable, a part larger than the whole."""
    check_budget("keep", keep)
    if recent is not None:
        check_budget("recent", recent)
        if type(keep) is type(recent) and recent > keep:
            raise UserError(f"recent={recent} is not valid: give at most keep={keep}")


def recent_counts(view: KVView, totals: list[int], recent: Budget | None) -> list[int]:
    """How many of the kept rows are the last positions, per sample; None = half of them."""
    if recent is None:
        return [total // 2 for total in totals]
    return [min(total, count_of(recent, length)) for total, length in zip(totals, view.lengths, strict=True)]


def kept_counts(view: KVView, keep: Budget) -> list[int]:
    """KV rows to keep per sample; fractions are of the tokens that entered the layer."""
    return [count_of(keep, length) for length in view.lengths]


def asking(view: KVView, kept: list[int], rows: list[int]) -> list[int]:
    """Query rows per sample, none for those that stay whole while others of the batch are cut."""
    return [0 if keep == length else own for keep, length, own in zip(kept, view.lengths, rows, strict=True)]


def distance_from_end(valid: Tensor) -> Tensor:
    """Long [1, n]: 1 for the last position (sequences are left-padded)."""
    return torch.arange(valid.shape[1], 0, -1, device=valid.device)[None]


def per_row(counts: list[int], like: Tensor) -> Tensor:
    """Host counts as [B, 1] on the device."""
    return torch.tensor(counts, device=like.device)[:, None]


def attention_received(view: KVView, rows: list[int], weights: Tensor, plus_one: bool = False) -> Tensor:
    """Weighted sums of attention probabilities over the last query rows, a few rows at a time.

    Parameters
    ----------
    rows
        How many of the last positions query, per sample.
    weights
        [B, R, G]: weight of each of the last R = max(rows) query rows in each of G sums (0 where it does not query).
    plus_one
        Add one to the softmax's denominator ("softmax-one"), so that a row may attend to nothing.

    Returns
    -------
    [B, H_kv, G, n], mean over the query heads that share a key head.
    """
    batch, kv_heads, length, head_dim = view.keys.shape
    transposed = view.keys.transpose(2, 3)
    received = transposed.new_zeros(batch, kv_heads, weights.shape[2], length, dtype=torch.float32)
    index = torch.arange(length, device=transposed.device)
    first = length - max(rows)
    for start in range(first, length, ROWS_AT_ONCE):
        chunk = index[start : start + ROWS_AT_ONCE]
        own = [min(len(chunk), max(0, start + len(chunk) - length + count)) for count in rows]
        queries = view.queries(chunk, own)
        groups = queries.shape[1] // kv_heads
        # Query heads of one key head lie together: [B, H_kv, groups * R, hd].
        logits = (queries.unflatten(1, (kv_heads, groups)).flatten(2, 3) @ transposed).float() * head_dim**-0.5
        visible = (index <= chunk[:, None]) & view.valid[:, None]
        logits = logits.unflatten(2, (groups, -1)).masked_fill(~visible[:, None, None], torch.finfo(torch.float32).min)
        if plus_one:
            # A further logit of 0, whose probability is dropped.
            logits = torch.nn.functional.pad(logits, (1, 0))
        probabilities = logits.softmax(-1)[..., int(plus_one) :].mean(2)
        share = weights[:, start - first : start - first + len(chunk)].float()
        received += share.transpose(1, 2)[:, None] @ probabilities
        each = queries.shape[1] * head_dim + kv_heads * weights.shape[2]
        view.spend([2 * count * keys * each for count, keys in zip(own, view.lengths, strict=True)])
    return received


POOLINGS: dict[str, Callable[..., Tensor]] = {"avg": avg_pool1d, "max": max_pool1d}


def check_window(window: int, kernel: int, pooling: str) -> None:
    """Refuse an observing window or a smoothing that cannot be."""
    check_choice("pooling", pooling, tuple(POOLINGS))
    check_least("window", window)
    check_kernel(kernel)


def check_kernel(kernel: int) -> None:
    """Refuse a width of smoothing that has no middle."""
    if kernel % 2 != 1 or kernel < 1:
        raise UserError(f"kernel={kernel!r} is not valid: give an odd count >= 1")


def window_scores(view: KVView, counts: list[int], window: int, kernel: int, pooling: str) -> Tensor:
    """[B, H_kv, n]: what each position receives from the last ``window`` ones, smoothed along the sequence.

    Nobody observes for samples that keep all of their rows (``counts``). Smoothing pads with zeros beyond the first
    position and before the window.
    """
    rows = asking(view, counts, [min(window, length) for length in view.lengths])
    received = attention_received(view, rows, view.valid[:, -max(rows) :, None])[:, :, 0]
    received = received.masked_fill(distance_from_end(view.valid)[:, None] <= window, 0)
    return POOLINGS[pooling](received, kernel, stride=1, padding=kernel // 2)


def ranked(scores: Tensor, candidates: list[range], counts: list[int], ties: str) -> tuple[Tensor, Tensor]:
    """The best candidates of every sample and head, best first.

    Parameters
    ----------
    scores
        [B, H, n], higher = keep.
    candidates
        Positions to choose from, per sample.
    counts
        How many are chosen, per sample; at most as many as there are candidates.
    ties
        Which of equal scores wins: as ``torch.topk`` has it on this device ("topk", what official codes call), or the
        lower position ("first", the same everywhere).

    Returns
    -------
    Positions (long [B, H, K], K the largest count) and which of them are a sample's own (bool [B, H, K]).
    """
    chosen = torch.zeros(*scores.shape[:2], max(counts), dtype=torch.long, device=scores.device)
    for choice in dict.fromkeys(zip(candidates, counts, strict=True)):
        # Every sample without its padding, as if it ran alone; those of the same shape go together.
        rows = [row for row, own in enumerate(zip(candidates, counts, strict=True)) if own == choice]
        span, count = choice
        part = scores[rows, :, span.start : span.stop]
        order = (
            part.topk(count, dim=2).indices
            if ties == "topk"
            else part.argsort(dim=2, descending=True, stable=True)[:, :, :count]
        )
        chosen[rows, :, :count] = order + span.start
    own = torch.arange(chosen.shape[2], device=scores.device) < per_row(counts, scores)
    return chosen, own[:, None].expand_as(chosen)


def marks(chosen: Tensor, own: Tensor, length: int) -> Tensor:
    """Bool [B, H, length]: the positions that :func:`ranked` chose."""
    counted = torch.zeros(*chosen.shape[:2], length, dtype=torch.int8, device=chosen.device)
    return counted.scatter_add(2, chosen, own.to(torch.int8)) > 0


def keep_best(scores: Tensor, lengths: list[int], counts: list[int], last: list[int], ties: str) -> KeepKV:
    """Keep the last positions of every sample and the best-scoring earlier ones, in ascending order.

    Parameters
    ----------
    scores
        [B, H, n].
    lengths
        Valid positions per sample (padding stands on the left).
    counts, last
        Positions to keep per sample, and how many of them are its last ones.
    ties
        As in :func:`ranked`.
    """
    n = scores.shape[2]
    earlier = [range(n - length, n - own) for length, own in zip(lengths, last, strict=True)]
    chosen, own = ranked(scores, earlier, [count - end for count, end in zip(counts, last, strict=True)], ties)
    recent = torch.arange(n, 0, -1, device=scores.device) <= per_row(last, scores)
    return keep_marked(marks(chosen, own, n) | recent[:, None], counts)


def keep_marked(marked: Tensor, counts: list[int], positions: Tensor | None = None) -> KeepKV:
    """Keep the marked entries of bool [B, H, m], where every head of sample b marks ``counts[b]`` of them.

    ``positions`` (long [B, H, m]) are the sequence positions of the entries; by default their own indices.
    """
    width = max(counts)
    # Unmarked entries sort to the front: what is left of them pads the shorter samples there.
    index = marked.to(torch.int8).argsort(dim=2, stable=True)[:, :, -width:]
    valid = distance_from_end(index[:, 0]) <= per_row(counts, index)
    if positions is not None:
        index = positions.gather(2, index)
    return KeepKV(index, None if min(counts) == width else valid, counts)

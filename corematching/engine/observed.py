"""What is noted while a stock model answers: attention that visual tokens receive, and how sure it is of each token."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from corematching.engine.layout import Layout
from corematching.engine.views import heads_of, rotate
from corematching.models.families import Family


class AttentionTap:
    """Hooks on a stock decoder that sum the attention visual tokens receive, pass by pass.

    In the pass that reads the prompt, the positions from the last visual token on query (without that token if
    ``after_image``); in later ones, the decoded token. Only these query rows are computed again; keys come from the
    cache.
    """

    def __init__(self, family: Family, model: Any, input_ids: Tensor, valid: Tensor, after_image: bool) -> None:
        positions = torch.zeros_like(input_ids)
        self.layout = Layout.of_prompt(input_ids, valid, positions, family.image_token_id(model.config))
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        is_visual = self.layout.visual_id > -2
        last = (index * is_visual).amax(1, keepdim=True)
        self.observes = valid & (index >= last + int(after_image)) & is_visual.any(1, keepdim=True)
        self.rows = self.observes.sum(1).tolist()
        self.passes: list[Tensor] = []
        """Per pass: [B, V]."""
        self.flops: list[list[float]] = []
        """Per pass: matrix products of the recomputed rows, per sample."""
        decoder: Any = family.decoder(model)
        self.layers = decoder.layers[: decoder.config.num_hidden_layers]

    @contextmanager
    def installed(self):
        """Keep the hooks on for the duration of the context."""
        handles = [
            layer.self_attn.register_forward_hook(functools.partial(self._note, index), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def scores(self, counted: Tensor) -> Tensor:
        """Attention received, [B, V]; pass p counts for the samples in column p of bool [B, passes]."""
        return sum(received * counted[:, step, None] for step, received in enumerate(self.passes))  # type: ignore[return-value]

    def spent(self, passes: list[int]) -> list[float]:
        """FLOPs of each sample's first so many passes; none for prompts without an image."""
        return [
            sum(own[row] for own in self.flops[:count]) if self.rows[row] else 0.0 for row, count in enumerate(passes)
        ]

    def _note(self, index: int, attn: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        module: Any = attn
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        if index == 0:
            self.passes.append(self.layout.visual_valid.new_zeros(self.layout.visual_valid.shape, dtype=torch.float32))
            self.flops.append([0.0] * len(hidden))
        reading = len(self.passes) == 1
        rows = max(1, *self.rows) if reading else hidden.shape[1]
        queries = rotate(heads_of(module, "q", hidden[:, -rows:]), cos[:, -rows:], sin[:, -rows:])
        keys = kwargs["past_key_values"].layers[index].keys
        keys = keys.repeat_interleave(module.num_key_value_groups, dim=1)
        length = keys.shape[2]
        place = torch.arange(length, device=keys.device)
        generated = length - self.layout.valid.shape[1]
        decoded = self.layout.valid.new_ones(len(keys), generated)
        visible = torch.cat([self.layout.valid, decoded], 1)[:, None] & (place <= place[-rows:, None])
        logits = (queries @ keys.transpose(2, 3)).float() * module.scaling
        projection = module.q_proj.in_features * module.q_proj.out_features
        for row, own in enumerate(self.layout.lengths):
            each = projection + keys.shape[1] * (own + generated) * module.head_dim
            self.flops[-1][row] += 2 * (self.rows[row] if reading else rows) * each
        probabilities = logits.masked_fill(~visible[:, None], torch.finfo(logits.dtype).min).softmax(-1)
        if reading:
            probabilities = probabilities * self.observes[:, None, -rows:, None]
        received = probabilities.sum((1, 2)).gather(1, self.layout.visual)
        self.passes[-1] += received * self.layout.visual_valid


class TokenProbabilities(LogitsProcessor):
    """Notes the probability of the likeliest token at every step of a greedy answer; changes nothing."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        """Per step: log-probabilities [B]."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.float().log_softmax(-1).amax(-1))
        return scores

    def mean(self, counted: Tensor) -> list[float]:
        """Geometric mean over each sample's own tokens (bool [B, T])."""
        logs = torch.stack(self.steps, 1).masked_fill(~counted, 0)
        return (logs.sum(1) / counted.sum(1)).exp().tolist()

"""What answering cannot do without when everything that answers have in common is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from corematching.cost.flops import flops, layer_flops, vision_flops
from corematching.engine.trace import SampleTrace


def least_flops(
    config: Any, answers: Sequence[Sequence[SampleTrace]], groups: Sequence[int], ends: Sequence[int]
) -> float:
    """FLOPs that cannot be shared, 2 per multiply-add: the arithmetic limit of answering questions together.

    An image is encoded once, the common beginning of its prompts runs once, and layers below the first difference
    between methods run once for all of them. Decoding, the output head and what methods spend on choosing are counted
    as if alone.

    Parameters
    ----------
    config
        The model's transformers configuration.
    answers
        Per method: the traces of its answers, in the order of the questions.
    groups, ends
        Per question: the number of its group of prompts that begin alike, and its own tokens behind that beginning;
        see :class:`corematching.engine.sharing.Sharing`.
    """
    once: dict[tuple, float] = {}
    own = 0.0
    for method, traces in enumerate(answers):
        members: dict[int, list[int]] = {}
        for question, group in enumerate(groups):
            members.setdefault(group, []).append(question)
        for group, questions in members.items():
            shown = [traces[question] for question in questions]
            own += sum(part.decode + part.lm_head + part.overhead for part in (flops(config, one) for one in shown))
            tower = (tuple(shown[0].vision_tokens), tuple(shown[0].vision_mlp_tokens))
            once["tower", group, tower] = vision_flops(config, shown[0])
            once["projector", group, tower, shown[0].projected_tokens] = flops(config, shown[0]).projector
            alike = whole = True
            for layer in range(len(shown[0].llm_tokens)):
                kept = [one.visual_tokens[layer] for one in shown]
                alike = alike and all(torch.equal(kept[0], other) for other in kept[1:])
                whole = whole and alike and all(len(kept[0]) == one.image_tokens for one in shown)
                of = "all" if whole else method
                for question, one in zip(questions, shown, strict=True):
                    tokens = one.llm_tokens[layer]
                    begin = tokens - ends[question]
                    if alike:
                        once["begin", of, group, layer] = layer_flops(config, begin, begin)
                        once["end", of, question, layer] = layer_flops(config, ends[question], tokens)
                    else:
                        own += layer_flops(config, tokens, tokens)
    return own + sum(once.values())

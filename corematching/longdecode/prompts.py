"""Prompts of growing length: the mini suite's questions about many pictures, or random ones for random weights."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from corematching.answering.conversation import render as conversation
from corematching.benchmarks.mini.drawing import render
from corematching.benchmarks.mini.long import colour_question
from corematching.benchmarks.mini.scenes import COLOURS, make_scene
from corematching.efficiency.inputs import fixed_inputs

FIRST_SCENE = 3_000_000_000_000
"""Far beyond those of the mini suite's benchmarks."""


def prompt_of(model: Any, processor: Any, images: int, number: int, seed: int, settings: Mapping[str, Any]) -> dict:
    """Model inputs of prompt ``number`` about so many pictures."""
    if processor is None or settings["model"]["weights"] == "random":
        inputs: dict[str, Tensor] = fixed_inputs(model, images=images, seed=seed * 1000 + number)
        return inputs
    first = FIRST_SCENE + (seed * 1000 + number) * 1000
    colour = random.Random(f"long decode:{seed}:{number}").choice(list(COLOURS))
    pictures = [render(make_scene(first + place, "test")) for place in range(images)]
    text = conversation(processor, colour_question(colour), images, settings["prompt"])
    inputs = processor(images=pictures, text=text, return_tensors="pt").to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return dict(inputs)

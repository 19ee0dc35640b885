"""What training and checks on scenes need of a finished model: its processor, and prompts about scenes."""

from __future__ import annotations

from typing import Any

from corematching.answering import conversation
from corematching.benchmarks.mini.drawing import render
from corematching.benchmarks.mini.scenes import Scene
from corematching.errors import UserError
from corematching.models.loading import load_model


def load_with_processor(name: str) -> tuple[Any, Any]:
    """A model and its processor.

    Raises
    ------
    UserError
        If the model cannot be loaded, or comes without a processor.
    """
    model, processor = load_model(name)
    if processor is None:
        raise UserError(f"{name} comes without a processor, which prompts with images need")
    return model, processor


def inputs_about(processor: Any, scene: Scene, question: str) -> Any:
    """Model inputs of one question about a scene, asked as LLaVA-1.5 is."""
    text = conversation.render(processor, question, 1, "llava15")
    return processor(images=render(scene), text=text, return_tensors="pt")

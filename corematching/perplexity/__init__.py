"""The text road: how well a language model predicts running text while a method chooses its FFN neurons."""

from __future__ import annotations

from omegaconf import DictConfig

from corematching.evaluation.runner import prepare_libraries


def run(config: DictConfig) -> int:
    """Run a text experiment (see :func:`corematching.perplexity.bench.run`)."""
    prepare_libraries()  # before transformers is imported, which then draws progress bars of its own

    from corematching.perplexity.bench import run as measure

    return measure(config)

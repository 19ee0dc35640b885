"""The long-decode road: what decode steps read, cover, say and take when contexts and answers are long."""

from __future__ import annotations

from omegaconf import DictConfig

from corematching.evaluation.runner import prepare_libraries


def run(config: DictConfig) -> int:
    """Run a long-decode experiment (see :func:`corematching.longdecode.bench.run`)."""
    prepare_libraries()  # before transformers is imported, which then draws progress bars of its own

    from corematching.longdecode.bench import run as measure

    return measure(config)

"""What comes first where not the real thing runs."""

from collections.abc import Iterator, Mapping
from typing import Any

from corematching.evaluation import machine


def banner(settings: Mapping[str, Any], answers: bool = True) -> Iterator[str]:
    """The line that comes first where not the real thing runs; `answers` is False where only times count."""
    small = small_note(settings, answers)
    if small:
        chosen = any(word.startswith(("model=", "data=")) for word in settings["command"])
        why = None if chosen else machine.why_small()
        reason = f" ({why}; choose with model=... data=...)" if why else ""
        yield f"NOTE: {small}{reason}"


def small_note(settings: Mapping[str, Any], answers: bool = True) -> str | None:
    """The warning that belongs to every number of the bundled model or data; None for the real ones."""
    parts = []
    if not settings["model"].get("comparable", True):
        parts.append(f"the bundled {settings['model']['name']} model")
    if answers and settings["data"]["name"] == "mini":
        parts.append("the bundled mini suite")
    if answers and settings["model"]["weights"] == "random":
        parts.append("random weights")
    return f"{' and '.join(parts)}: not comparable with published numbers" if parts else None

"""The bundled model's recipe: which stages, how long, at which rates."""

from __future__ import annotations

from typing import Any

from corematching.training.codes import CodeBook
from corematching.training.language import LanguageStage, Mix, Packer
from corematching.training.reading import ReadingLayers
from corematching.training.vision import VisionStage

SHALLOW_LAYERS = 6  # the language model learns the task at this depth and is then deepened
# Text reads the image in the middle third of the layers, and few neurons fire on text.
_LATE: dict[str, Any] = {"reading": ReadingLayers(4, 8), "gate_weight": 0.3}
_LATE_SHALLOW: dict[str, Any] = {"reading": ReadingLayers(2, 4), "gate_weight": 0.3}

_OPEN_FIRST = Mix(
    {"gqa": 3, "vqav2": 1, "mme": 1.5, "seedbench": 2, "mmbench": 1, "scienceqa": 1, "mmvet": 0.4, "textvqa": 0.2,
     "vizwiz": 0.4, "pope": 0.5},
    {"color": 2.0, "compound": 2.0},
)  # fmt: skip
_LAGGING = Mix(
    {"echo": 2, "gqa": 3, "vqav2": 0.5, "mme": 1.5, "seedbench": 2, "mmbench": 1, "scienceqa": 1, "mmvet": 0.3,
     "textvqa": 0.2, "vizwiz": 0.4, "pope": 1},
    {"shape": 0.5, "digit": 0.7, "word": 0.7, "texture": 0.5, "exists": 2, "side": 2, "height": 2, "size": 2},
)  # fmt: skip
_PLACES = Mix(
    {"gqa": 6, "mmvet": 1, "mme": 1.5, "scienceqa": 1, "seedbench": 0.7},
    {"side": 8, "height": 8, "place": 4},
)
_ALL = Mix(
    {"gqa": 3, "vqav2": 1.5, "mme": 2, "seedbench": 1.5, "mmbench": 1, "scienceqa": 1.5, "mmvet": 1, "textvqa": 0.7,
     "vizwiz": 1, "pope": 1},
)  # fmt: skip

_VARIED = Mix(
    {**_ALL.benchmarks, "gqa": 4},
    {"color": 1.5, "shape": 1.5, "digit": 1.2, "word": 1.2, "exists": 1.5, "compound": 2, "count": 1.5},
)
_WEAK = Mix(_ALL.benchmarks, {"color": 1.5, "exists": 2, "compound": 2, "side": 1.5, "height": 1.5, "count": 1.5})


def vision_stages(codes: CodeBook) -> list[VisionStage]:
    """Crops of a quarter of the image first (cheap), then whole images."""
    return [
        VisionStage("quarter", 4000, 8, 12, codes),
        VisionStage("whole", 400, 3, 24, codes, muon_rate=0.004, adam_rate=4e-4),
        VisionStage("digits", 1500, 8, 12, codes, muon_rate=0.004, adam_rate=4e-4, digits=0.7),
    ]


def sight_stages(codes: CodeBook) -> list[VisionStage]:
    """The tower that reads plain pictures meets varied backgrounds, distractors, sizes, and sums up in [CLS]."""
    return [
        VisionStage("varied", 2400, 8, 12, codes, muon_rate=0.006, adam_rate=6e-4, digits=0.35),
        VisionStage("varied whole", 300, 3, 24, codes, muon_rate=0.004, adam_rate=4e-4, digits=0.35),
    ]


def shallow_stages(codes: CodeBook, packer: Packer) -> list[LanguageStage]:
    """Few oracle tokens at half the depth: the look-ups form here, then move past the first layers."""
    return [
        LanguageStage("few", 400, 8, _OPEN_FIRST, codes, packer, visual=32, rate_peak=2e-3, decay_share=0.2),
        LanguageStage("lagging", 453, 8, _LAGGING, codes, packer, visual=32, rate_peak=1e-3, decay_share=0.0),
        LanguageStage("places", 300, 8, _PLACES, codes, packer, visual=32, rate_peak=1e-3, decay_share=0.2),
        LanguageStage("late", 250, 8, _ALL, codes, packer, visual=40, rate_peak=1e-3, decay_share=0.2, **_LATE_SHALLOW),
        LanguageStage(
            "settle", 300, 8, _WEAK, codes, packer, visual=40, rate_peak=1e-3, decay_share=0.2, **_LATE_SHALLOW
        ),
    ]


def deep_stages(codes: CodeBook, packer: Packer) -> list[LanguageStage]:
    """Full depth: a short while on oracle tokens, then real images with all 576 tokens."""
    return [
        LanguageStage("deep", 60, 8, _ALL, codes, packer, visual=40, rate_peak=6e-4, decay_share=0.2, **_LATE),
        LanguageStage(
            "images", 100, 4, _ALL, codes, packer, questions=16, visual=None, oracle=False, rate_peak=6e-4,
            decay_share=0.8, **_LATE,
        ),
    ]  # fmt: skip


def reading_stages(codes: CodeBook, packer: Packer) -> list[LanguageStage]:
    """A model that answers already learns where in its depth to read the varied world: few oracle tokens, then all."""
    return [
        LanguageStage("move", 250, 8, _VARIED, codes, packer, visual=72, rate_peak=1e-3, decay_share=0.2, **_LATE),
        LanguageStage(
            "crowd", 60, 4, _VARIED, codes, packer, questions=20, visual=None, rate_peak=5e-4, decay_share=0.3, **_LATE
        ),
        LanguageStage(
            "where", 90, 8, _VARIED, codes, packer, questions=14, visual=72, rate_peak=1e-3, decay_share=0.3,
            where_weight=1.0, **_LATE,
        ),
    ]  # fmt: skip


def whole_stages(codes: CodeBook, packer: Packer) -> list[LanguageStage]:
    """The trained tower's own tokens, all 576."""
    return [
        LanguageStage(
            "all", 45, 4, _VARIED, codes, packer, questions=20, visual=None, oracle=False, rate_peak=5e-4,
            decay_share=0.8, where_weight=1.0, **_LATE,
        ),
    ]  # fmt: skip

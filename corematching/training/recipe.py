"""The bundled model's recipe: which stages, how long, at which rates."""

from __future__ import annotations

from corematching.training.codes import CodeBook
from corematching.training.language import LanguageStage, Mix, Packer
from corematching.training.vision import VisionStage

SHALLOW_LAYERS = 6  # the language model learns the task at this depth and is then deepened

_OPEN_FIRST = Mix(
    {"gqa": 3, "vqav2": 1, "mme": 1, "seedbench": 1.5, "mmbench": 0.5, "scienceqa": 0.5, "mmvet": 0.4, "textvqa": 0.2,
     "vizwiz": 0.4, "pope": 0.3},
    {"color": 2.0, "compound": 2.0},
)  # fmt: skip


def vision_stages(codes: CodeBook) -> list[VisionStage]:
    """Crops of a quarter of the image first (cheap), then whole images."""
    return [
        VisionStage("quarter", 4000, 8, 12, codes),
        VisionStage("whole", 1200, 3, 24, codes, muon_rate=0.004, adam_rate=4e-4),
    ]


def shallow_stages(codes: CodeBook, packer: Packer) -> list[LanguageStage]:
    """Oracle tokens, few of them: the look-ups form here."""
    return [
        LanguageStage("few", 800, 8, _OPEN_FIRST, codes, packer, visual=32, rate_peak=2e-3, decay_share=0.2),
    ]

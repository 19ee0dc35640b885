"""Vision stages: tower and projector learn to emit the code of what each patch shows, [CLS] what the image holds."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from corematching.benchmarks.mini.drawing import render_array
from corematching.benchmarks.mini.scenes import COLOURS, DIGIT_SHARE, GRID, Scene, place
from corematching.training.codes import ATTRIBUTES, HALF_WORD, CodeBook, PatchLabels
from corematching.training.loop import Schedule

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def pixels(images: np.ndarray) -> Tensor:
    """Pixels (n, 3, height, width), normalised as by CLIP's processor, from uint8 images (n, height, width, 3)."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]


@dataclass(frozen=True)
class VisionBatch:
    """Crops of `grid` x `grid` patches, what they show, and where on the 24 x 24 raster they are said to lie."""

    pixels: Tensor  # (n, 3, 14 * grid, 14 * grid)
    labels: PatchLabels  # (n, grid * grid)
    rows: Tensor  # (n, grid * grid)
    cols: Tensor

    def to(self, device: str | torch.device) -> VisionBatch:
        """A copy on a device."""
        return VisionBatch(self.pixels.to(device), self.labels.to(device), self.rows.to(device), self.cols.to(device))


def vision_batch(seed: str, size: int, grid: int, digits: float = DIGIT_SHARE) -> VisionBatch:
    """Crowded pictures: colours may repeat; 12 x 12 patches hold up to eight objects, a share of them digits."""
    rng = random.Random(seed)
    scenes, rows, cols = [], [], []
    for _ in range(size):
        crowd = rng.randint(3, 8) if grid < GRID else rng.randint(6, 12)
        things = place(rng, rng.choices(tuple(COLOURS), k=crowd), crowd // 2, grid, digits)
        scenes.append(Scene(rng.getrandbits(48), "train", *things))
        top, left = rng.randint(0, GRID - grid), rng.randint(0, GRID - grid)
        y, x = np.mgrid[top : top + grid, left : left + grid]
        rows.append(y.ravel())
        cols.append(x.ravel())
    images = np.stack([render_array(scene, grid) for scene in scenes])
    labels = PatchLabels.of(scenes, grid)
    return VisionBatch(pixels(images), labels, torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(cols)))


def visual_features(model, values: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
    """Projected visual tokens (n, patches, width), also of crops that lie anywhere on the raster.

    The same computation as ``get_image_features`` for whole images (a test compares them).
    """
    return projected(model, values, rows, cols)[:, 1:]


def projected(model, values: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
    """Like :func:`visual_features`, the projected [CLS] in front: (n, 1 + patches, width)."""
    return model.model.multi_modal_projector(tower_features(model, values, rows, cols))


def tower_features(model, values: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
    """What :func:`projected` is made of: features before the projector."""
    tower = model.model.vision_tower
    embed = tower.embeddings
    patches = embed.patch_embedding(values).flatten(2).transpose(1, 2)
    if rows is None or cols is None:
        index = torch.arange(GRID * GRID, device=values.device)[None].expand(len(values), -1)
    else:
        index = rows * GRID + cols
    patches = patches + embed.position_embedding(index + 1)
    first = (embed.class_embedding + embed.position_embedding.weight[0]).expand(len(values), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first, patches], dim=1))
    for layer in tower.encoder.layers[:-1]:  # vision_feature_layer = -2: the last layer is not used
        hidden = layer(hidden, attention_mask=None)
    return hidden


def vision_loss(features: Tensor, batch: VisionBatch, codes: CodeBook) -> tuple[Tensor, dict[str, float]]:
    """Squared distance to the target tokens plus the attributes' cross entropies; shares of patches read right."""
    targets = codes.visual_tokens(batch.labels, batch.rows, batch.cols)
    on_object = batch.labels.values["colour"] >= 0
    weight = torch.where(on_object, 3.0, 1.0)
    distance = ((features - targets) ** 2).mean(-1)
    loss = 2 * (weight * distance).sum() / weight.sum()
    scores = {"distance": distance.mean().item()}
    for name in ATTRIBUTES:
        index = batch.labels.values[name]
        chosen = index >= 0
        logits = features[chosen] @ codes.attribute_codes(name).T
        loss = loss + (1.0 if name == "kind" else 0.4) * nn.functional.cross_entropy(logits, index[chosen])
        scores[name] = (logits.argmax(-1) == index[chosen]).float().mean().item()
    return loss, scores


def summary_loss(summary: Tensor, labels: PatchLabels, codes: CodeBook) -> tuple[Tensor, float]:
    """Cross entropy of which colours and kinds the image shows, read off the projected [CLS] (n, width).

    A value is called present when [CLS] reaches half of a word's norm along its direction, as on the patches
    themselves. Also returns the share of values that are called rightly among those present.
    """
    loss, hits, total = summary.new_zeros(()), 0.0, 0.0
    for name, truth in labels.present.items():
        logits = summary @ codes.attribute_codes(name).T - HALF_WORD
        loss = loss + nn.functional.binary_cross_entropy_with_logits(logits, truth)
        hits, total = hits + ((logits > 0) * truth).sum().item(), total + truth.sum().item()
    return loss, hits / max(total, 1)


def vision_parameters(model) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained weights of tower and projector: (matrices for Muon, the rest for AdamW)."""
    parts = [*model.model.vision_tower.encoder.layers[:-1], model.model.multi_modal_projector]
    matrices = [p for part in parts for p in part.parameters() if p.ndim == 2]
    rest = [p for part in parts for p in part.parameters() if p.ndim != 2]
    tower = model.model.vision_tower
    rest += [
        tower.embeddings.class_embedding,
        tower.embeddings.patch_embedding.weight,
        *tower.pre_layrnorm.parameters(),
    ]
    return matrices, rest


@dataclass(frozen=True)
class VisionStage:
    """Training of tower and projector on crowded pictures of `grid` x `grid` patches.

    Attributes
    ----------
    name, steps, batch, grid : str, int, int, int
    muon_rate, adam_rate : float
        Peak learning rates of matrices and of the rest.
    digits : float
        Share of objects that are handwritten digits, the hardest to tell apart.
    summary_weight : float
        Weight of what [CLS] says is there.
    """

    name: str
    steps: int
    batch: int
    grid: int
    codes: CodeBook
    muon_rate: float = 0.01
    adam_rate: float = 1e-3
    digits: float = DIGIT_SHARE
    summary_weight: float = 1.0

    def start(self, model) -> list[torch.optim.Optimizer]:
        """Muon for matrices, AdamW for the rest."""
        matrices, rest = vision_parameters(model)
        return [
            torch.optim.Muon(matrices, lr=self.muon_rate, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=self.adam_rate, weight_decay=0.0),
        ]

    def rate(self, step: int) -> float:
        """Warm-up, plateau, decay over the last 60 %."""
        return Schedule(self.steps, decay_share=0.6)(step)

    def loss(self, model, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss and shares of rightly read patches on the step's pictures."""
        batch = vision_batch(f"{self.name}:{step}", self.batch, self.grid, self.digits).to(model.device)
        features = projected(model, batch.pixels, batch.rows, batch.cols)
        loss, scores = vision_loss(features[:, 1:], batch, self.codes)
        summary, found = summary_loss(features[:, 0], batch.labels, self.codes)
        return loss + self.summary_weight * summary, scores | {"summary": found}

"""Language stages: answer questions about visual tokens, first the sums of codes themselves, then what the tower emits.

Several short questions share one image: each is a block that sees the system prompt, the image and itself. Positions
are those that the block would have on its own, so training sees exactly the sequences of the evaluation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from corematching.benchmarks.mini.drawing import render_array
from corematching.benchmarks.mini.families import POOLS, Question
from corematching.benchmarks.mini.questions import LETTERS, questions_for
from corematching.benchmarks.mini.scenes import GRID, IMAGE_SIZE, Scene, make_scene
from corematching.training.codes import CodeBook, PatchLabels
from corematching.training.loop import Schedule
from corematching.training.prompts import VARIANTS, user_prompt
from corematching.training.reading import IGNORED, PackedBatch, ReadingLayers, run_layers, twin_of
from corematching.training.vision import pixels, visual_features
from corematching.training.vocabulary import SYSTEM

ECHO = "echo"  # a practice format of the training alone


@dataclass(frozen=True)
class Mix:
    """What is asked: weights of benchmarks and of families (1 unless named)."""

    benchmarks: Mapping[str, float]
    families: Mapping[str, float] = field(default_factory=dict)

    def draw(self, scene: Scene, rng: random.Random) -> tuple[str, Question]:
        """A benchmark and one of its questions about the scene."""
        while True:
            (benchmark,) = rng.choices(list(self.benchmarks), weights=list(self.benchmarks.values()))
            questions = [echo_question(rng)] if benchmark == ECHO else questions_for(benchmark, scene, rng)
            weights = [self.families.get(question.family, 1.0) for question in questions]
            if questions and sum(weights):
                return benchmark, rng.choices(questions, weights=weights)[0]


def echo_question(rng: random.Random) -> Question:
    """A lettered question that names its answer: practice in finding an option, without the image."""
    pool = POOLS[rng.choice(("color", "shape", "digit", "word", "texture"))]
    choices = tuple(rng.sample(pool, min(4, len(pool))))
    index = rng.randrange(len(choices))
    meta = {"word": choices[index]}
    return Question(ECHO, f"What is {choices[index]}?", LETTERS[index], choices, index, meta=meta)


@dataclass(frozen=True)
class Block:
    """Token ids of one question with its answer, and one target of each kind for each of them."""

    ids: list[int]
    targets: list[int]
    hidden_targets: list[int]
    spots: list[list[int]]


class Packer:
    """Turns scenes and questions into packed batches.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    """

    def __init__(self, tokenizer) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._eos, self._pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.prefix = [tokenizer.bos_token_id, *self._ids(f"{SYSTEM} USER:")]

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def block(self, benchmark: str, question: Question, rng: random.Random) -> Block:
        """A question with its answer as token ids, and what is to be predicted where."""
        variant = VARIANTS[rng.random() < 0.25]
        prompt = self._ids(user_prompt(benchmark, question, variant, chinese=rng.random() < 0.15) + " ASSISTANT:")
        answer = [*self._ids(question.answer), self._eos]
        ids = prompt + answer[:-1]
        before = [IGNORED] * (len(prompt) - 1)
        after = [IGNORED] * (len(answer) - 1)
        word = self._ids(question.meta.get("word", question.answer))
        spot = [IGNORED] * 2
        if len(question.boxes) == 1:
            x0, y0, x1, y1 = question.boxes[0]
            spot = self._ids(f"{('left', 'right')[x0 + x1 >= IMAGE_SIZE]} {('top', 'bottom')[y0 + y1 >= IMAGE_SIZE]}")
        return Block(
            ids,
            targets=before + answer,
            hidden_targets=[*before, word[0] if len(word) == 1 else IGNORED, *after],
            spots=[[IGNORED] * 2] * len(before) + [spot] + [[IGNORED] * 2] * len(after),
        )

    def pack(self, scenes: list[Scene], index: Tensor, drawn: list[list[tuple[str, Question]]], rng) -> PackedBatch:
        """Pack each scene's questions behind its visual tokens `index` (n, visual)."""
        blocks = [[self.block(*pair, rng) for pair in pairs] for pairs in drawn]
        length = max(sum(len(block.ids) for block in row) for row in blocks)
        n, visual, front = len(scenes), index.shape[1], len(self.prefix)
        total = front + visual + length
        text = torch.full((n, length), self._pad)
        targets, hidden = torch.full((n, length), IGNORED), torch.full((n, length), IGNORED)
        spots = torch.full((n, length, 2), IGNORED)
        positions = torch.zeros(n, total, dtype=torch.long)
        positions[:, :front] = torch.arange(front)
        positions[:, front : front + visual] = front + index
        owner = torch.full((n, length), -1)
        for i, row in enumerate(blocks):
            at = 0
            for b, block in enumerate(row):
                span = slice(at, at + len(block.ids))
                text[i, span], targets[i, span] = torch.tensor(block.ids), torch.tensor(block.targets)
                hidden[i, span], spots[i, span] = torch.tensor(block.hidden_targets), torch.tensor(block.spots)
                owner[i, span] = b
                places = torch.arange(len(block.ids)) + front + GRID * GRID
                positions[i, front + visual + at : front + visual + at + len(block.ids)] = places
                at += len(block.ids)
        mask = torch.ones(total, total).tril().bool()[front + visual :].repeat(n, 1, 1)
        mask[:, :, front + visual :] &= owner[:, :, None] == owner[:, None, :]
        prefix = torch.tensor(self.prefix)
        names = [[question.family + "+" * bool(question.choices) for _, question in pairs] for pairs in drawn]
        return PackedBatch(scenes, index, prefix, text, positions, mask[:, None], targets, hidden, spots, owner, names)


def choose_patches(labels: PatchLabels, count: int | None, generator: torch.Generator) -> Tensor:
    """Raster indices (n, count) of object patches and enough background, ascending; all 576 where `count` is None.

    Where objects cover more than `count` patches a random part of them stays.
    """
    n, patches = labels.shape
    if count is None:
        return torch.arange(patches).expand(n, patches)
    rank = torch.rand(n, patches, generator=generator)
    rank += (labels.values["colour"] >= 0) * 1.0 + labels.anchor * 1.0
    return rank.topk(count, dim=1).indices.sort(dim=1).values


class GatePenalty:
    """Mean positive gate activation of text tokens, collected by hooks while inside the context."""

    def __init__(self, model, text: int) -> None:
        self._model, self._text = model, text
        self._values: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> GatePenalty:
        for layer in self._model.model.language_model.layers:
            self._hooks.append(layer.mlp.gate_proj.register_forward_hook(self._collect))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _collect(self, _module, _inputs, output: Tensor) -> None:
        self._values.append(nn.functional.silu(output[:, -self._text :]).relu().mean())

    def value(self) -> Tensor:
        """Mean over layers."""
        return torch.stack(self._values).mean()


@dataclass(frozen=True)
class LanguageStage:
    """Training of the language model with the tower frozen.

    Attributes
    ----------
    name, steps, batch : str, int, int
    questions : int
        Questions packed behind each image.
    mix : Mix
    visual : int or None
        Visual tokens per image; None for all 576.
    oracle : bool
        Read the sums of codes themselves instead of what the tower emits.
    rate_peak, decay_share : float
    reading : ReadingLayers or None
        Layers in which text sees its own image; None: in all. With it, half of the batch are twins of the other half.
    gate_weight, middle_weight, where_weight : float
        Weights of the gate penalty, of the middle layer's answer, and of where the object asked about lies, which the
        last token should know after every layer from the second up to the reading layers.
    """

    name: str
    steps: int
    batch: int
    mix: Mix
    codes: CodeBook
    packer: Packer
    questions: int = 9
    visual: int | None = 40
    oracle: bool = True
    rate_peak: float = 2e-3
    decay_share: float = 0.3
    reading: ReadingLayers | None = None
    gate_weight: float = 0.0
    middle_weight: float = 0.5
    where_weight: float = 0.0

    def start(self, model) -> list[torch.optim.Optimizer]:
        """AdamW on the language model and the output layer."""
        parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
        return [torch.optim.AdamW(parameters, lr=self.rate_peak, betas=(0.9, 0.98), weight_decay=0.01)]

    def rate(self, step: int) -> float:
        """Warm-up, plateau, linear decay."""
        return Schedule(self.steps, decay_share=self.decay_share)(step)

    def loss(self, model, step: int) -> tuple[Tensor, dict[str, float]]:
        """Answer loss with its helpers; log the share of right first answer tokens."""
        rng = random.Random(f"{self.name}:{step}")
        batch, visual = self.packed(model, rng)
        middle = math.ceil(len(model.model.language_model.layers) * 0.6)
        text = batch.text.shape[1]
        with GatePenalty(model, text) as gates, torch.autocast(batch.text.device.type, torch.bfloat16):
            early = range(2, self.reading.first + 1) if self.reading and self.where_weight else ()
            tapped, last = run_layers(model, batch, visual, self.reading, (middle, *early))
        at_middle, last, norm = tapped[middle].float(), last.float(), model.model.language_model.norm
        logits = model.lm_head(norm(last[batch.targets != IGNORED]))
        targets = batch.targets[batch.targets != IGNORED]
        loss = nn.functional.cross_entropy(logits, targets)
        chosen = batch.hidden_targets != IGNORED
        guess = model.lm_head(norm(at_middle[chosen]))
        helper = nn.functional.cross_entropy(guess, batch.hidden_targets[chosen])
        penalty = gates.value()
        scores = {"middle": (guess.argmax(-1) == batch.hidden_targets[chosen]).float().mean().item()}
        scores |= {"gate": penalty.item()} | family_scores(batch, logits.argmax(-1) == targets)
        for number in early:
            where, found = where_loss(model, tapped[number].float(), batch.spots)
            loss = loss + self.where_weight / len(early) * where
            scores[f"where{number}"] = found
        return loss + self.middle_weight * helper + self.gate_weight * penalty, scores

    def packed(self, model, rng: random.Random) -> tuple[PackedBatch, Tensor]:
        """A batch and its visual tokens (n, visual, width)."""
        scenes = [make_scene(rng.getrandbits(48), "train") for _ in range(self.batch // (2 if self.reading else 1))]
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        index = choose_patches(PatchLabels.of(scenes), self.visual, generator)
        if self.reading:
            scenes += [twin_of(scene, rng) for scene in scenes]
            index = index.repeat(2, 1)
        labels = PatchLabels.of(scenes)
        drawn = [[self.mix.draw(scene, rng) for _ in range(self.questions)] for scene in scenes]
        batch = self.packer.pack(scenes, index, drawn, rng).to(model.device)
        index = batch.index
        if self.oracle:
            visual = self.codes.visual_tokens(labels.to(model.device).gather(index), index // GRID, index % GRID)
        else:
            with torch.no_grad():
                whole = visual_features(model, pixels_of(scenes).to(model.device))
            visual = whole.gather(1, index[..., None].expand(-1, -1, whole.shape[-1]))
        return batch, visual


def where_loss(model, hidden: Tensor, spots: Tensor) -> tuple[Tensor, float]:
    """Cross entropy of left against right and top against bottom in hidden states (n, text, width); share told right.

    Read by the output layer, among the two words of each pair.
    """
    chosen = spots[..., 0] != IGNORED
    if not chosen.any():
        return hidden.new_zeros(()), 0.0
    logits = model.lm_head(model.model.language_model.norm(hidden[chosen]))
    loss, hits = hidden.new_zeros(()), 0.0
    for truth in spots[chosen].unbind(1):
        words, index = truth.unique(return_inverse=True)
        pair = logits[:, words]
        loss = loss + nn.functional.cross_entropy(pair, index)
        hits += (pair.argmax(-1) == index).float().mean().item() / 2
    return loss, hits


def family_scores(batch: PackedBatch, right: Tensor) -> dict[str, float]:
    """Share of right answer tokens by family; `right` has one entry per target, in the order of the packed batch."""
    rows, cols = (batch.targets != IGNORED).nonzero(as_tuple=True)
    hits: dict[str, list[bool]] = {}
    for row, col, hit in zip(rows.tolist(), cols.tolist(), right.tolist()):
        is_end = col + 1 == batch.text.shape[1] or batch.targets[row, col + 1] == IGNORED
        if not is_end:  # the end token is easy
            hits.setdefault(batch.names[row][int(batch.owner[row, col])], []).append(hit)
    return {name: sum(values) / len(values) for name, values in sorted(hits.items())}


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Normalised pixels (n, 3, 336, 336) of drawn scenes."""
    return pixels(np.stack([render_array(scene) for scene in scenes]))

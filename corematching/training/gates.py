"""Does token choice, neuron choice and the layer of the choice matter on a model? Conditions, and gates between them.

Every condition answers the same questions about new test scenes, so differences are paired. Answers are appended to a
file per condition as they come: an interrupted check goes on where it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corematching.answering.generator import Answer, Generator
from corematching.answering.generator import Question as Request
from corematching.benchmarks.mini.drawing import render
from corematching.benchmarks.mini.families import Question
from corematching.benchmarks.mini.questions import questions_for
from corematching.benchmarks.mini.scenes import GRID, IMAGE_SIZE, Scene, make_scene
from corematching.errors import UserError
from corematching.registry import build_method
from corematching.results import intervals, statistics
from corematching.training.prompts import user_prompt

_PER_SCENE = 2  # questions about one image, as the mini suite asks
_CHUNK = 40  # questions between two writes
_SCENES_PER_SEED = 1_000_000
_FIRST_SCENE = 10_000_000_000  # far beyond those of the mini suite and of the model card


@dataclass(frozen=True)
class Condition:
    """One way to run the model: a method with parameters, and whether it sees a grey image instead."""

    name: str
    method: str = "dense"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    blank: bool = False


@dataclass(frozen=True)
class Gate:
    """A bound on the accuracy of `first`, or on its difference from `second` in points.

    `low` and `high` bound the estimate; `above_zero` asks for a 95 % interval above zero as well. A gate of which
    several conditions may be the first takes the best of them. Without a bound it only reports.
    """

    text: str
    first: tuple[str, ...]
    second: str | None = None
    low: float | None = None
    high: float | None = None
    above_zero: bool = False


CLS = {"fastervlm 64": ("fastervlm", {"keep": 64}), "visionzip 64": ("visionzip", {"keep": 64})}
CONDITIONS = (
    Condition("dense"),
    Condition("blank image", blank=True),
    Condition("random 64", "random", {"keep": 64}),
    Condition("random 64, layer 2", "random", {"keep": 64, "layer": 2}),
    Condition("random 64, layer 8", "random", {"keep": 64, "layer": 8}),
    Condition("fastv 64, layer 2", "fastv", {"keep": 64, "layer": 2}),
    Condition("fastv 64, layer 8", "fastv", {"keep": 64, "layer": 8}),
    *(Condition(name, method, parameters) for name, (method, parameters) in CLS.items()),
    Condition("corematching 64", "corematching", {"keep": 64}),
    Condition("corematching, adaptive", "corematching"),
    Condition("core_neurons 0.4", "core_neurons", {"keep": 0.4}),
    Condition("random_neurons 0.4", "random_neurons", {"keep": 0.4}),
)
_CORE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {}),
    *((f", {who} votes", {"voters": who}) for who in ("text", "last")),
    *((f", score {score}", {"score": score}) for score in ("last", "cosine", "attention")),
    *((f", rho {rho}", {"rho": rho}) for rho in (0.05, 0.5, 1.0)),
    *((f", beta {beta}", {"beta": beta}) for beta in (0.1, 0.7)),
    *((f", layer {layer}", {"layer": layer}) for layer in (1, 4, 6, 8)),
    *((f", layer {layer}, last votes", {"layer": layer, "voters": "last"}) for layer in (4, 6, 8)),
)
ABLATIONS = tuple(
    Condition(f"core tokens 64{name}", "core_tokens", {"keep": 64} | parameters) for name, parameters in _CORE
) + tuple(
    Condition(f"core tokens, adaptive{name}", "core_tokens", parameters) for name, parameters in (_CORE[0], *_CORE[1:3])
)
"""What decides which tokens are core: who votes, the score, rho, beta, the layer."""
GATES = (
    Gate("dense: at least 95 %", ("dense",), low=95),
    Gate("blank image: at most 45 %", ("blank image",), high=45),
    Gate("random 64 at layer 2 loses at least 12 points", ("random 64, layer 2",), "dense", high=-12),
    Gate("fastv 64 at layer 2 gains at least 5 over random there", ("fastv 64, layer 2",), "random 64, layer 2",
         low=5, above_zero=True),
    Gate("fastv 64 at layer 8 loses at most 2 points", ("fastv 64, layer 8",), "dense", low=-2),
    Gate("the best [CLS] method gains at least 5 over random, both before the LLM", tuple(CLS), "random 64",
         low=5, above_zero=True),
    Gate("core neurons against random neurons", ("core_neurons 0.4",), "random_neurons 0.4"),
    Gate("corematching 64 against random 64 at layer 2", ("corematching 64",), "random 64, layer 2"),
    Gate("corematching 64 against dense", ("corematching 64",), "dense"),
    Gate("corematching, adaptive against dense", ("corematching, adaptive",), "dense"),
)  # fmt: skip


TRAINED = (
    Condition("dense"),
    Condition("as_vit", "as_vit", {"layers": (2, 3, 4), "thresholds": (1.121e-7, 4.289e-6, 3.801e-5)}),
    Condition("fastervlm 256", "fastervlm", {"keep": 256}),
    Condition("random 256", "random", {"keep": 256}),
    Condition("focusllava", "focusllava", {"router": "packaged:routers/tiny_focusllava.pt", "layer": 6, "keep": 1.0}),
    Condition("pooling 144", "pooling", {"keep": 144, "layer": -1}),
)
"""Trained thresholds inside the tower beside as many tokens by [CLS] attention at its output, and at random; a trained
router of scales beside even pooling to about as many tokens.
"""
TRAINED_GATES = (
    Gate("as_vit, trained, against a fixed count by [CLS] attention", ("as_vit",), "fastervlm 256"),
    Gate("as_vit, trained, against random patches", ("as_vit",), "random 256"),
    Gate("focusllava, trained, against even pooling", ("focusllava",), "pooling 144"),
)


@dataclass(frozen=True)
class Asked:
    """The questions of a check: scene and question, `_PER_SCENE` for each scene."""

    scene: Scene
    question: Question


@dataclass(frozen=True)
class Reply:
    """Whether an answer was right, how many patches the method kept at last and how many of these show an object."""

    right: bool
    kept: int
    on_object: int


def ask(n: int, seed: int) -> list[Asked]:
    """`n` GQA questions about test scenes that no other part of the project draws."""
    asked: list[Asked] = []
    number = _FIRST_SCENE + seed * _SCENES_PER_SEED
    while len(asked) < n:
        scene = make_scene(number, "test")
        found = questions_for("gqa", scene, random.Random(f"gates:{number}"))[:_PER_SCENE]
        asked += [Asked(scene, question) for question in found][: n - len(asked)]
        number += 1
    return asked


def object_patches(scene: Scene) -> np.ndarray:
    """True where a patch of the raster shows an object, shape (576,)."""
    raster = np.zeros((GRID, GRID), dtype=bool)
    for item in scene.objects:
        raster[item.row : item.row + item.height, item.col : item.col + item.width] = True
    return raster.ravel()


def run(condition: Condition, asked: Sequence[Asked], model, processor, folder: Path, log: Callable[[str], None]):
    """Answer the questions that ``folder/<condition>.jsonl`` lacks; returns all replies in order.

    Raises
    ------
    UserError
        If the file holds more replies than there are questions: it is from another check.
    """
    path = folder / f"{condition.name.replace(', ', '-').replace(' ', '_')}.jsonl"
    done = [Reply(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    if len(done) > len(asked):
        raise UserError(
            f"{path} holds {len(done)} replies for {len(asked)} questions: give another --out or a larger -n"
        )
    generator = Generator(model, processor, batch_size=8)
    method = build_method(condition.method, **condition.parameters)
    while len(done) < len(asked):
        part = asked[len(done) : len(done) + _CHUNK]
        replies = [
            _reply(answer, one)
            for answer, one in zip(generator.answer([_request(a, condition) for a in part], method), part)
        ]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(reply)) + "\n" for reply in replies)
        done += replies
        log(f"{condition.name}: {len(done)}/{len(asked)}, {100 * np.mean([r.right for r in done]):.1f} % right")
    return done


def _request(asked: Asked, condition: Condition) -> Request:
    def images() -> list[Image.Image]:
        return [Image.new("RGB", (IMAGE_SIZE,) * 2, (128,) * 3) if condition.blank else render(asked.scene)]

    return Request(user_prompt("gqa", asked.question, "llava15"), images, {"max_new_tokens": 8})


def _reply(answer: Answer, asked: Asked) -> Reply:
    kept = answer.trace.visual_tokens[-1].cpu().numpy()
    kept = kept[kept >= 0]
    on_object = int(object_patches(asked.scene)[kept].sum())
    return Reply(answer.text.strip().lower() == asked.question.answer, len(kept), on_object)


def report(
    asked: Sequence[Asked], replies: Mapping[str, Sequence[Reply]], gates: Sequence[Gate] = GATES
) -> tuple[str, bool]:
    """Two Markdown tables (conditions, gates), and whether every gate with a bound is met."""
    units = np.unique([one.scene.seed for one in asked], return_inverse=True)[1]
    names = list(replies)
    right = np.array([[reply.right for reply in replies[name]] for name in names], dtype=float).T
    sums = np.zeros((units.max() + 1, len(names)))
    np.add.at(sums, units, right)
    counts = np.bincount(units).astype(float)[:, None]
    ratios = [statistics.Ratio(sums, counts, 100)]
    scores = statistics.estimate(ratios)
    lows, highs = intervals.single(ratios)
    everywhere = np.mean([object_patches(one.scene).mean() for one in asked])
    lines = [
        f"n = {len(asked)} questions about {len(counts)} images; intervals of 95 %, of differences paired, with "
        f"images as clusters. Objects cover {100 * everywhere:.1f} % of all patches.",
        "",
        "| condition | accuracy | interval | patches kept | of them on objects | against all patches |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for column, name in enumerate(names):
        kept = sum(reply.kept for reply in replies[name])
        share = sum(reply.on_object for reply in replies[name]) / max(kept, 1)
        cells = [
            name,
            f"{scores[column]:.1f}",
            f"{lows[column]:.1f} to {highs[column]:.1f}",
            f"{kept / len(asked):.0f}",
        ]
        lines.append(f"| {' | '.join([*cells, f'{100 * share:.1f} %', f'{share / everywhere:.2f} x'])} |")
    if not gates:
        return "\n".join(lines), True
    verdicts = [_verdict(gate, names, ratios) for gate in gates]
    lines += ["", "| gate | value | interval | verdict |", "|---|---:|---|---|", *(line for line, _ in verdicts)]
    return "\n".join(lines), all(met for _, met in verdicts)


def _verdict(gate: Gate, names: Sequence[str], ratios: Sequence[statistics.Ratio]) -> tuple[str, bool]:
    """A row of the gates' table, and False where a bound is missed."""
    available = [names.index(name) for name in gate.first if name in names]
    if not available or (gate.second and gate.second not in names):
        return f"| {gate.text} | | | not run |", False
    scores = statistics.estimate(ratios)
    first = max(available, key=lambda column: scores[column])
    value = scores[first]
    if gate.second:
        second = names.index(gate.second)
        value = value - scores[second]
        low, high = (side[first] for side in intervals.paired(ratios, second))
    else:
        low, high = (side[first] for side in intervals.single(ratios))
    bounded = gate.low is not None or gate.high is not None
    met = (gate.low is None or value >= gate.low) and (gate.high is None or value <= gate.high)
    met = met and (not gate.above_zero or low > 0)
    verdict = ("met" if met else "MISSED") if bounded else "reported"
    which = f" ({names[first]})" if len(gate.first) > 1 else ""
    return f"| {gate.text}{which} | {value:+.1f} | {low:+.1f} to {high:+.1f} | {verdict} |", met or not bounded

# %% [markdown]
# # Add a method
#
# A method is a frozen dataclass that says where it acts and returns a decision; the engine does the dropping, keeps
# caches and positions straight and writes the trace. Here is one in a dozen lines: keep the visual tokens that stand
# out most from the average of their image.

# %% tags=["parameters"]
MODEL = "tiny"
IMAGES = 8
KEEP = 64

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars may be plain text

from dataclasses import dataclass
from typing import ClassVar

import corematching as cm
from corematching.answering.generator import Generator
from corematching.methods.base import BeforeLayer, Geometry, Keep, Method, Stage
from corematching.methods.parameters import check_budget, check_layer
from corematching.methods.selection import keep_top
from corematching.methods.views import LayerView
from corematching.inspection import evidence_figures
from corematching.inspection.evidence import about_model, kept, mini_examples, question_of


@dataclass(frozen=True)
class Distinct(Method):
    """Keep the visual tokens farthest from the mean visual token, before the given decoder layer.

    Parameters
    ----------
    keep
        Visual tokens to keep per sample: a count or a fraction.
    layer
        The others leave at the input of this decoder layer.
    """

    keep: int | float
    layer: int = 0
    acts_on: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __post_init__(self) -> None:
        check_budget("keep", self.keep)

    def stages(self, geometry: Geometry) -> list[Stage]:
        check_layer("layer", self.layer, geometry.depth)
        return [BeforeLayer(self.layer, self.select)]

    def select(self, view: LayerView) -> Keep:
        tokens = view.gather(view.hidden)  # [B, V, d]
        weight = view.visual_valid[..., None].to(tokens.dtype)
        mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return keep_top((tokens - mean).norm(dim=-1), self.keep, view.visual_valid, view.visual_counts)


# %% [markdown]
# ## Try it
#
# Against the random control at the same budget. A method that cannot beat it has learnt nothing about the image.

# %%
model, processor = cm.load_model(MODEL)
generator = Generator(model, processor)
examples = mini_examples(images=IMAGES, questions=2)
questions = [question_of(one, max_new_tokens=8) for one in examples]

answers = {}
for name, method in {
    "dense": cm.build_method("dense"),
    "random": cm.build_method("random", keep=KEEP),
    "distinct": Distinct(keep=KEEP),
}.items():
    answers[name] = generator.answer(questions, method)
    right = sum(answer.text.strip().lower() == one.target for answer, one in zip(answers[name], examples))
    tokens = sum(answer.trace.average_visual_tokens for answer in answers[name]) / len(examples)
    print(f"{name:9} {right:3} of {len(examples)} right, {tokens:.0f} visual tokens per layer")

assert all(len(answer.trace.visual_tokens[-1]) == KEEP for answer in answers["distinct"])

# %% [markdown]
# What it keeps, on two questions about one image (it does not read the question, so it keeps the same):

# %%
rows = []
for place, one in enumerate(examples[:2]):
    rows.append((one, {name: kept(answers[name][place]) for name in ("random", "distinct")}))
evidence_figures.core_tokens(rows, (24, 24), about_model(model, f"n = {len(rows)} questions"))

# %% [markdown]
# ## Make it part of the project
#
# Put the class into `corematching/methods/distinct.py` and its defaults into `conf/method/distinct.yaml`; then
# `python run.py method=distinct` finds it, and the parity, batching and attach/detach tests pick it up by its name.
# `docs/add_a_method.md` has the whole checklist.

# %% [markdown]
# # Accuracy against cost
#
# A small sweep through the Python API, stored and aggregated exactly as `python run.py +experiment=...` does it: cells
# in a store, then tables with intervals, and a Pareto plot.

# %% tags=["parameters"]
MODEL = "tiny"
IMAGES = 12
KEEPS = [192, 64, 16]

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars may be plain text

import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

import corematching as cm
from corematching.answering.generator import Generator
from corematching.evaluation.cells import Cell
from corematching.evaluation.records import new_record
from corematching.evaluation.trace_summary import summarise
from corematching.inspection.evidence import mini_examples, question_of
from corematching.results.store import Store

model, processor = cm.load_model(MODEL)
generator = Generator(model, processor)
examples = mini_examples(images=IMAGES, questions=3)
questions = [question_of(one, max_new_tokens=8) for one in examples]
store = Store(Path(tempfile.mkdtemp()) / "pareto")


# %% [markdown]
# ## Cells
#
# One cell per method and budget: what was run, what came out, and one row per question.


# %%
def run_cell(name: str, **parameters) -> None:
    """Answer all questions under one method and store the cell."""
    started, clock = datetime.now(UTC), time.perf_counter()
    answers = generator.answer(questions, cm.build_method(name, **parameters))
    right = [float(answer.text.strip().lower() == one.target) for answer, one in zip(answers, examples)]
    rows = pd.DataFrame(
        {
            "doc_id": range(len(examples)),
            "part": "",
            "unit": [str(place // 3) for place in range(len(examples))],  # three questions share an image
            "prompt": [one.question for one in examples],
            "prediction": [answer.text for answer in answers],
            "target": [one.target for one in examples],
            "score": right,
            "retained_tokens": [answer.trace.average_visual_tokens for answer in answers],
            "generated_tokens": [answer.tokens for answer in answers],
        }
    )
    config = {
        "model": {"name": MODEL, "path": MODEL, "revision": None, "dtype": "float32", "weights": "pretrained"},
        "method": {"name": name, **parameters},
        "benchmark": {"name": "gqa", "data": "mini", "version": "notebook", "limit": len(examples)},
        "prompt": "llava15",
    }
    cell = Cell.of(config, model=MODEL, method=name, keep=parameters.get("keep"), benchmark="gqa", data="mini")
    result = {
        "status": "done",
        "score": {"metric": "accuracy", "value": 100 * sum(right) / len(right), "scale": 100.0, "note": ""},
        "n": len(examples),
        "trace": summarise(answers, model.config),
    }
    store.write(new_record(cell, "accuracy", started, time.perf_counter() - clock, result), rows)


run_cell("dense")
for keep in KEEPS:
    run_cell("random", keep=keep)
    run_cell("fastv", keep=keep)
    run_cell("core_tokens", keep=keep, threshold="keep")

# %% [markdown]
# ## Tables
#
# The interval and the test compare each cell with dense on the same questions; questions about one image count
# together. With so few questions some rows cannot be told apart from it (≈), and the note below the table says how large a
# difference would have been noticed.

# %%
from IPython.display import HTML

from corematching.results.aggregate import aggregate
from corematching.results.render import to_html

results = aggregate([store.root])
HTML(to_html(results.tables[0]))

# %% [markdown]
# ## Figures

# %%
from corematching.results.figures import accuracy_over_keep, accuracy_over_tokens, pareto

pareto(results.cells)

# %% [markdown]
# What a budget costs depends on where tokens leave: FastV and core tokens run the first two layers on all of them. Over
# what a layer really sees, on average, methods can be compared; over the nominal budget they cannot.

# %%
accuracy_over_tokens(results.cells)

# %%
accuracy_over_keep(results.cells)

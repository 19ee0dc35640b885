"""The model card that goes with the saved model; every number in it comes from the run."""

from __future__ import annotations

from collections.abc import Mapping

_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# Tiny LLaVA of CoreMatching-Bench

A stock `LlavaForConditionalGeneration` (CLIP tower, GELU projector, Llama decoder with SwiGLU) with LLaVA-1.5's
image geometry (336 px, patches of 14 px, 576 visual tokens, feature layer -2), small enough for a CPU: {layers}
decoder layers, width {width}, {size:.1f} million parameters. It answers questions about the mini suite's drawn
scenes in the prompt formats of ten benchmarks. It exists to test token and neuron sparsity on a model that really
reads images; it knows nothing else.

## Recipe
`python scripts/train_tiny.py --out FOLDER` makes it from nothing, seeded, and resumes after an interruption. Words
start as fixed directions ("codes"); vision learns to emit, for each patch, the sum of the codes of what it shows,
while the language model learns to answer from such sums at half its depth; then it is deepened by layers that
change nothing, and trained on real images with all 576 tokens. The start is structured: cosine patch filters, heads
that look at neighbouring patches, attention that matches equal codes, one previous-token head. Instruction
sentences are single tokens. In the late stages text is kept from seeing the image in the first layers for three
steps in four, and a penalty keeps most gate activations of text negative, so that methods which prune inside the
model have something to find.

| stage | seconds |
|---|---|
{seconds}

Wall-clock seconds on {threads} CPU thread(s), with other work on the same machine; the vision track ran beside the
shallow one.

## Accuracy
On test scenes that training never saw (other random streams, other handwritten digits); percent of questions whose
greedy answer is exactly right, ± one standard error with questions taken as independent. `blank`: a uniform grey
image instead. `random-64`: 64 random visual tokens of 576 before the language model, original positions. `chance`:
the best guess that sees the question's family and options alone. Prompts are the official LLaVA-1.5 ones for three
questions in four, lmms-eval's stock ones for the rest.

{tables}

## Limits
One training run, one seed. Questions outside the suite's templates are answered at random. It was not trained on
dropped tokens: what a method costs here is what it costs without any adaptation.
"""


def model_card(config, parameters: int, seconds: Mapping[str, float], threads: int, tables: str) -> str:
    """The card as Markdown.

    Parameters
    ----------
    config : LlavaConfig
    parameters : int
        Number of weights.
    seconds : mapping
        Stage to wall-clock seconds, from the checkpoints.
    threads : int
    tables : str
        From :func:`corematching.training.evaluate.report`.
    """
    rows = "\n".join(f"| {stage} | {value:.0f} |" for stage, value in seconds.items())
    text = config.text_config
    return _CARD.format(
        layers=text.num_hidden_layers, width=text.hidden_size, size=parameters / 1e6, seconds=rows, threads=threads,
        tables=tables,
    )  # fmt: skip

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
`python scripts/train_tiny.py --out FOLDER` makes such a model from nothing, with `--start FOLDER` from an earlier one;
seeded, and resumed after an interruption. {origin}

Words start as fixed directions ("codes"); vision learns to emit, for each patch, the sum of the codes of what it shows
(on the background: its look and mean colour), while the language model learns to answer from such sums; then the two
are joined and trained on real images with all 576 tokens. The start is structured: cosine patch filters, heads that
look at neighbouring patches, attention that matches equal codes, one previous-token head. Instruction sentences are
single tokens.

What is there for the sake of studies of sparsity, each after what is known of real models:

- **Images that are mostly something.** One to four regions of plain colour, gradients, noise, stripes, checks or a
  photograph; five to seven objects of one to six patches; two to six distractors that no question names.
- **A [CLS] that sums up.** Besides the patches, the projected [CLS] learns which colours and kinds an image shows.
- **An image read in the middle third of the layers.** In training, text in layers 0 to 3 sees the keys of its own image
  but the values of a twin with the same layout and other contents, so it may find out where to look but not what is
  there; in layers 8 to 11 it sees another image altogether. Inference is stock.
- **Where before what.** After layers 1, 2 and 3 the last token of a question about one object is asked on which side
  and at which height that object lies, so shallow layers learn to find it.
- **Few neurons on text**: a small penalty on positive gate activations of text tokens.

No objective, and no choice of a checkpoint, uses a method's selection or score. Three things are nevertheless built
in: tokens dropped at layer 2 are missed, tokens dropped at layer 8 are not, and the attention of the last token in
layer 1 knows where to look. The last was added after a look at the check: without it that attention preferred tiles
and signs whatever was asked, and FastV at layer 2 answered less than random tokens there (63.8 against 72.5 %, n = 80).
So the model shows *that* methods differ and how much a choice is worth; that attention beats other signals on it is no
evidence that it does on a real model. `python scripts/check_bundled.py --out FOLDER` prints how the methods fare.

| stage | seconds |
|---|---|
{seconds}

Wall-clock seconds on {threads} CPU thread(s), with other work on the same machine; tracks before a join ran side by
side.

## Accuracy
On test scenes that training never saw (other random streams, other handwritten digits); percent of questions whose
greedy answer is exactly right, ± one standard error with questions taken as independent. `blank`: a uniform grey
image instead. `random-64`: 64 random visual tokens of 576 before the language model, original positions. `chance`:
the best guess that sees the question's family and options alone. Prompts are the official LLaVA-1.5 ones for three
questions in four, lmms-eval's stock ones for the rest.

{tables}

## Photographs
Backgrounds of training and test scenes hold crops of scikit-learn's two sample images, `china.jpg` and `flower.jpg`
(Creative Commons Attribution 2.0, by danielbuechele and vultilion on Flickr). The files are not part of this project.

## Limits
One training run, one seed. Questions outside the suite's templates are answered at random. It was not trained on
dropped tokens: what a method costs here is what it costs without any adaptation.
"""


def model_card(
    config, parameters: int, seconds: Mapping[str, float], threads: int, tables: str, origin: str | None = None
) -> str:
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
    origin : str or None
        What an earlier model it goes on from is called; None: it was made from nothing.
    """
    rows = "\n".join(f"| {stage} | {value:.0f} |" for stage, value in seconds.items())
    text = config.text_config
    return _CARD.format(
        layers=text.num_hidden_layers, width=text.hidden_size, size=parameters / 1e6, seconds=rows, threads=threads,
        tables=tables, origin=f"This one goes on from {origin}." if origin else "This one was made from nothing.",
    )  # fmt: skip

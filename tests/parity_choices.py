"""Where paper, official code and other readings differ: what each method does by default, and what its variants do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One row of the second table of ``docs/parity.md``."""

    method: str
    """Name in ``conf/method``."""
    what: str
    default: str
    origin: str
    """Where the default comes from: "paper", "official code", or why neither could be followed."""
    variants: str
    """Parameter values that do otherwise."""


CHOICES = (
    Choice(
        "core_tokens",
        "tokens at the elbow",
        "stay: at or above the threshold, one token at least",
        "paper",
        "`threshold=elbow_release`: strictly above, as published (the tokens at the elbow where none is above)",
    ),
    Choice(
        "core_tokens",
        "NaN scores",
        "take no part in the curve and leave; if there is nothing else, all stay",
        "neither says",
        "–",
    ),
    Choice(
        "corematching_release",
        "tokens at the elbow",
        "zeroed: strictly above stays, on a flat curve none",
        "official code",
        "`core_tokens`",
    ),
    Choice(
        "core_neurons",
        "who votes",
        "every token that enters the layer",
        "paper",
        "`voters=text`, `voters=last`",
    ),
    Choice(
        "core_neurons",
        "equal votes",
        "lower index",
        "no official code (CoreMatching's leaves neurons alone)",
        "–",
    ),
    Choice(
        "coreinfer",
        "equal counts",
        "`torch.argsort` of the counted neurons: depends on the machine",
        "official code",
        "`ties=first`: lower index",
    ),
    Choice(
        "snapkv",
        "equal scores, such as max pooling's plateaus",
        "`torch.topk`'s order, sample by sample",
        "official code",
        "`ties=first`: lower position",
    ),
    Choice(
        "snapkv",
        "borders of the smoothing",
        "zeros beyond the first position and before the window, counted by the average",
        "official code",
        "–",
    ),
    Choice(
        "as_vit",
        "images of a batch",
        "each keeps its own patches above the thresholds, at least its best one",
        "paper; the code gives all images of a batch the mean count",
        "–",
    ),
    Choice(
        "as_vit",
        "what is trained",
        "the thresholds alone, as logarithms, through the LLM's answers",
        "neither (a classifier is fine-tuned with them): the bundled model stays as it is",
        "–",
    ),
    Choice(
        "pyramidkv",
        "steps between layers' budgets",
        "whole rows, rounded down: up to half a row per layer above the budget on average",
        "official code",
        "–",
    ),
    Choice(
        "adakv",
        "rounding of heads' shares",
        "to the layer's budget exactly, largest remainders first",
        "deviation: keeps the budget exact",
        "–",
    ),
    Choice(
        "refreshkv",
        "who leaves the small cache",
        "the prompt's rows by score, then rows decoded since, oldest first",
        "unofficial code (the official repository holds none)",
        "–",
    ),
    Choice(
        "refreshkv",
        "`every=1`",
        "every step is full, whatever the similarity",
        "paper (a stride of 1 is dense)",
        "–",
    ),
    Choice(
        "actqkv",
        "shares of layers by entropy",
        "after 8 steps, within bounds that keep their sum",
        "deviation: official values come from other prompts, and its bounds break the sum",
        "`warm_up`, `least`",
    ),
    Choice(
        "actqkv",
        "probe of a decode step",
        "its own query, whose weight is 1",
        "official code",
        "`probe=8`: weighted by activation bias",
    ),
    Choice(
        "attention_predictor",
        "weights of the net",
        "trained on the bundled model's dense attention",
        "deviation: official ones are other models'",
        "`predictor=FILE`; `predictor=mean`: no net",
    ),
    Choice(
        "pod",
        "post-training",
        "none: layers share keys they were not trained to share",
        "deviation: 5 billion tokens in the paper",
        "–",
    ),
    Choice(
        "focusllava",
        "region, router, gate, balance",
        "4 x 4 patches; one linear map of mean and maximum; top scale, no gate; a budget on the mean count",
        "ours: abstract and reviews name the parts, no code was found",
        "–",
    ),
    Choice("h2o", "equal scores", "`torch.topk`'s order", "official code", "`ties=first`: lower position"),
    Choice(
        "csp",
        "`bias` other than 1",
        "the last recent · bias positions stay, the rest of the budget is chosen among all others",
        "official code",
        "–",
    ),
    Choice("csp", "order in the cache", "within, across, last", "official code", "–"),
    Choice(
        "csp",
        "a position best in both parts",
        "once: the cross part takes its next best",
        "deviation: keeps the budget exact",
        "`deduplicate=false`: twice, as published",
    ),
    Choice(
        "csp",
        "`cross_fraction=0`",
        "no cross part",
        "formula",
        "`deduplicate=false`: the published constant, 1 across and 308 within",
    ),
    Choice("csp", "prompts without an image", "stay whole", "official code", "–"),
    Choice("csp", "equal scores", "`torch.topk`'s order", "official code", "`ties=first`: lower position"),
    Choice(
        "sgl",
        "who looks in prefill",
        "positions from the last visual token on, that token included",
        "official code",
        "`observers=after_image`",
    ),
    Choice(
        "sgl",
        "does the large model run",
        "always; the trace holds the small model's confidence (and consistency, where early exit asks for it)",
        "official code",
        "`early_exit`: not where `exit_score` (mean, confidence or consistency) reaches it",
    ),
    Choice(
        "sgl",
        "confidence, consistency",
        "geometric mean of the token probabilities; their product on an image pruned to `consistency_keep`",
        "official code",
        "–",
    ),
    Choice(
        "dejavu",
        "form and loss of the predictors",
        "two linear maps, weighted cross entropy",
        "official code",
        "`train_predictors.py --relu`",
    ),
    Choice(
        "dejavu",
        "labels",
        "the largest activations by magnitude",
        "the official ones belong to ReLU FFNs",
        "`train_predictors.py --labels positive`: above 0, as published",
    ),
    Choice(
        "topv",
        "scale of the three costs",
        "same spread over a sample's tokens before they are weighted",
        "no official code; the paper finds the weights do not matter",
        "`terms=raw`: plain sum, which ranks by distance from the image's centre",
    ),
)


def table() -> list[str]:
    """The choices as lines of a Markdown table."""
    lines = [
        "| method | choice | default | follows | variants |",
        "|---|---|---|---|---|",
    ]
    return lines + [f"| `{c.method}` | {c.what} | {c.default} | {c.origin} | {c.variants} |" for c in CHOICES]

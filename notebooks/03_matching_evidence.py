# %% [markdown]
# # Matching evidence
#
# Why should neurons say anything about tokens? The paper's argument: two tokens that point in the same direction
# activate the same neurons, so counting shared neurons measures the angle to the question, without any attention map.
# If that holds, co-activation counts and cosine similarities must rank the visual tokens alike.

# %% tags=["parameters"]
MODEL = "tiny"
IMAGES = 4

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars may be plain text

import numpy as np
import pandas as pd

import corematching as cm
from corematching.inspection import evidence_figures
from corematching.inspection.evidence import matching_evidence, mini_examples, rank_correlation

model, processor = cm.load_model(MODEL)
evidence = [matching_evidence(model, processor, one) for one in mini_examples(images=IMAGES, questions=1)]
depth = len(evidence[0].match)

# %% [markdown]
# Each dot is a visual token, each colour a question: neurons it activates together with the last token of the prompt,
# against the cosine between their FFN inputs. On the right, Spearman's rank correlation for every layer.

# %%
evidence_figures.matching(evidence, layers=[1, depth // 2, depth - 2])

# %% [markdown]
# The same for the score that CoreMatching uses, the match with the sentence's core neurons.

# %%
table = pd.DataFrame(
    {
        "co-activation ~ cosine": rank_correlation(evidence).mean(axis=0),
        "core match ~ cosine": rank_correlation(evidence, "match", "cosine").mean(axis=0),
        "core match ~ co-activation": rank_correlation(evidence, "match", "coactivation").mean(axis=0),
    }
)
table.index.name = "layer"
table.round(2)

# %% [markdown]
# How much do the two scores agree on a budget of 64 tokens? By chance they would share 64 / 576 = 11 %.


# %%
def shared(first: np.ndarray, second: np.ndarray, keep: int = 64) -> float:
    """Share of the top `keep` tokens that two scores have in common."""
    return len(set(np.argsort(-first)[:keep]) & set(np.argsort(-second)[:keep])) / keep


overlap = [[shared(one.match[layer], one.cosine[layer]) for one in evidence] for layer in range(depth)]
pd.Series(np.mean(overlap, axis=1), name="shared among the top 64").rename_axis("layer").round(2)

# %% [markdown]
# # Core tokens
#
# Which patches of an image does the model need for a question? CoreMatching looks for visual tokens that activate the
# same FFN neurons as the sentence as a whole. Two questions about one image should give two different sets.

# %% tags=["parameters"]
MODEL = "tiny"
IMAGES = 2
LAYER = 2  # tokens leave at the input of this layer

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars may be plain text

import corematching as cm
from corematching.answering.generator import Generator
from corematching.inspection import evidence_figures
from corematching.inspection.evidence import about_model, answered, elbow, matching_evidence, mini_examples

model, processor = cm.load_model(MODEL)
examples = mini_examples(images=IMAGES, questions=2)
evidence = [matching_evidence(model, processor, one) for one in examples]

# %% [markdown]
# ## The elbow
#
# Count for every visual token how many of the sentence's core neurons it activates, sort the counts, and cut where the
# curve is farthest from the straight line between its ends. No budget has to be chosen.

# %%
depth = len(evidence[0].match)
evidence_figures.elbow_curve(evidence[0], layers=[LAYER - 1, depth // 2, depth - 2])

# %%
for one, found in zip(examples, evidence):
    kept = [elbow(counts)[1] for counts in found.match]
    print(one.question.splitlines()[0], "-> tokens kept, by layer:", kept)

# %% [markdown]
# ## On the image
#
# Faded patches are dropped. FastV ranks tokens by attention, core tokens by shared neurons.

# %%
methods = {
    "fastv 64": cm.build_method("fastv", layer=LAYER, keep=64),
    "core 64": cm.build_method("core_tokens", layer=LAYER, threshold="keep", keep=64),
    "core, elbow": cm.build_method("core_tokens", layer=LAYER, threshold="elbow", keep=None),
}
rows = answered(Generator(model, processor), examples, methods)
evidence_figures.core_tokens(rows, evidence[0].grid, about_model(model, f"n = {len(rows)} questions"))

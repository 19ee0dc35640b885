# %% [markdown]
# # Quickstart
#
# Load a vision-language model, ask it about an image, and ask again while a method drops visual tokens. Everything runs
# on a CPU, without a network, with the bundled tiny model and scenes it has not seen in training.

# %% tags=["parameters"]
MODEL = "tiny"  # a conf/model name, a local path or a hub id
IMAGES = 8
KEEP = 64

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars may be plain text

import pandas as pd

import corematching as cm
from corematching.answering.generator import Generator
from corematching.inspection.evidence import mini_examples, question_of

model, processor = cm.load_model(MODEL)
examples = mini_examples(images=IMAGES, questions=2)
examples[0].image

# %% [markdown]
# ## One question, plain transformers
#
# A method is a context manager around the model. Inside it, `model.generate` is the usual one; the trace says what
# really ran. After it the model is the dense one again, bit for bit.

# %%
from corematching.answering.conversation import render

prompt = render(processor, examples[0].question, images=1, prompt="llava15")
inputs = processor(text=prompt, images=[examples[0].image], return_tensors="pt")

with cm.build_method("corematching", keep=KEEP, threshold="keep")(model) as trace:
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)

answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
sample = trace.samples[0]
print(examples[0].question.splitlines()[0], "->", answer.strip(), "| expected:", examples[0].target)
print("visual tokens entering each layer:", [len(tokens) for tokens in sample.visual_tokens])
print("KV entries after prefill:         ", sample.kv_lengths)
print("FFN neurons used in decode:       ", ["all" if used is None else len(used) for used in sample.neurons])

# %% [markdown]
# ## A few questions, several methods
#
# `Generator` groups questions into batches, as the evaluation does. FLOPs follow from the trace.

# %%
generator = Generator(model, processor)
questions = [question_of(one, max_new_tokens=8) for one in examples]
methods = {
    "dense": cm.build_method("dense"),
    "random": cm.build_method("random", keep=KEEP),
    "fastv": cm.build_method("fastv", keep=KEEP),
    "corematching": cm.build_method("corematching", keep=KEEP, threshold="keep"),
}
rows = []
for name, method in methods.items():
    answers = generator.answer(questions, method)
    right = [answer.text.strip().lower() == one.target for answer, one in zip(answers, examples)]
    total = cm.flops(model.config, [answer.trace for answer in answers]) / len(answers)
    rows.append(
        {
            "method": name,
            "right": f"{sum(right)} of {len(right)}",
            "visual tokens/layer": sum(answer.trace.average_visual_tokens for answer in answers) / len(answers),
            "GFLOPs": total.total / 1e9,
        }
    )
pd.DataFrame(rows).set_index("method").round(2)

# %% [markdown]
# So few questions say little. The real thing scores hundreds of them with lmms-eval's own code, with intervals:
#
# ```
# python run.py
# python scripts/report.py results/quickstart
# ```

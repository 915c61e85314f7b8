# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of Hydra
#
# *15 minutes; some PyTorch helps, nothing else is needed.*
#
# Hydra ([arXiv 2508.15099](https://arxiv.org/abs/2508.15099)) is a language model whose blocks have up to five
# **paths** side by side. Block $i$ computes
#
# $$y = x + \sum_p g_p \, \mathrm{path}_p(\mathrm{RMSNorm}(x))$$
#
# with one learned gate $g_p$ per path: a Mamba-2 state-space path (`ssm`) in every block, and in some blocks sparse
# `attention`, a mixture of experts (`moe`) that routes whole chunks of tokens, a `workspace` of slots, and a
# product-key `memory`.
#
# By the end of this tour you will have read what a trained Hydra decides, changed one decision, and seen what
# followed. Everything runs on the small model that ships with the project. It is a teaching animal: it has seen a few
# million tokens of Python, manuals, old prose, puzzles and facts, and it writes accordingly.

# %%
import ipywidgets as widgets
import torch
from IPython.display import display

import hydra_lab
from hydra_lab import figures, metrics
from hydra_lab.accounting import parameter_table
from hydra_lab.capture.in_memory import capture_batch

model, tokenizer = hydra_lab.load("demo")
torch.manual_seed(0)
for index, block in enumerate(model.model.layers):
    print(
        f"block {index}:", ", ".join(f"{path} (g = {block.gates[path].item():.2f})" for path in block.paths)
    )
print(f"{parameter_table(model.config).total:,} parameters")

# %% [markdown]
# ## 1. Let it write
#
# `generate` is that of transformers. The state it keeps per token of context is constant but for the attention path.

# %%
prompt = "def read_lines(path):\n    "
ids = tokenizer(prompt, return_tensors="pt")
written = model.generate(**ids, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(written[0]))

# %% [markdown]
# ## 2. Who took which chunk?
#
# A mixture-of-experts path cuts the text into chunks and sends all tokens of a chunk to the same two experts. The
# router sees only what is known at a chunk's *first token*: that token and an average over the earlier chunks. (The
# paper's prototype averages over the chunk itself, so its tokens see their own future.)
#
# **Predict before you run:** will code and Bible verses be sent to the same experts?

# %%
TEXTS = {
    "code": (
        "import os\n\n\ndef walk(top):\n    for name in os.listdir(top):\n        path = os.path.join(top, name)\n"
        "        if os.path.isdir(path):\n            yield from walk(path)\n        else:\n            yield path\n"
    ),
    "prose": (
        "And it came to pass in those days, that there went out a decree from the king, and all the people went up to "
        "the city, every man with his sons and his daughters, and they did eat and drink before the Lord that day."
    ),
    "recall": (
        "recall: Fenmar = Q; Kelgor = D; Zorlin = Z; Belquin = R; ? Zorlin = Z; ? Kelgor = D; ? Belquin = R; "
        "? Fenmar = Q; ? Kelgor = D; ? Zorlin = Z; ? Fenmar = Q; ? Belquin = R;"
    ),
}


def capture_text(text: str):
    """Everything that the model decides on one text."""
    return capture_batch(model, tokenizer(text, return_tensors="pt")["input_ids"])


def draw_routing(name: str) -> None:
    """The experts of every chunk, block by block."""
    record = metrics.routing_record(capture_text(TEXTS[name]))
    display(figures.routing_map(metrics.routing_map(record)))


choice = widgets.ToggleButtons(options=list(TEXTS), description="text:")
display(choice, widgets.interactive_output(draw_routing, {"name": choice}))

# %% [markdown]
# Routing that looks specialized means nothing if the model ignores the path. So before we believe such a picture, we
# ask how much the path is *used*: its share of the block's update, and what it costs to cut it. Here is both, on small
# samples of held-out text. Every figure of the lab can carry this line.

# %%
from hydra_lab.capture.path_use import measure_path_use
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.loading import model_directory

samples = {domain: texts[:4] for domain, texts in read_sample_texts(model_directory("demo")).items()}
use = measure_path_use(model, tokenizer, samples)
display(figures.path_use(use))
for path in use.paths:
    print(use.describe(path))

# %% [markdown]
# ## 3. Force an expert
#
# What a tap returns is what the model goes on to use. `HydraLens` (nnsight) reads it by name and lets you assign to it.
# Below, questions about the world are answered twice; the second time, every chunk of block 0 is sent to expert 5,
# which mostly sees prose, with the weights left as they were.
#
# **Predict:** will the model's next token change? Its probability? And what if the chunks go to expert 1?

# %%
from hydra_lab import HydraLens

lens = HydraLens(model, tokenizer)
text = "Q: capital of Peru? A: Lima\nQ: currency of Japan? A: JPY\nQ: country of Osaka? A:"
with lens.trace(text):
    chosen = lens.layers[0].moe.experts.save()
    before = lens.logits[:, -1].softmax(-1).save()
with lens.trace(text):
    lens.layers[0].moe.experts[:] = 5
    after = lens.logits[:, -1].softmax(-1).save()


def top_tokens(probabilities, count: int = 5) -> str:
    """The most probable next tokens."""
    best = probabilities[0].topk(count)
    return ", ".join(
        f"{tokenizer.decode(i)!r} {p:.2f}" for p, i in zip(best.values, best.indices, strict=True)
    )


print("experts that block 0 chose, by chunk:", chosen[0].tolist())
print("untouched:    ", top_tokens(before))
print("expert forced:", top_tokens(after))
print(f"total variation distance: {(after - before).abs().sum() / 2:.3f}")

# %% [markdown]
# ## 4. Read the memory
#
# The product-key memory compares a query with two small sets of half-keys; every pair of half-keys names one row of a
# large value table, so 2 x 128 keys address 16,384 rows. A gate $\beta$ in (0, 1) says how far the block opens to what
# was read. The paper hopes that $\beta$ is low when the answer stands in the context and high when it does not. We
# measure.

# %%
layer = model.config.memory_layers[0]
asked = {
    "closed book": "Q: country of Osaka? A:",
    "open book": "Note: the country of Osaka is Japan.\nQ: country of Osaka? A:",
}
for name, question in asked.items():
    recording = hydra_lab.record(model, tokenizer(question, return_tensors="pt")["input_ids"])
    lookup = recording[f"layers.{layer}.memory.lookup"]
    answer = tokenizer.decode(recording.logits[0, -1].argmax())
    rows = lookup.addresses[0, -1, 0, :3].tolist()
    beta = lookup.gate[0, -1, 0]
    print(
        f"{name:12s} beta at the last token {beta:.3f}   rows read first by head 0: {rows}   says {answer!r}"
    )

# %% [markdown]
# Which tokens use a row? We capture the samples and ask for the row that received the most weight.

# %%
batch = tokenizer(
    [text for texts in samples.values() for text in texts],
    return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=256,
)  # fmt: skip
domains = [domain for domain, texts in samples.items() for _ in texts]
captured = capture_batch(model, batch["input_ids"], batch["attention_mask"], domains=domains)
lookups = metrics.lookup_record(captured, layer)
display(figures.memory_use(metrics.memory_use(lookups), path_use=use))
display(figures.beta_by_domain(metrics.beta_by_domain(lookups), path_use=use))

# %% [markdown]
# ## 5. Does it matter? Cut the path
#
# Correlation is not use. Cutting the memory everywhere, and asking again, is the causal question.

# %%
question = tokenizer(asked["closed book"], return_tensors="pt")["input_ids"]
with torch.no_grad():
    whole = model(question).logits[:, -1].softmax(-1)
    with model.cut("memory"):
        without = model(question).logits[:, -1].softmax(-1)
print("with the memory:   ", top_tokens(whole))
print("without the memory:", top_tokens(without))

# %% [markdown]
# ## Where this breaks
#
# - One prompt is an anecdote. Whether experts *specialize* is tested by `hydra-lab probe expert-specialization demo`:
#   against permuted labels, against a random router, and by ablating every expert.
# - A path can be idle and still draw handsome pictures. Look at its path use first.
# - Forcing an expert with the old weights is an unusual input for the model: a changed answer shows that the path
#   matters, not that this expert "knows" something.
#
# Next: `make dashboard` shows the same on text of your own; `hydra-lab capture` records files of any size.

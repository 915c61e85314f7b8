# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 0. A tour of Hydra
#
# **Goal:** read what a trained Hydra decides, change one decision, and measure what followed · **Minutes:** 15 · **Difficulty:** easy
#
# Some PyTorch helps; nothing else is assumed.
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
# Everything runs on the small model that ships with the project. It is a teaching animal: it has seen about thirty
# million tokens of Python, manuals, old prose, puzzles and facts, and it writes accordingly.

# %%
import ipywidgets
import torch
from IPython.display import display

import hydra_lab
from hydra_lab import HydraLens, figures, metrics
from hydra_lab.accounting import parameter_table
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.capture.path_use import measure_path_use
from hydra_lab.course import check, check_close, passed, predict, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.interventions import intervened
from hydra_lab.loading import model_directory
from hydra_lab.widgets import TokenStrip

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
for index, block in enumerate(model.model.layers):
    print(
        f"block {index}:", ", ".join(f"{path} (g = {block.gates[path].item():.2f})" for path in block.paths)
    )
print(f"{parameter_table(model.config).total:,} parameters")

# %% [markdown]
# ## Let it write
#
# `generate` is that of transformers. What the model keeps per token of context is constant but for the attention path.

# %%
ids = tokenizer("def read_lines(path):\n    ", return_tensors="pt")
written = model.generate(**ids, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(written[0]))

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


def encode(text: str) -> torch.Tensor:
    """Token ids, [1, L]."""
    return tokenizer(text, return_tensors="pt")["input_ids"]


# %% [markdown]
# How hard is each token for it? Below, each token is coloured by its loss, given everything before it; the marks are the
# chunks of the experts. Point at a token for its value. Which name comes is news each time; what belongs to it is news only once.

# %%
recalled = encode(TEXTS["recall"])
with torch.no_grad():
    log_probabilities = model(recalled).logits[0, :-1].log_softmax(-1)
loss = -log_probabilities.gather(1, recalled[0, 1:, None])[:, 0]
TokenStrip(
    [tokenizer.decode(i) for i in recalled[0]],
    [float("nan"), *loss.tolist()],
    label="loss (nats)",
    chunk_size=model.config.moe_chunk_size,
)

# %% [markdown]
# ## Who took which chunk?
#
# A mixture-of-experts path cuts the text into chunks and sends all tokens of a chunk to the same two experts. The
# router sees only what is known at a chunk's *first token*: that token and an average over the earlier chunks. (The
# paper's prototype averages over the chunk itself, so its tokens see their own future.)

# %%
samples = {domain: texts[:2] for domain, texts in read_sample_texts(model_directory("demo")).items()}
print("held-out samples of", ", ".join(samples))
print(samples["prose"][0][:200])

# %% tags=["predict"]
same_experts = predict(
    "In block 0, will 256 tokens of Python and 256 tokens of old prose be sent to the same experts?",
    ["yes, about equally often", "partly", "no, they share none"],
)

# %%
compared = {name: encode(samples[name][0])[:, :256] for name in ("code", "prose")}
for name, ids in compared.items():
    record = metrics.routing_record(capture_batch(model, ids))
    figure = figures.routing_map(metrics.routing_map(record))
    figure.layout.title.text = f"{name.capitalize()}. {figure.layout.title.text}"
    display(figure)

# %%
loads = {}
for name, ids in compared.items():
    experts = hydra_lab.record(model, ids)["layers.0.moe.routing"].experts
    loads[name] = torch.bincount(experts.flatten(), minlength=model.config.moe_num_experts) / experts.numel()
    print(
        f"{name:6s} ({experts.shape[1]} chunks) share of the places at each expert: {[round(x, 2) for x in loads[name].tolist()]}"
    )
distance = (loads["code"] - loads["prose"]).abs().sum().item() / 2
same_experts.reveal(
    same_experts.options[0 if distance < 0.1 else 2 if distance > 0.99 else 1],
    f"The total variation distance of the two shares is {distance:.2f} (0: the same, 1: nothing in common).",
)

# %% [markdown]
# Now with text of your own. Type something, or choose one of the three texts.


# %%
def draw_routing(text: str) -> None:
    """The experts of every chunk, block by block."""
    if text.strip():
        record = metrics.routing_record(capture_batch(model, encode(text)))
        display(figures.routing_map(metrics.routing_map(record)))


own_text = ipywidgets.Textarea(
    TEXTS["recall"], continuous_update=False, layout=ipywidgets.Layout(width="100%", height="90px")
)
choice = ipywidgets.ToggleButtons(options=list(TEXTS), value="recall")
choice.observe(lambda change: setattr(own_text, "value", TEXTS[change["new"]]), "value")
display(choice, own_text, ipywidgets.interactive_output(draw_routing, {"text": own_text}))

# %% [markdown]
# ## Is the path used at all?
#
# Routing that looks specialized means nothing if the model ignores the path. So before we believe such a picture, we
# ask how much the path is *used*: its share of the block's update, and what it costs to cut it. Here are both, on small
# samples of held-out text. Every figure of the lab can carry this line.

# %%
use = measure_path_use(model, tokenizer, samples)
display(figures.path_use(use))
for path in use.paths:
    print(use.describe(path))

# %% [markdown]
# ## Force an expert
#
# What a tap returns is what the model goes on to use. `HydraLens` (nnsight) reads it by name and lets you assign to it.
# The question below is answered twice; the second time every chunk of block 0 is sent to expert 5, with the weights
# left as they were.

# %%
QUESTION = "Q: capital of Peru? A: Lima\nQ: currency of Japan? A: JPY\nQ: country of Osaka? A:"
lens = HydraLens(model, tokenizer)


def top_tokens(probabilities: torch.Tensor, count: int = 5) -> str:
    """The likeliest next tokens; probabilities [1, V]."""
    best = probabilities[0].topk(count)
    return ", ".join(
        f"{tokenizer.decode(i)!r} {p:.2f}" for p, i in zip(best.values, best.indices, strict=True)
    )


# %% tags=["predict"]
forced_answer = predict(
    "Every chunk of block 0 goes to expert 5 instead of its own two. What happens to the likeliest next token?",
    ["it stays, with the same probability (within 0.01)", "it stays, with another probability", "it changes"],
)

# %%
with lens.trace(QUESTION):
    chosen = lens.layers[0].moe.experts.save()
    before = lens.logits[:, -1].softmax(-1).save()
with lens.trace(QUESTION):
    lens.layers[0].moe.experts[:] = 5
    after = lens.logits[:, -1].softmax(-1).save()

print("experts that block 0 chose, by chunk:", chosen[0].tolist())
print("untouched:    ", top_tokens(before))
print("expert forced:", top_tokens(after))
moved = (after - before).abs().sum().item() / 2
stays = before.argmax() == after.argmax()
same = stays and (before.max() - after.max()).abs() < 0.01
forced_answer.reveal(
    forced_answer.options[0 if same else 1 if stays else 2],
    f"The total variation distance of the two distributions is {moved:.3f}.",
)

# %% [markdown]
# ### Exercise 0.1: the next token after a forced expert
#
# Write `forced(text, block, expert)`: the probabilities of the next token after `text`, shape `[1, vocabulary]`, when
# every chunk of that block's mixture of experts goes to `expert`. Use `lens.trace` as above, and `.save()` what should
# outlive the trace.


# %% tags=["exercise"]
def forced(text, block, expert):
    """Probabilities of the next token, [1, V], with every chunk of `block` sent to `expert`."""
    # BEGIN SOLUTION: trace the text, assign to the block's experts, return the last position's softmax
    with lens.trace(text):
        lens.layers[block].moe.experts[:] = expert
        probabilities = lens.logits[:, -1].softmax(-1).save()
    return probabilities
    # END SOLUTION


# %% tags=["check"]
answer = forced(QUESTION, 0, 5)
check(answer is not None, "Does the function return the probabilities?")
check(
    answer.shape == (1, model.config.vocab_size),
    "Take the last position only: logits[:, -1] has shape [1, V].",
)
check_close(answer.sum(), 1.0, "Probabilities sum to one: softmax over the vocabulary.", rtol=1e-4)
check(
    not torch.allclose(answer, before),
    "This is the untouched model's answer: assign to experts[:] in the trace.",
)
check_close(
    answer, after, "Other probabilities than in the cell above: which block, which expert?", atol=1e-5
)
for block, expert in ((0, 1), (2, 3)):
    with intervened(model, f"moe[{block}].force(expert={expert})"), torch.no_grad():
        expected = model(encode(QUESTION)).logits[:, -1].softmax(-1)
    check_close(
        forced(QUESTION, block, expert), expected, "Use the arguments, not 0 and 5.", rtol=1e-3, atol=1e-4
    )
passed("0.1")

# %% [markdown]
# ## Read the memory
#
# The product-key memory compares a query with two small sets of half-keys; every pair of half-keys names one row of a
# large value table, so 2 × 128 keys address 16,384 rows. A gate $\beta$ in (0, 1) says how far the block opens to what
# was read. The paper hopes that $\beta$ is low when the answer stands in the context and high when it does not. We
# look at one question; whether it holds is a question for many, and `hydra-lab probe memory-recall demo` asks it.

# %%
layer = model.config.memory_layers[0]
asked = {
    "closed book": "Q: country of Osaka? A:",
    "open book": "Note: the country of Osaka is Japan.\nQ: country of Osaka? A:",
}
for name, question in asked.items():
    recording = hydra_lab.record(model, encode(question))
    lookup = recording[f"layers.{layer}.memory.lookup"]
    says = tokenizer.decode(recording.logits[0, -1].argmax())
    rows = lookup.addresses[0, -1, 0, :3].tolist()
    beta = lookup.gate[0, -1, 0]
    print(f"{name:12s} beta at the last token {beta:.3f}   rows read first by head 0: {rows}   says {says!r}")

# %% [markdown]
# How far the gate opens, by domain, over the samples from above:

# %%
batch = tokenizer(
    [text for texts in samples.values() for text in texts],
    return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=256,
)  # fmt: skip
domains = [domain for domain, texts in samples.items() for _ in texts]
captured = capture_batch(model, batch["input_ids"], batch["attention_mask"], domains=domains)
display(figures.beta_by_domain(metrics.beta_by_domain(metrics.lookup_record(captured, layer)), path_use=use))

# %% [markdown]
# ## Does it matter? Change it
#
# Correlation is not use. `hydra_lab.interventions` is the vocabulary of changes: the library, the command line
# (`--intervene`) and the dashboard all read the same text. Inside the `with` block the model runs changed; after it, it
# is as it was.

# %%
show_source(intervened)

# %%
with torch.no_grad():
    whole = model(encode(asked["closed book"])).logits[:, -1].softmax(-1)
    with intervened(model, "memory[*].cut()"):
        without = model(encode(asked["closed book"])).logits[:, -1].softmax(-1)
print("with the memory:   ", top_tokens(whole))
print("without the memory:", top_tokens(without))

# %% [markdown]
# ### Exercise 0.2: what a path is worth on a text
#
# Write `cost_of_cutting(text, path)`: by how many nats per token the loss of the text rises when `path` (such as
# `"moe"`) is cut in every block. `model(ids, labels=ids).loss` is the mean loss of the text's tokens.


# %% tags=["exercise"]
def cost_of_cutting(text, path):
    """Loss with the path cut everywhere, less the loss of the whole model, in nats per token."""
    # BEGIN SOLUTION: the loss with the path cut everywhere (intervened), less the loss of the whole model
    ids = encode(text)
    with torch.no_grad():
        whole_loss = model(ids, labels=ids).loss
        with intervened(model, f"{path}[*].cut()"):
            cut_loss = model(ids, labels=ids).loss
    return (cut_loss - whole_loss).item()
    # END SOLUTION


# %% tags=["check"]
cost = cost_of_cutting(TEXTS["code"], "ssm")
check(cost is not None, "Does the function return the difference?")
check(cost != 0, "Nothing was cut: run the model inside `with intervened(model, ...)`.")
check(
    cost > 0,
    "Cutting the state-space path hurts, so the cost is positive: cut less whole, not whole less cut.",
)
for name, path in (("code", "ssm"), ("recall", "attention"), ("prose", "moe")):
    ids = encode(TEXTS[name])
    with torch.no_grad():
        expected = -model(ids, labels=ids).loss
        with model.cut(path):
            expected = expected + model(ids, labels=ids).loss
    check_close(
        cost_of_cutting(TEXTS[name], path), expected, f"Cut {path} in every block, [*].", rtol=1e-3, atol=1e-4
    )
passed("0.2")

# %% [markdown]
# ## Where this breaks
#
# - One prompt is an anecdote. Whether experts *specialize* is tested by `hydra-lab probe expert-specialization demo`:
#   against permuted labels, against a random router, and by ablating every expert.
# - A path can be idle and still draw handsome pictures. Look at its path use first.
# - Forcing an expert with the old weights is an unusual input for the model: a changed answer shows that the path
#   matters, not that this expert "knows" something.
# - On many questions $\beta$ does not do what the paper hopes: it opens no less when the notes hold the answer (README,
#   "What the demo shows").

# %% [markdown]
# ## Next
#
# - Lesson 1 takes the residual stream apart, path by path; [the overview](README.md) lists all lessons.
# - `hydra-lab dashboard` shows the same on text of your own; `hydra-lab capture` records files of any size.

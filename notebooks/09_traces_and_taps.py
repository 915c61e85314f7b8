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
# # 9. Traces, taps and the lens
#
# **Goal:** read any decision of a running model by name, overwrite it, differentiate through it, and capture it for many texts · **Minutes:** 40 · **Difficulty:** medium
#
# You need PyTorch's autograd and the tour. Forward hooks help, but are explained.
#
# A model decides: which experts a chunk gets, which rows of the memory are read, how far a gate opens. To study a decision
# $d = f(h)$ we want to do three things with it. *Read* it. *Write* it: run the rest of the model, $y = g(d)$, on a $d'$ of
# our own, which is an intervention, $\mathrm{do}(d = d')$. And *differentiate* $y$ with respect to it. All three need a
# place where $d$ is handed over. Here that place is a **tap**: a module that returns what it is given.

# %%
import tempfile
from pathlib import Path

import nnsight
import numpy as np
import torch
from IPython.display import display
from nnsight.intervention.interleaver import OutOfOrderError

import hydra_lab
from hydra_lab import HydraLens, figures, metrics
from hydra_lab.attribution import activation_patching, decision_gradients, logit_difference, logit_lens
from hydra_lab.capture import capture_files
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.loading import model_directory
from hydra_lab.nn.memory import MemoryPath
from hydra_lab.path_use import read_path_use
from hydra_lab.taps import PATHS, TAPS, Tap

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
model.requires_grad_(False)  # we differentiate with respect to activations; weights need no gradients
show_source(Tap)

# %% [markdown]
# Why a module that does nothing? Because PyTorch lets a program look into *modules*: a forward hook is called with a
# module's output, and what the hook returns replaces it. A tensor in the middle of a `forward` has no such handle. See how the
# memory uses its tap: what comes out of `self.lookup(...)` is what the values are fetched with. There is no second copy that
# the model uses in secret, so reading shows the truth and writing changes the model.

# %%
show_source(MemoryPath.forward)

# %% [markdown]
# ## What can be read
#
# `hydra_lab.record` puts a hook on every tap, runs the model once, and returns the decisions by name. The first axis
# is always the batch. The second counts a row's own tokens (L) or chunks (C), whatever the padding.


# %%
def encode(text: str) -> torch.Tensor:
    """Token ids, [1, L]."""
    return tokenizer(text, return_tensors="pt")["input_ids"]


PROMPT = "Q: country of Osaka? A:"
ids = encode(PROMPT)
recording = hydra_lab.record(model, ids, hidden=True)
for tap in TAPS:
    by_layer = recording.by_layer(tap)
    decision = by_layer[min(by_layer)]
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in decision._asdict().items())
    print(f"{tap:20s} blocks {sorted(by_layer)!s:20s} {type(decision).__name__}: {shapes}")

# %% [markdown]
# The second reader is `HydraLens`, built on nnsight ([Fiotto-Kaufman et al. 2024, arXiv 2407.14561](https://arxiv.org/abs/2407.14561)).
# A **trace** is a block of code that runs *while* the model runs: where it asks for a value, it waits until the model gets there,
# gets it, and may change it before the model goes on. Names such as `layers[3].memory.beta` are fields of taps.

# %%
lens = HydraLens(model, tokenizer)
with lens.trace(PROMPT):
    experts = lens.layers[0].moe.experts.save()
    beta = lens.layers[3].memory.beta.save()
    logits = lens.logits.save()
print("experts of block 0, by chunk:", experts[0].tolist())
print("beta by token:", [round(each, 2) for each in beta[0, :, 0].tolist()])
print("next token:", repr(tokenizer.decode(logits[0, -1].argmax())))

# %% [markdown]
# Two readers are only worth having if they agree. Not nearly: to the bit, in every field of every tap.

# %%
in_order = sorted(recording, key=lambda path: (int(path.split(".")[2]), PATHS.index(path.split(".")[3])))
with lens.trace(ids):
    seen = nnsight.save({path: lens.get(path).output for path in in_order})
    logits = lens.logits.save()
same = [
    torch.equal(value, getattr(seen[path], name))
    for path, decision in recording.items()
    for name, value in decision._asdict().items()
]
print(f"{sum(same)} of {len(same)} fields of {len(recording)} taps are equal to the bit; "
      f"logits equal: {torch.equal(recording.logits, logits)}")  # fmt: skip

# %% [markdown]
# Because a trace runs beside the model, two rules follow from it, and each has its own error. What should outlive the
# trace must be saved. And a trace cannot ask for what the model has already passed: within a block the order is ssm,
# attention, moe, workspace, memory.

# %%
try:
    with lens.trace(PROMPT):
        unsaved = lens.layers[0].moe.experts
    print(unsaved)
except NameError as error:
    print("not saved:  ", error)
try:
    with lens.trace(PROMPT):
        late = lens.layers[2].moe.experts.save()
        early = lens.layers[0].moe.experts.save()
except OutOfOrderError as error:
    print("out of order:", str(error).splitlines()[0])

# %% [markdown]
# ## Writing: where does the tap stand?
#
# To overwrite a decision, assign to its name. What follows from it depends on where the tap stands in the computation, so one
# should know. The router of a mixture of experts computes logits $z_c$, takes the experts with the $K$ largest, and gives
# token $t$ the weights $\mathrm{softmax}(z_c + W_t h_t)$ over those. The tap `moe.routing` carries all three.

# %%
passage = encode(read_sample_texts(model_directory("demo"))["code"][0])[:, :256]
with lens.trace(passage):
    plain_experts = lens.layers[0].moe.experts.save()
    plain = lens.logits.save()
runner_up = plain_experts[..., 1].flatten().mode().values.item()
print(
    "experts of block 0, by chunk:",
    plain_experts[0].tolist(),
    "- the most frequent second choice:",
    runner_up,
)

# %% tags=["predict"]
written_logits = predict(
    f"In a trace we add 100 to the router's logit of expert {runner_up}, in every chunk of block 0. What follows?",
    [
        f"every chunk goes to expert {runner_up}, and the model's logits change",
        f"the experts stay, but where {runner_up} was chosen it gets all the weight, and the model's logits change",
        "the model's logits stay as they are, to the bit",
    ],
)

# %%
with lens.trace(passage):
    lens.layers[0].moe.logits[:, :, runner_up] += 100
    experts_after = lens.layers[0].moe.experts.save()
    logits_written = lens.logits.save()
with lens.trace(passage):
    lens.layers[0].moe.experts[:, :, 0] = runner_up
    experts_written = lens.logits.save()
moved = (logits_written - plain).abs().max().item()
moved_by_experts = (experts_written - plain).abs().max().item()
rerouted = not torch.equal(plain_experts, experts_after)
written_logits.reveal(
    written_logits.options[0 if rerouted else 1 if moved > 0 else 2],
    f"The largest change of a logit of the model is {moved:.2g}. The tap stands behind the top-k and the softmax, so the router's "
    "logits are there to be read (and for the balance loss); the decision itself is `experts` and `weights`. Writing "
    f"{runner_up} into `experts` in place of each chunk's first choice moves a logit by up to {moved_by_experts:.2g}.",
)

# %% [markdown]
# That the logits can be read beside the choice tells how *close* the choice was. With $z_{(1)} \ge z_{(2)} \ge \dots$ the sorted
# logits of a chunk, the experts change when $z_{(K)}$ and $z_{(K+1)}$ change places, so the margin of a routing decision is
#
# $$m_c = z_{(K)} - z_{(K+1)} .$$
#
# The gap between the first and the second expert is another question: for $K = 2$ both are chosen whichever is ahead.
#
# ### Exercise 9.1: the margin of a routing decision
#
# Write `routing_margins(ids, block)`: the margin $m_c$ of every chunk of that block, shape `[B, C]`, for token ids
# `[B, L]`. Use a trace, or `hydra_lab.record`. `model.config.moe_top_k` is $K$.


# %% tags=["exercise"]
def routing_margins(ids, block):
    """Logit of the last chosen expert less the best logit that was left out, [B, C]."""
    # BEGIN SOLUTION: read the router's logits of the block, sort them, subtract the K+1-th from the K-th
    with lens.trace(ids):
        router_logits = lens.layers[block].moe.logits.save()
    falling = router_logits.sort(dim=-1, descending=True).values
    top_k = model.config.moe_top_k
    return falling[..., top_k - 1] - falling[..., top_k]
    # END SOLUTION


# %% tags=["check"]
margins = routing_margins(passage, 0)
check(margins is not None, "Does the function return the margins?")
routing = hydra_lab.record(model, passage)["layers.0.moe.routing"]
check(
    tuple(margins.shape) == tuple(routing.experts.shape[:2]),
    f"One margin per row and chunk, shape {list(routing.experts.shape[:2])}: index the sorted logits along their last axis.",
)
chosen_logits = routing.logits.gather(-1, routing.experts)
check(
    not torch.allclose(margins, chosen_logits[..., 0] - chosen_logits[..., 1]),
    "This is the gap between the first and the second expert. Both are chosen: compare the K-th with the K+1-th.",
)
check(
    bool((margins >= 0).all()), "A margin is chosen less left out, so it cannot be negative: sort descending."
)
left_out = routing.logits.scatter(-1, routing.experts, -torch.inf).max(-1).values
check_close(
    margins,
    chosen_logits[..., -1] - left_out,
    "Subtract the router's logits themselves: not the weights, which know only the chosen experts, nor a softmax.",
    atol=1e-4,
)
batch = torch.cat([passage, passage.flip(1)])
routing = hydra_lab.record(model, batch)["layers.2.moe.routing"]
left_out = routing.logits.scatter(-1, routing.experts, -torch.inf).max(-1).values
expected = routing.logits.gather(-1, routing.experts)[..., -1] - left_out
check_close(routing_margins(batch, 2), expected, "Use the argument `block`, and keep all rows.", atol=1e-4)
passed("9.1")

# %% [markdown]
# ## The logit lens
#
# Reading need not stop at decisions: `lens.layers[i].output` is the residual stream $r^{(i)}$ after block $i$. The **logit
# lens** (nostalgebraist 2020) treats it as if the model ended there,
#
# $$p^{(i)} = \mathrm{softmax}\big(W_U \, \mathrm{RMSNorm}(r^{(i)})\big),$$
#
# with the final norm and the unembedding $W_U$. At the last block this is the model's own prediction. Below: the equation
# by hand, and the library's function.

# %%
with lens.trace(ids):
    residuals = nnsight.save([lens.layers[i].output for i in range(len(model.model.layers))])
by_hand = torch.stack([model.lm_head(model.model.norm(r)).softmax(-1) for r in residuals])
library = logit_lens(model, ids, num_tokens=1)
difference = (by_hand.max(-1).values - torch.from_numpy(library.probability[1:, ..., 0])).abs().max()
print(f"largest difference in the likeliest token's probability: {difference:.1e}")
display(figures.logit_lens(library, lambda token: tokenizer.decode([token])))

# %% [markdown]
# ## Gradients through a trace
#
# How does a decision bear on an answer? To first order its gradient says so, and it comes from one backward pass for all tokens
# at once. Take $\Delta$, the logit of the model's answer less that of its second choice, and the memory gate $\beta_t$. The
# memory adds $c_t = g \, \beta_t \, o_t$ to the residual stream, with $g$ the path's gate and $o_t$ what was read. Nothing else
# depends on $\beta_t$, so by the chain rule
#
# $$\frac{\partial \Delta}{\partial \beta_t} = \Big\langle \frac{\partial \Delta}{\partial c_t}, \, g\, o_t \Big\rangle
#   = \frac{1}{\beta_t} \Big\langle \frac{\partial \Delta}{\partial c_t}, \, c_t \Big\rangle .$$
#
# In a trace, `with difference.backward():` opens the backward pass. It runs from the end to the beginning, so the gradients
# are asked for in that order. Autograd needs something to start from: here the embeddings are told to require a gradient.

# %%
answer, second = recording.logits[0, -1].topk(2).indices.tolist()
with lens.trace(ids):
    embedded = lens.model.embed_tokens.output
    embedded.requires_grad_()
    beta = lens.layers[3].memory.beta
    contribution = lens.layers[3].memory.contribution
    difference = lens.logits[0, -1, answer] - lens.logits[0, -1, second]
    delta = difference.detach().save()
    beta_value = beta.detach().save()
    contribution_value = contribution.detach().save()
    with difference.backward():
        to_contribution = contribution.grad.save()
        to_beta = beta.grad.save()
equation = (to_contribution * contribution_value).sum(-1, keepdim=True) / beta_value
gradients = decision_gradients(model, ids, lambda logits: logits[0, -1, answer] - logits[0, -1, second])
of_library = torch.from_numpy(gradients.gradients["layers.3.memory.lookup.gate"])
print(f"logit of {tokenizer.decode(answer)!r} less that of {tokenizer.decode(second)!r}: {delta:.2f}")
print(f"largest difference, trace and equation: {(to_beta - equation).abs().max():.1e}")
print(f"largest difference, trace and library:  {(to_beta - of_library).abs().max():.1e}")
for token, b, gradient in zip(ids[0], beta_value[0, :, 0], to_beta[0, :, 0], strict=True):
    print(f"{tokenizer.decode(token):>9s}  beta {b:.3f}   d difference / d beta {gradient:+.3f}")

# %% [markdown]
# A gate near one and a gate near zero can have gradients of one size. To first order, shutting the gate at $t$ changes $\Delta$
# by $-\beta_t \, \partial\Delta/\partial\beta_t$, and opening it wholly by $(1 - \beta_t)\, \partial\Delta/\partial\beta_t$.

# %% tags=["predict"]
open_or_shut = predict(
    "Which moves the difference more: to shut the gate at the token where it is widest open, or to open it wholly at the last token?",
    ["to shut it where it is open", "to open it at the last token", "about the same (within 20%)"],
)


# %%
def difference_with_beta(position: int, value: float) -> float:
    """The logit difference at the last token while beta at one position has this value."""
    with lens.trace(ids):
        lens.layers[3].memory.beta[:, position] = value
        final = lens.logits[0, -1].save()
    return (final[answer] - final[second]).item()


widest, last = int(beta_value[0, :, 0].argmax()), ids.shape[1] - 1
effects = {}
for name, position, value in (("shut", widest, 0.0), ("open", last, 1.0)):
    first_order = ((value - beta_value[0, position, 0]) * to_beta[0, position, 0]).item()
    effects[name] = difference_with_beta(position, value) - delta.item()
    print(f"{name} beta at {tokenizer.decode(ids[0, position])!r} (token {position}): first order {first_order:+.2f}, "
          f"measured {effects[name]:+.2f}")  # fmt: skip
shut, opened = abs(effects["shut"]), abs(effects["open"])
alike = abs(shut - opened) < 0.2 * max(shut, opened)
open_or_shut.reveal(
    open_or_shut.options[2 if alike else 0 if shut > opened else 1],
    f"Shut: {effects['shut']:+.2f}; opened: {effects['open']:+.2f}. A gate that is shut is a decision too: what it holds back can "
    "weigh as much as what it lets through.",
)

# %% [markdown]
# ### Exercise 9.2: the gradient of a logit difference
#
# Write `residual_gradient(ids, block, first, second)`: the gradient of `logits[0, -1, first] - logits[0, -1, second]` with respect
# to the residual stream after `block`, shape `[L, D]`, for ids `[1, L]`. One trace does it; mind the order forward
# (embeddings, block, logits) and that weights have no gradients here.


# %% tags=["exercise"]
def residual_gradient(ids, block, first, second):
    """Derivative of the logit difference at the last token, [L, D]."""
    # BEGIN SOLUTION: start the graph at the embeddings, read the block's output and the logits, go backward, save the gradient
    with lens.trace(ids):
        embedded = lens.model.embed_tokens.output
        embedded.requires_grad_()
        residual = lens.layers[block].output
        difference = lens.logits[0, -1, first] - lens.logits[0, -1, second]
        with difference.backward():
            gradient = residual.grad.save()
    return gradient[0]
    # END SOLUTION


# %% tags=["check"]
found = residual_gradient(ids, 2, answer, second)
check(found is not None, "Does the function return the gradient?")
check(
    tuple(found.shape) == (ids.shape[1], model.config.hidden_size),
    f"The shape should be {[ids.shape[1], model.config.hidden_size]}: all positions, without the batch axis.",
)
final = residual_gradient(ids, len(model.model.layers) - 1, answer, second)
check(
    not final[:-1].any(),
    "After the last block only the last position's stream reaches its logits; this gradient has others. Is it that of the "
    "logits at the last position, [0, -1]?",
)
check(
    not torch.allclose(final[-1], residual_gradient(ids, len(model.model.layers) - 1, second, answer)[-1]),
    "Swapping the two tokens should turn the gradient round: are both arguments used?",
)
step = 1e-2 * torch.nn.functional.normalize(found, dim=-1)
with torch.no_grad():
    sums = []
    for sign in (1, -1):
        hook = model.model.layers[2].register_forward_hook(lambda _m, _i, out, s=sign: out + s * step)
        shifted = model(ids).logits[0, -1]
        hook.remove()
        sums.append((shifted[answer] - shifted[second]).item())
check_close(
    (found * step).sum(),
    (sums[0] - sums[1]) / 2,
    "Compared with a small step along the gradient (central difference): is it the gradient of first minus second, after this block?",
    rtol=2e-2,
)
passed("9.2")

# %% [markdown]
# ## Generation
#
# `lens.generate` traces `model.generate`; `tracer.iter[:n]` runs its body once per step. Step 0 reads the prompt, every later step
# one token, with what the model keeps in its cache. Chunks are counted from the first token, so a chunk of experts spans
# many steps. Here expert 5 is written at one single step, in the middle of a chunk.

# %%
PREFIX = "import os\n\n\ndef walk(top):\n    for name in"
STEPS, WRITTEN_AT = 32, 4
OPTIONS = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
start, chunk_size = encode(PREFIX).shape[1], model.config.moe_chunk_size
print(f"the prompt has {start} tokens, a chunk {chunk_size}: step s reads token {start - 1} + s, so a new chunk begins at step "
      f"{-start % chunk_size + 1}")  # fmt: skip

# %% tags=["predict"]
lasting = predict(
    f"Expert 5 is written at step {WRITTEN_AT} alone. Which experts does the model use in the steps after that?",
    [
        "its own again from the next step on",
        "expert 5 until the chunk ends, then its own choice",
        "expert 5 to the end of the text",
    ],
)

# %%
runs = {}
for name, at in (("untouched", None), ("written", WRITTEN_AT)):
    with lens.generate(PREFIX, **OPTIONS) as tracer:
        used = nnsight.save([])
        for step in tracer.iter[:STEPS]:
            if step == at:
                lens.layers[0].moe.experts[:] = 5
            used.append(lens.layers[0].moe.experts[0, -1])
        tokens = tracer.result.save()
    runs[name] = [each.tolist() for each in used]
    print(f"{name:10s}", repr(tokenizer.decode(tokens[0, start:])))
    print(" " * 10, "experts by step:", " ".join("".join(map(str, each)) for each in runs[name]))
forced_steps = [step for step, used in enumerate(runs["written"]) if used == [5, 5]]
chunk_end = -start % chunk_size
lasting.reveal(
    lasting.options[0 if forced_steps == [WRITTEN_AT] else 1 if max(forced_steps) == chunk_end else 2],
    f"Expert 5 alone was used in steps {min(forced_steps)} to {max(forced_steps)}. A chunk decides once, at its first token, and the "
    "cache carries the decision on; what a tap was told at one step is what the cache remembers.",
)

# %% [markdown]
# ## A causal trace
#
# Read and write together make an experiment: take the residual stream of a **clean** run, put it into a **corrupted** run at one
# block and one position, and see how much of the clean answer comes back. Done for all blocks and positions this is the causal
# tracing of [Meng et al. 2022, arXiv 2202.05262](https://arxiv.org/abs/2202.05262); their corrupted run has noise on the subject,
# ours names another city of as many tokens.

# %%
clean, corrupted = encode("Q: country of Mumbai? A:"), encode("Q: country of Osaka? A:")
labels = [tokenizer.decode(i) for i in corrupted[0]]
with torch.no_grad():
    right, wrong = (model(each).logits[0, -1].argmax().item() for each in (clean, corrupted))
print("clean:    ", [tokenizer.decode(i) for i in clean[0]], "->", repr(tokenizer.decode(right)))
print("corrupted:", labels, "->", repr(tokenizer.decode(wrong)))

# %% tags=["predict"]
last_subject = max(t for t in range(clean.shape[1]) if clean[0, t] != corrupted[0, t])
where_first = predict(
    "The stream after block 0 is patched at one position. Which one brings back most of the clean answer?",
    ["the first token of the city's name", "a later token of the name", "the last token of the prompt"],
)

# %%
traced = activation_patching(
    model, clean, corrupted, logit_difference(right, wrong), positions=range(clean.shape[1]), progress=False
)
display(figures.activation_patching(traced, labels))
best = int(traced.recovery()[0].argmax())
first_subject = min(t for t in range(clean.shape[1]) if clean[0, t] != corrupted[0, t])
where_first.reveal(
    where_first.options[0 if best == first_subject else 1 if best <= last_subject else 2],
    f"Most comes back at token {best} ({labels[best]!r} here), {traced.recovery()[0, best]:.0%}; at the last token {traced.recovery()[0, -1]:.0%}. "
    "After the last block only the last token's stream is left to be read, so in between the answer must move there. (The "
    "effects of single positions are not additive: a row need not sum to 100%.)",
)

# %% [markdown]
# ### Exercise 9.3: a causal trace with the lens
#
# Write `causal_trace(clean, corrupted, first, second)`: for every block and position, the logit difference of `first` and `second` at
# the last token of the corrupted run with the clean run's residual stream put in there. Ids are `[1, L]`, the result is a
# tensor `[blocks, L]`. One trace reads; then one trace per block and position writes.


# %% tags=["exercise"]
def causal_trace(clean, corrupted, first, second):
    """Logit difference of the corrupted run, patched at each block and position, [blocks, L]."""
    # BEGIN SOLUTION: save every block's output in the clean run; patch one position of one block per trace of the corrupted one
    num_blocks, length = len(model.model.layers), clean.shape[1]
    with lens.trace(clean):
        kept = nnsight.save([lens.layers[i].output for i in range(num_blocks)])
    result = torch.empty(num_blocks, length)
    for block in range(num_blocks):
        for position in range(length):
            with lens.trace(corrupted):
                lens.layers[block].output[:, position] = kept[block][:, position]
                last = lens.logits[0, -1].save()
            result[block, position] = last[first] - last[second]
    return result
    # END SOLUTION


# %% tags=["check"]
found = causal_trace(clean, corrupted, right, wrong)
check(found is not None, "Does the function return the differences?")
check(
    tuple(found.shape) == (len(model.model.layers), clean.shape[1]),
    f"The shape should be {[len(model.model.layers), clean.shape[1]]}: blocks, then positions.",
)
expected = torch.from_numpy(traced.value[..., 0]).float()
check(
    not torch.allclose(found, torch.full_like(found, float(traced.corrupted[0])), atol=1e-3),
    "Nothing was patched: write into lens.layers[block].output inside the trace, before asking for the logits.",
)
check(
    not torch.allclose(found[-1, :-1], torch.full_like(found[-1, :-1], float(traced.clean[0])), atol=1e-3),
    "This is the clean run's difference at every position: patch one position, not the whole row, and run the corrupted ids.",
)
check(not torch.allclose(found, -expected, atol=1e-3), "The sign is turned round: first minus second.")
check_close(
    found,
    expected,
    "Patch clean values into the corrupted run (not the other way round).",
    rtol=1e-3,
    atol=1e-3,
)
passed("9.3")

# %% [markdown]
# ## From one prompt to many
#
# A trace is for an experiment. For statistics over many texts, `capture_files` runs the same hooks over files of any size and
# writes the decisions to a Zarr directory, which xarray reads lazily, by named axes (`hydra-lab capture` is the same on the command
# line). The attributes say which weights, tokenizer and backend made it.

# %%
SHOWN = ("code", "prose", "facts")
samples = {
    domain: read_sample_texts(model_directory("demo"))[domain][: 2 if quick() else 6] for domain in SHOWN
}
directory = tempfile.TemporaryDirectory()
for domain, texts in samples.items():
    folder = Path(directory.name) / "texts" / domain
    folder.mkdir(parents=True)
    for number, sample in enumerate(texts):
        (folder / f"{number}.txt").write_text(sample)
capture = capture_files(
    model, tokenizer, [Path(directory.name) / "texts"], Path(directory.name) / "run.zarr",
    sequence_length=384, signals=["routing", "memory"], progress=False,
)  # fmt: skip
print(f"{capture.num_samples} samples, {capture.num_tokens:,} tokens; backend {capture.attributes['backend']}, "
      f"weights {capture.attributes['weights_sha256'][:12]}")  # fmt: skip
memory = capture.plain("memory").load()
memory = memory[sorted(memory)]
print(memory)

# %% [markdown]
# Rows differ in length. What lies behind a sample's end is *marked*: floats are NaN, which xarray leaves out of a mean, and
# integers are the largest of their type (or -1), which looks like any other number to a program that counts. Floats of
# decisions are kept in half precision.

# %%
lengths = capture.plain("tokens")["length"].values.astype(int)
gate = memory["gate"].isel(layer=0).astype("float32").assign_coords(domain=("sample", list(capture.domains)))
print("mean beta by domain:", {name: round(float(part.mean()), 3) for name, part in gate.groupby("domain")})
experts = capture.plain("routing")["experts"].isel(layer=0).values
chunk_is_real = np.arange(experts.shape[1]) < -(-lengths[:, None] // model.config.moe_chunk_size)
print(f"largest 'expert': {experts.max()}; among real chunks: {experts[chunk_is_real].max()}")
first = encode(samples[capture.domains[0]][0])[:, : int(lengths[0])]
exact = hydra_lab.record(model, first)["layers.3.memory.lookup"].gate[0, :, 0]
rounding = (torch.from_numpy(gate.values[0, : len(exact)]) - exact).abs().max()
print(f"beta in the capture and in `record`: largest difference {rounding:.1e}")
use = read_path_use(model_directory("demo"))
display(figures.beta_by_domain(metrics.beta_by_domain(metrics.lookup_record(capture, layer=3)), path_use=use))
directory.cleanup()

# %% [markdown]
# ## Where this breaks
#
# - **A tap is honest only if the model is causal.** In the paper's prototype the router pools the mean of the whole chunk, and a tap
#   there would read a decision that has seen the future. Its memory benchmark sets the gate by the length of the prompt: the
#   $\beta$ that it reports was decided by no model. Before reading a number, ask who made it and from what.
# - **Reading is not causing, and a gradient is local.** The first-order figures above and the measured ones differ by the
#   curvature in between; for a gate that moves from 0 to 1 that is no small step. Which experts are chosen has no gradient at all.
# - **The logit lens reads early blocks with the last block's norm and unembedding**, which they were not trained for; what it
#   shows there is what the stream *says in that language*, not what the model knows. (Tuned lenses learn a translation:
#   [Belrose et al. 2023, arXiv 2303.08112](https://arxiv.org/abs/2303.08112).)
# - **A patched stream is one position's.** What a state-space path or an attention read from the old stream in the blocks before is
#   still in their states and in the other positions. So a row of the causal trace that falls does not say where the answer *is*, only
#   where one position suffices to bring it.
# - **Only taps can be read.** The rest happens inside operations, some of them fused kernels. Full states and the attention's mass cost
#   memory and are carried on request only (`hydra_lab.taps.REQUESTED_TAPS`).
# - **Padding.** Decisions are in a row's own coordinates, `lens.logits` has the columns of the padded batch: count those from the right.
#   And traces share one model: a cell that begins with `%%time`, or a second thread without the model's lock, breaks them.

# %% [markdown]
# ## Next
#
# - Lesson 10 turns reading and writing into measurements: ablation, forcing, patching, and when each of them misleads.
# - Lesson 11 asks what a capture is good for: whether an expert specializes, against its nulls.
# - `hydra-lab capture --help` for captures of any size; `hydra_lab.lens.HydraLens` lists all names in its docstring.

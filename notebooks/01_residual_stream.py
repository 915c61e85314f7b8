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
# # 1. The residual stream and its gated paths
#
# **Goal:** take a model's output apart into what each path wrote, and tell a large write from a useful one · **Minutes:** 35 · **Difficulty:** easy
#
# You need PyTorch, and what a transformer block is.
#
# A block of Hydra ([arXiv 2508.15099](https://arxiv.org/abs/2508.15099)) does one thing to its input $x$, a vector of
# size $D$ for every token: it adds to it.
#
# $$y = x + \sum_p g_p \, f_p\big(\mathrm{RMSNorm}(x)\big)$$
#
# $f_p$ is a path (`ssm`, `attention`, `moe`, `workspace` or `memory`), $g_p$ a learned number, as in LayerScale
# ([arXiv 2103.17239](https://arxiv.org/abs/2103.17239)). Nothing is ever overwritten. So what reaches the last layer is
# a plain sum, one term per path and block. Sums can be taken apart, and this lesson does it: who wrote how much, who
# wrote the answer, and why neither number alone says what a path is worth.

# %%
import shutil
import tempfile
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from IPython.display import display
from plotly.subplots import make_subplots

import hydra_lab
from hydra_lab import figures, metrics
from hydra_lab.attribution import direct_logit_attribution, logit_lens
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.course import check, check_close, passed, predict, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.figures.theme import finish
from hydra_lab.interventions import intervened
from hydra_lab.loading import model_directory
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.block import HydraBlock
from hydra_lab.nn.layers import RMSNorm
from hydra_lab.path_use import read_path_use
from hydra_lab.presets import PRESETS
from hydra_lab.taps import PATHS
from hydra_lab.training_log import LOG_FILE, read_training_log
from hydra_lab.widgets import BlockDiagram

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
blocks = model.model.blocks
samples = read_sample_texts(model_directory("demo"))
COLOUR = dict(zip(PATHS, figures.colours(len(PATHS)), strict=True))
SYMBOL = dict(zip(PATHS, ("circle", "square", "diamond", "cross", "x"), strict=True))


def encode(text: str) -> torch.Tensor:
    """Token ids, [1, L]."""
    return tokenizer(text, return_tensors="pt")["input_ids"]


# %% [markdown]
# ## One block
#
# This is the formula as the library runs it. The paths stand side by side: all of them read the same normalised `hidden`,
# and none sees what another one writes in this block. (A transformer puts attention and feed-forward one after the
# other; the side-by-side form is that of PaLM, [arXiv 2204.02311](https://arxiv.org/abs/2204.02311), section 2.) A path
# can answer another one only from a later block.

# %%
show_source(HydraBlock._add_paths)

# %% [markdown]
# `contributions[path]` is an identity: a place to read what a path adds, to scale it or to cut it. The norm is RMSNorm
# ([arXiv 1910.07467](https://arxiv.org/abs/1910.07467)): $\mathrm{RMSNorm}(x) = \gamma \odot x / \mathrm{rms}(x)$ with
# $\mathrm{rms}(x)^2 = \frac1D \sum_d x_d^2 + \epsilon$. It subtracts no mean and adds no bias.

# %%
show_source(RMSNorm)

# %%
code_ids = encode(samples["code"][0])[:, :256]
with torch.no_grad():
    streams = model(code_ids, output_hidden_states=True).hidden_states
print(f"{len(streams)} streams of shape {list(streams[0].shape)}: before block 0, then after each block")


def run_path(block, path, hidden):
    """f_p of the normalised `hidden` [1, L, D]: the path's output before its gate, [1, L, D]."""
    module, span = getattr(block, path), Span(hidden.shape[1])
    if path == "memory":  # the only path that looks at one token at a time and keeps no state
        return module(hidden)
    if path == "attention":
        return module(hidden, span, None, False)[0]  # no earlier tokens, and nothing is kept for later ones
    return module(hidden, span, None)[0]


# %% [markdown]
# ### Exercise 1.1: a block from its paths
#
# Write `block_output(block, x)`: the stream after the block, `[1, L, D]`, from the stream `x` before it, `[1, L, D]`.
# You have `block.norm`, the names `block.paths`, the gates `block.gates[path]`, and `run_path` from above.


# %% tags=["exercise"]
def block_output(block, x):
    """The stream after the block, [1, L, D]."""
    # BEGIN SOLUTION: normalise once, run every path on that, add each output times its gate to the stream
    hidden = block.norm(x)
    y = x
    for path in block.paths:
        y = y + block.gates[path] * run_path(block, path, hidden)
    return y
    # END SOLUTION


# %% tags=["check"]
with torch.no_grad():
    for block in blocks:
        before, after = streams[block.index], streams[block.index + 1]
        rebuilt = block_output(block, before)
        check(rebuilt is not None, "Does the function return the stream?")
        check(rebuilt.shape == before.shape, f"The stream keeps its shape, {list(before.shape)}.")
        hidden = block.norm(before)
        outputs = {path: run_path(block, path, hidden) for path in block.paths}
        only_update = sum(block.gates[path] * output for path, output in outputs.items())
        in_turn = before
        for path in block.paths:
            in_turn = in_turn + block.gates[path] * run_path(block, path, block.norm(in_turn))
        for wrong, hint in (
            (only_update, "This is the update alone: the block adds it to x."),
            (
                hidden + only_update,
                "Add the paths to x itself, not to the normalised x: that is for the paths.",
            ),
            (before + sum(outputs.values()), "The gates are missing: each output is multiplied by its g."),
            (
                in_turn,
                "Your second path reads what the first one wrote. All paths read the same normalised x.",
            ),
        ):
            check(not torch.allclose(rebuilt, wrong, rtol=1e-4, atol=1e-3), hint)
        unlike = f"Block {block.index} gives another stream. Does every path read block.norm(x)?"
        check_close(rebuilt, after, unlike, rtol=1e-4, atol=1e-3)
passed("1.1")

# %% [markdown]
# ## The stream is a sum
#
# Put the blocks one after the other, with $e$ the embedding and $w_{i,p} = g_{i,p} \, f_{i,p}(\mathrm{RMSNorm}(r_i))$
# what path $p$ writes in block $i$:
#
# $$r_n = e + \sum_{i<n} \sum_p w_{i,p}$$
#
# There is no approximation in it. The writes are not independent, since each depends on the stream it reads, but
# once the model has run they are just vectors, and they add up.


# %%
def read_writes(ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """What each path of each block adds to the stream, [B, L, D], by (block, path)."""
    writes: dict[tuple[int, str], torch.Tensor] = {}

    def keep(name):
        return lambda _module, _inputs, update: writes.__setitem__(name, update.detach().clone())

    handles = [
        block.contributions[path].register_forward_hook(keep((block.index, path)))
        for block in blocks
        for path in block.paths
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return writes


writes = read_writes(code_ids)
total = streams[0] + sum(writes.values())
print(f"{len(writes)} writes; embedding + writes differ from the final stream by at most ", end="")
print(f"{(total - streams[-1]).abs().max():.1e}, its largest entry is {streams[-1].abs().max():.0f}")

# %% tags=["predict"]
growth = predict(
    "The norms keep what a path reads at one size. How large is the final stream compared with the embedding (mean norm of a token)?",
    ["about the same, within a factor of 2", "2 to 10 times", "10 to 30 times", "more than 30 times"],
)


# %%
def mean_norm(vectors: torch.Tensor) -> float:
    """Mean Euclidean norm over the tokens of [B, L, D]."""
    return vectors.norm(dim=-1).mean().item()


figure = go.Figure()
for path in PATHS:
    here = [block.index for block in blocks if path in block.paths]
    figure.add_scatter(
        x=[f"block {index}" for index in here],
        y=[mean_norm(writes[index, path]) for index in here],
        name=f"{path} writes",
        mode="markers",
        marker={"color": COLOUR[path], "symbol": SYMBOL[path] + "-open", "size": 11, "line": {"width": 2.5}},
    )
depths = ["embedding", *(f"block {block.index}" for block in blocks)]
figure.add_scatter(
    x=depths,
    y=[mean_norm(stream) for stream in streams],
    name="the stream after it",
    mode="lines+markers",
    line={"color": "black", "dash": "dot"},
)
figure.update_xaxes(categoryorder="array", categoryarray=depths)
figure.update_yaxes(title_text="mean Euclidean norm", type="log", dtick=1)
finish(
    figure,
    title="Block 0 drowns the embedding, and the last block writes loudest",
    subtitle=f"means over {code_ids.shape[1]} tokens of one text of code",
    theme="light",
    height=300,
)
display(figure)
times = mean_norm(streams[-1]) / mean_norm(streams[0])
growth.reveal(
    growth.options[int(np.searchsorted([2, 10, 30], times))],
    f"It is {times:.0f} times as large, and block 0 alone makes it {mean_norm(streams[1]) / mean_norm(streams[0]):.0f} times as large.",
)

# %% [markdown]
# Two things follow.
#
# - The norm divides by the size of the stream. A write of the same length turns the stream less, the later it comes, so
#   later blocks write more loudly to be heard. Compare writes within a block, or by what they do, not by their length across
#   blocks.
# - What was written early is still there, but small. Here the embedding has all but vanished among the writes of block 0:

# %%
left = torch.cosine_similarity(streams[0], streams[-1], dim=-1).mean()
print(f"cosine of the embedding and the final stream: {left:.3f}")

# %% [markdown]
# ## How much of the update does a path make?
#
# For one token and one block let $w_p$ be the writes of its paths and $u = \sum_p w_p$ the update. The lab's *path use*
# begins with two numbers per path:
#
# $$\mathrm{share}_p = \frac{\lVert w_p \rVert}{\sum_q \lVert w_q \rVert}, \qquad
# \cos_p = \frac{w_p \cdot u}{\lVert w_p \rVert \, \lVert u \rVert}$$
#
# The share says how loud a path is beside its neighbours. The cosine says whether the update goes its way: two loud
# paths that cancel each other have large shares and an update near zero.
#
# ### Exercise 1.2: share and cosine
#
# Write `share_and_cosine(writes)` for `writes` of shape `[P, L, D]` (P paths of one block): a pair of tensors, both
# `[P, L]`, one number per path and token.


# %% tags=["exercise"]
def share_and_cosine(writes):
    """Each path's share of the block's update and its cosine to it, [P, L] each."""
    # BEGIN SOLUTION: norms over the last axis; the shares of a token sum to one over the paths
    norms = writes.norm(dim=-1)
    update = writes.sum(dim=0)
    cosine = (writes * update).sum(dim=-1) / (norms * update.norm(dim=-1))
    return norms / norms.sum(dim=0), cosine
    # END SOLUTION


# %% tags=["check"]
recording = hydra_lab.record(model, code_ids, taps=[], contributions=True)
for block in blocks:
    own = torch.stack([writes[block.index, path][0] for path in block.paths])
    answer = share_and_cosine(own)
    check(isinstance(answer, tuple) and len(answer) == 2, "Return two tensors: shares, cosines.")
    share, cosine = answer
    check(share.shape == own.shape[:2], f"The shares should be [P, L], here {list(own.shape[:2])}.")
    norm_of_update = own.norm(dim=-1) / own.sum(dim=0).norm(dim=-1)
    check(
        not torch.allclose(share, norm_of_update),
        "You divided by the norm of the update. Divide by the sum of the norms, so that a token's shares sum to 1.",
    )
    check_close(
        share.sum(dim=0), torch.ones(own.shape[1]), "A token's shares sum to 1 over the paths.", rtol=1e-4
    )
    measured = [recording.contributions[f"layers.{block.index}.{path}"] for path in block.paths]
    check_close(
        share, torch.stack([each.share[0] for each in measured]), "Norms over D, for every token on its own."
    )
    check_close(
        cosine,
        torch.stack([each.cosine[0] for each in measured]),
        "The cosine is between a path's write and the sum of all writes of the block.",
        rtol=1e-3,
        atol=1e-5,
    )
passed("1.2")

# %% [markdown]
# The third number is what the model loses without the path. Here are all three for the demo, as measured over 16
# held-out samples of each of its domains and shipped with it (`hydra-lab info demo` prints them). In recall, chains and facts
# only the answers count.

# %%
use = read_path_use(model_directory("demo"))
display(figures.path_use(use))
gates = {(block.index, path): gate.item() for block in blocks for path, gate in block.gates.items()}
BlockDiagram.of_path_use(use, gates=gates)

# %% [markdown]
# ## Loud is not useful
#
# Attention lives in blocks 2 and 5, and it is about as loud in the one as in the other.

# %%
for block in (2, 5):
    print(f"attention makes {100 * use.share_of('attention', block):.0f}% of block {block}'s update")

# %% tags=["predict"]
same_share = predict(
    "On code and manuals, attention is cut in block 2 alone, then in block 5 alone. What costs more (nats per token)?",
    [
        "block 2, at least twice as much",
        "they differ by less than a factor of 2",
        "block 5, at least twice as much",
    ],
)


# %%
TEXTS = {
    domain: torch.cat([encode(text)[:, :256] for text in samples[domain][2:4]])
    for domain in ("code", "technical")
}


def mean_loss() -> float:
    """Loss of the texts above, nats per token, with whatever is changed in the model at the moment."""
    with torch.no_grad():
        return float(np.mean([model(ids, labels=ids).language_loss.item() for ids in TEXTS.values()]))


whole_loss = mean_loss()
cost = {}
for block in (2, 5):
    with intervened(model, f"attention[{block}].cut()"):
        cost[block] = mean_loss() - whole_loss
ratio = cost[5] / cost[2]
same_share.reveal(
    same_share.options[0 if ratio < 0.5 else 2 if ratio > 2 else 1],
    f"Without it in block 2: {cost[2]:+.2f}, in block 5: {cost[5]:+.2f} nats per token (4 texts of 256 tokens).",
)

# %% [markdown]
# One reason can be read off the writes. A path that adds the same vector $m$ at every token adds a bias. It is loud
# and tells the tokens nothing apart. Split the energy of a path's writes over the tokens of several texts into that of
# their mean and the rest:
#
# $$\langle \lVert w_t \rVert^2 \rangle = \lVert m \rVert^2 + \langle \lVert w_t - m \rVert^2 \rangle,
# \qquad m = \langle w_t \rangle$$
#
# The first part needs no path: a constant would do. So we also replace the write by $m$, taken from *other* texts than
# those that are scored (mean ablation, [arXiv 2211.00593](https://arxiv.org/abs/2211.00593)).

# %%
other_texts = torch.cat([encode(text)[:, :256] for domain in TEXTS for text in samples[domain][:2]])
other_writes = read_writes(other_texts)
mean_write = {name: write.mean(dim=(0, 1)) for name, write in other_writes.items()}
print("block  path       share  constant part  cost of cutting  cost of the mean instead")
loudness = {name: write.norm(dim=-1) for name, write in other_writes.items()}
for (block, path), write in other_writes.items():
    if path == "ssm":
        continue
    share = (
        (loudness[block, path] / sum(loudness[block, other] for other in blocks[block].paths)).mean().item()
    )
    energy = write.square().sum(dim=-1).mean()
    constant = (mean_write[block, path].square().sum() / energy).item()
    with intervened(model, f"{path}[{block}].cut()"):
        cut = mean_loss() - whole_loss
    contribution = blocks[block].contributions[path]
    handle = contribution.register_forward_hook(
        lambda _module, _inputs, update, mean=mean_write[block, path]: mean.expand_as(update)
    )
    replaced = mean_loss() - whole_loss
    handle.remove()
    print(f"{block:5d}  {path:9s} {share:6.0%} {constant:14.0%} {cut:+16.3f} {replaced:+25.3f}")

# %% [markdown]
# Read it in rows. Most of what attention writes in block 2 is one vector, and that vector alone does nearly all the good.
# In block 5 little is constant and the mean is no help. The converse does not hold: the experts of block 2 vary from
# token to token and these texts lose nothing without them. Share, variation and cost are three questions; only the cost
# is about the model's output.
#
# ## The logit lens
#
# The output is read from the stream by the final norm and the head $W$ (tied to the embedding): $\mathrm{logits}(r) =
# W \, \mathrm{RMSNorm}(r)$. Every block adds to the same stream, so we may ask that reader about any depth: what would the
# model say if it stopped here? (nostalgebraist 2020, "interpreting GPT: the logit lens".) Here are the last tokens of a text
# with pairs to recall; the answer that the last token asks for is D. Then its last token again, beside that of a fact.

# %%
RECALL = "recall: Fenmar = Q; Kelgor = D; Zorlin = Z; Belquin = R; ? Zorlin = Z; ? Kelgor ="
FACT = "Q: country of Osaka? A:"
recall_ids, fact_ids = encode(RECALL), encode(FACT)
D, Q, JAPAN, RUSSIA = (encode(text).item() for text in (" D", " Q", " Japan", " Russia"))
lens = logit_lens(model, recall_ids)
length = recall_ids.shape[1]
display(figures.logit_lens(lens, tokenizer.decode, positions=range(length - 12, length)))

# %%
for name, ids in (("recall", recall_ids), ("fact", fact_ids)):
    seen = logit_lens(model, ids)
    guesses = zip(seen.depths, seen.tokens[:, 0, -1, 0], seen.probability[:, 0, -1, 0], strict=True)
    print(
        f"{name:7s}" + ", ".join(f"{depth}: {tokenizer.decode(int(t))!r} {p:.2f}" for depth, t, p in guesses)
    )

# %% [markdown]
# The embedding names the token itself, since reading and writing use the same table. The answer to the recall stands in
# the stream long before the last block; the fact is settled late. The lens asks early depths in a language that only the
# last one was trained to speak: that a depth names no answer does not show that it holds none
# ([arXiv 2303.08112](https://arxiv.org/abs/2303.08112) trains a translator per depth).
#
# ## Who wrote the answer? Direct logit attribution
#
# The head is linear and the stream is a sum. Only the norm stands between, and it is linear but for one number, the
# size of the whole stream $\rho = \mathrm{rms}(r_n)$. Take $\rho$ *as this run made it*, a constant, and the logit of
# token $v$ falls apart exactly:
#
# $$\ell_v = W_v \cdot \Big(\gamma \odot \frac{r_n}{\rho}\Big)
# = \frac{(W_v \odot \gamma) \cdot e}{\rho} + \sum_{i,p} \frac{(W_v \odot \gamma) \cdot w_{i,p}}{\rho}$$
#
# (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; there the norm is folded away.) A softmax does
# not change when all logits rise together, so attribute a *difference*, right answer minus a wrong one: $W_v - W_u$ in place of
# $W_v$.
#
# ### Exercise 1.3: the direct effect of one write
#
# Write `direct_effect(write, stream, token, contrast)`: how much `write` `[D]` adds to the logit of `token` minus that
# of `contrast`, one number, where `stream` `[D]` is the final stream (before the final norm) at that position. You need
# `model.lm_head.weight` `[V, D]`, `model.model.norm.weight` `[D]` and `model.model.norm.eps`.


# %% tags=["exercise"]
def direct_effect(write, stream, token, contrast):
    """What `write` adds to the logit of `token` minus that of `contrast`; the norm's scale is that of `stream`."""
    # BEGIN SOLUTION: the direction of the difference times gamma, dot the write, over the rms of the whole stream
    norm, head = model.model.norm, model.lm_head.weight
    direction = (head[token] - head[contrast]) * norm.weight
    scale = (stream.square().mean() + norm.eps).sqrt()
    return (direction @ write / scale).item()
    # END SOLUTION


# %% tags=["check"]
with torch.no_grad():
    run = model(recall_ids, output_hidden_states=True)
    stream = run.hidden_states[-1][0, -1]
    direction = model.lm_head.weight[D] - model.lm_head.weight[Q]
    gamma, eps = model.model.norm.weight, model.model.norm.eps
    for (block, path), write in read_writes(recall_ids).items():
        write = write[0, -1]
        own_scale = (write.square().mean() + eps).sqrt()
        scale = (stream.square().mean() + eps).sqrt()
        effect = direct_effect(write, stream, D, Q)
        check(effect is not None, "Does the function return the number?")
        expected = (direction * gamma) @ write / scale
        if expected.abs() < 0.05:  # too small to tell one mistake from another
            continue
        for wrong, hint in (
            (
                (direction * gamma) @ write / own_scale,
                "You divide by the rms of the write. Hold the scale of the stream.",
            ),
            (direction @ write / scale, "The final norm's weight (gamma) is missing."),
            ((direction * gamma) @ write, "The division by the rms of the stream is missing."),
            (
                (direction * gamma) @ write / stream.norm(),
                "You divide by the norm of the stream: take the root of the mean.",
            ),
            (-expected, "The sign is turned round: token minus contrast."),
        ):
            check(not np.isclose(float(effect), wrong.item(), rtol=1e-3), hint)
        unlike = f"Block {block}, {path}: another number. Take the whole formula: (W_v - W_u) * gamma, dot the write, over rms."
        check_close(effect, expected, unlike, rtol=1e-3, atol=1e-4)
passed("1.3")

# %% [markdown]
# The library does it for every part, and the parts sum to the model's own logit difference:

# %%
recalled = direct_logit_attribution(model, recall_ids, D, contrast=Q)
print(
    f"sum of the parts {recalled.effect[:, 0, -1].sum():.4f}, the model's difference {recalled.logit[0, -1]:.4f}"
)
display(figures.direct_logit_attribution(recalled, tokenizer.decode, position=length - 1))

# %% [markdown]
# So the answer seems to be written by the `ssm` of block 2 and the attention of block 5. Does that mean that the other
# parts are idle here? The first block's `ssm` has next to no direct effect. Cut it and see.

# %% tags=["predict"]
first_block = predict(
    f"The ssm path of block 0 adds {recalled.effect[recalled.parts.index('layers.0.ssm'), 0, -1]:+.2f} to the difference of "
    f"{recalled.logit[0, -1]:.1f}. How far does the difference fall when that path is cut?",
    ["by less than 1", "by 1 to 5", "by more than 5"],
)


# %%
def total_effects(ids: torch.Tensor, token: int, contrast: int) -> dict[str, float]:
    """How far the last logit difference falls when a part is cut, the others computed anew: by part."""

    def difference() -> float:
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        return (logits[token] - logits[contrast]).item()

    whole = difference()
    falls = {}
    for block in blocks:
        for path in block.paths:
            with intervened(model, f"{path}[{block.index}].cut()"):
                falls[f"layers.{block.index}.{path}"] = whole - difference()
    return falls


falls = total_effects(recall_ids, D, Q)
fall = falls["layers.0.ssm"]
first_block.reveal(
    first_block.options[0 if fall < 1 else 1 if fall <= 5 else 2],
    f"It falls by {fall:.1f}: later blocks need what this one writes, although the head does not.",
)

# %%
fact = direct_logit_attribution(model, fact_ids, JAPAN, contrast=RUSSIA)
questions = {
    "recall: ' D' minus ' Q'": (recalled, falls),
    "fact: ' Japan' minus ' Russia'": (fact, total_effects(fact_ids, JAPAN, RUSSIA)),
}
figure = make_subplots(rows=1, cols=2, subplot_titles=list(questions))
for column, (direct, total) in enumerate(questions.values(), start=1):
    effects = dict(zip(direct.parts, direct.effect[:, 0, -1].tolist(), strict=True))
    for path in PATHS:
        parts = [part for part in total if part.endswith(path)]
        figure.add_scatter(
            x=[effects[part] for part in parts],
            y=[total[part] for part in parts],
            mode="markers+text",
            marker={"color": COLOUR[path], "symbol": SYMBOL[path], "size": 10},
            text=[part[7:] if effects[part] > 4 or total[part] - effects[part] > 2 else "" for part in parts],
            textposition="bottom center",
            hovertext=parts,
            name=path,
            showlegend=column == 1,
            row=1,
            col=column,
        )
    ends = [min(effects.values()), max(*effects.values(), *total.values())]
    line = {"color": "grey", "dash": "dot"}
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        line=line,
        name="direct = total",
        showlegend=column == 1,
        row=1,
        col=column,
    )
figure.update_xaxes(title_text="direct effect (logits)", range=[-2.5, 13])
figure.update_yaxes(title_text="fall when the part is cut (logits)", range=[-2, 16])
finish(
    figure,
    title="A part far above the dotted line works through later blocks",
    subtitle=f"one position of one prompt each; {len(falls)} parts, cut one at a time",
    theme="light",
    height=380,
)
display(figure)
memory_effect = fact.effect[fact.parts.index("layers.3.memory"), 0, -1]
memory_fall = questions["fact: ' Japan' minus ' Russia'"][1]["layers.3.memory"]
print(f"memory of block 3 on the fact: direct {memory_effect:+.2f}, cut {memory_fall:+.2f}")
beta = hydra_lab.record(model, fact_ids)["layers.3.memory.lookup"].gate[0, :, 0].tolist()
print(
    "its gate:", ", ".join(f"{tokenizer.decode(i)!r} {b:.2f}" for i, b in zip(fact_ids[0], beta, strict=True))
)

# %% [markdown]
# The memory is worth a look. Its gate is open at the subject's name and nearly shut at the last token, where the answer is
# read. There it writes next to nothing, so direct attribution gives it nothing. What it wrote at the name had to be carried
# to the last token by later blocks.
#
# The cut is not the truth either: it also takes away the scale (a smaller stream makes every other write count for
# more) and puts later blocks before a stream that they never met. Lesson 10 goes into what to put in place of a part.
#
# ## No path may die unseen
#
# A gate is a number that is trained like all others. For the loss $L$ with $\delta = \partial L / \partial y$,
#
# $$\frac{\partial L}{\partial g_p} = \delta \cdot f_p, \qquad
# \frac{\partial L}{\partial \theta_p} = g_p \; \delta \cdot \frac{\partial f_p}{\partial \theta_p}$$
#
# The gate multiplies all that the path could learn. At $g_p = 0$ the path's weights get no gradient at all, and at $f_p = 0$
# the gate gets none. Three ways to start the experts of an untrained model, and what reaches them:

# %%
torch.manual_seed(0)
small = HydraForCausalLM(HydraConfig(**PRESETS["nano"]))
small_ids = torch.randint(0, small.config.vocab_size, (8, 64))
moe, gate = small.model.blocks[0].moe, small.model.blocks[0].gates["moe"]
starts = {
    "gate 1, output at zero (the library's)": (1.0, 0.0),
    "gate 0, random output": (0.0, moe.gate_up_proj.shape[1] ** -0.5),
    "gate 0, output at zero": (0.0, 0.0),
}
print("norm of the gradient of                  gate    down_proj  gate_up_proj  router")
for name, (value, spread) in starts.items():
    with torch.no_grad():
        gate.fill_(value)
        moe.down_proj.normal_(std=spread) if spread else moe.down_proj.zero_()
    small.zero_grad()
    small(small_ids, labels=small_ids).language_loss.backward()
    gradients = [
        parameter.grad.norm().item()
        for parameter in (gate, moe.down_proj, moe.gate_up_proj, moe.router.weight)
    ]
    print(f"{name:38s}" + "".join(f"{value:10.1e}" for value in gradients))

# %% [markdown]
# With both at zero nothing ever moves: a path that is dead from the start and for good. With one at zero, the other one
# moves first. The choice is which. Suppose the gate is open and the experts are random, as at the start of the authors'
# prototype, whose gates begin at 0.15 to 1. What the loss says to such a gate can be measured in the demo: scramble the
# entries of the trained experts' weights in block 0, so that their sizes stay and all they learned is gone, and turn the gate.

# %%
moe, trained_gate = blocks[0].moe, blocks[0].gates["moe"].item()
trained_experts = {name: value.clone() for name, value in moe.state_dict().items()}
turned = [-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
gate_ids = torch.cat([encode(samples[domain][0])[:, :256] for domain in ("code", "prose")])


def loss_by_gate() -> np.ndarray:
    """Loss with the gate of block 0's experts at each value of `turned`, less the loss with it at 0; nats per token."""
    losses = []
    for value in turned:
        with intervened(model, f"moe[0].scale(factor={value / trained_gate!r})"), torch.no_grad():
            losses.append(model(gate_ids, labels=gate_ids).language_loss.item())
    return np.array(losses) - losses[turned.index(0.0)]


curves = {"trained": loss_by_gate()}
for seed in range(3):
    generator = torch.Generator().manual_seed(seed)
    for weights in (moe.gate_up_proj, moe.down_proj):
        order = torch.randperm(weights.numel(), generator=generator)
        with torch.no_grad():
            weights.copy_(weights.flatten()[order].view_as(weights))
    curves[f"scrambled, seed {seed}"] = loss_by_gate()
    moe.load_state_dict(trained_experts)

figure = make_subplots(
    rows=1, cols=2, subplot_titles=["trained experts", "scrambled experts"], horizontal_spacing=0.12
)
for index, (name, losses) in enumerate(curves.items()):
    line = {"color": figures.colours(len(curves))[index], "dash": ("solid", "dash", "dot", "dashdot")[index]}
    figure.add_scatter(
        x=turned, y=losses, name=name, mode="lines+markers", line=line, row=1, col=1 + (index > 0)
    )
figure.update_xaxes(title_text="gate of the experts of block 0")
figure.update_yaxes(title_text="loss, less that at gate 0 (nats/token)", col=1)
finish(
    figure,
    title="While the experts know nothing, the best gate is nearly shut",
    subtitle=f"{gate_ids.numel()} tokens of code and prose; 3 scramblings; the panels have different scales",
    theme="light",
    height=300,
)
display(figure)
for name, losses in curves.items():
    print(f"{name:18s} best of these gates: {turned[int(losses.argmin())]:+.1f}")

# %% [markdown]
# Random experts push the stream in a direction that has nothing to do with the loss. Their slope at gate 0 is small and of
# either sign; what is sure is the curvature, upward, since the rest of the model did not ask for noise. A gate that learns
# as fast as the weights rolls down that bowl before the experts have learned anything, and from then on little reaches them.
# So the library starts open gates on silent outputs, and gives gates a tenth of the learning rate: the path joins without
# noise, and nothing pulls its gate down at the start. This is how they went in the demo's first training run. Slow is not
# safe: one gate still fell far.

# %%
with tempfile.TemporaryDirectory() as folder:
    shutil.copy(model_directory("demo") / "training_log.demo.jsonl", Path(folder) / LOG_FILE)
    training_log = read_training_log(folder)
display(figures.path_gates(training_log))
for (block, path), values in training_log.gates.items():
    if values[-1] < 0.5:
        print(f"{path} of block {block}: gate {values[0]:.2f} at first, {values[-1]:.2f} at the end")

# %% [markdown]
# Now the part that misleads. A dead path goes on deciding. We shut the experts of block 0 and look at their routing.

# %%
whole = capture_batch(model, code_ids)
with intervened(model, "moe[0].cut()"):
    silent = capture_batch(model, code_ids)
routes = [metrics.routing_map(metrics.routing_record(each)) for each in (whole, silent)]
same = np.array_equal(*(each["routing"]["experts"].isel(layer=0).values for each in (whole, silent)))
print("block 0 routes every chunk as before:", same)
display(figures.routing_map(routes[1], path_use=metrics.captured_path_use(silent)))
BlockDiagram.of_capture(silent)

# %% [markdown]
# The picture is as handsome as before. Only the word "idle" beside block 0 and the dashed line in the diagram tell that
# nobody listens.
#
# ## Where this breaks
#
# - **Direct attribution sees one step.** It misses all that works through later blocks, and the change of the norm's scale,
#   which it holds. Above, the part with the largest total effect had hardly any direct one.
# - **Share is not use.** The same share cost several times as much in one block as in the other, and much of what the
#   cheaper one writes is a constant.
# - **One cut at a time can miss redundancy.** Two paths that can stand in for each other would both look useless. Lesson 14
#   plants such a case.
# - **A cost is a cost on some text.** The experts' cost on recall is nil and on facts a whole nat per token (the heat map above):
#   "the experts matter" is not a sentence without a domain.
# - **Paths do die.** In a throw-away prototype of this project, with gates that started at 0.15 to 0.5 and learned as fast as the
#   weights, three of four expert gates stood at 0.00 to 0.01 after 7 million tokens. Those experts made 0.2 to 0.3% of their
#   blocks' updates, and their routing still looked specialized.

# %% [markdown]
# ## Next
#
# - Lesson 2 opens the loudest path, the state-space one. Lesson 10 cuts, forces and patches with more care; 13 trains a
#   small model and watches its gates.
# - `hydra-lab info demo` prints path use; `hydra_lab.attribution` has the lens and direct attribution; the dashboard's page
#   *Prompt* draws them for text of your own.

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
# # 4. Sparse attention, and how it leaks
#
# **Goal:** say which keys a query sees and why, choose blocks without looking ahead, and catch a selection that does look ahead · **Minutes:** 35 · **Difficulty:** medium
#
# Softmax attention and grouped-query heads are assumed.
#
# Attention reads any earlier token exactly, and pays for it with every pair of tokens. Hydra's attention path lets a query see
# three things only: a **window** of the last tokens, the **sink** (the first block), and a few earlier blocks of its own **choice**. The choice is
# what makes it work at a distance. It is also where such a design goes wrong without anybody noticing: a selection can let the future in
# although every key that it shows lies in the past.

# %%
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from IPython.display import display
from torch import Tensor

import hydra_lab
from hydra_lab import HydraConfig, figures, metrics
from hydra_lab.accounting import flops_per_token
from hydra_lab.attribution import dense_attention
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.names import invent_names
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.data.tasks import FILLER, VALUES, query
from hydra_lab.figures.theme import SYMBOLS, finish, hatching
from hydra_lab.interventions import intervened
from hydra_lab.loading import model_directory
from hydra_lab.ops.sparse_attention import block_means, reference, select_blocks, sparse_attention
from hydra_lab.path_use import read_path_use
from hydra_lab.probing.continuation import read_on
from hydra_lab.taps import Selection

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
config = model.config
WINDOW, BLOCK, NUM_SELECTED = (
    config.attention_window,
    config.attention_block_size,
    config.attention_num_selected,
)
use = read_path_use(model_directory("demo"))
print(
    f"blocks {config.attention_layers}: {config.attention_num_heads} query heads, {config.attention_num_kv_heads} key-value heads"
)
print(f"window {WINDOW} tokens, blocks of {BLOCK}, {NUM_SELECTED} selected per query and key-value head")
print(use.describe("attention"))

# %% [markdown]
# ## What a query sees
#
# Let $b$ be the block size, $w$ the window, and $S(t)$ the blocks that the query at position $t$ selected. Then
#
# $$\mathrm{visible}(t, j) = \underbrace{j \le t}_{\text{causal}} \;\wedge\; \big(\, \underbrace{t - j < w}_{\text{window}} \;\vee\;
# \underbrace{j < b}_{\text{sink}} \;\vee\; \underbrace{\lfloor j / b \rfloor \in S(t)}_{\text{selected}} \,\big), \qquad
# y_t = \sum_{j:\,\mathrm{visible}(t,j)} \mathrm{softmax}_j\!\Big(\frac{q_t^\top k_j}{\sqrt d}\Big)\, v_j .$$
#
# One softmax over the union: a key that qualifies twice counts once. Window and selected blocks are two of the three branches of native sparse
# attention ([arXiv 2502.11089](https://arxiv.org/abs/2502.11089)), which gives each its own softmax and gate. The first block stays visible because
# heads like to park probability there when nothing matches: attention sinks ([arXiv 2309.17453](https://arxiv.org/abs/2309.17453)).
#
# The library's oracle writes the mask out, and its fast path never forms it. Do both agree with PyTorch's dense attention
# under that mask?

# %%
show_source(reference.parts)


# %%
def encode(text: str) -> Tensor:
    """Token ids, [1, L]."""
    return tokenizer(text, return_tensors="pt").input_ids


def attention_inputs(ids: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, L, H, d], keys [1, L, H_kv, d] and selected blocks [1, L, H_kv, K] of `block` reading `ids`."""
    path, seen = model.model.layers[block].attention, {}
    handles = [
        path.register_forward_hook(
            lambda _path, args, _output: seen.update(qk=path.queries_and_keys(*args[:2]))
        ),
        path.selection.register_forward_hook(lambda _tap, _args, chosen: seen.update(blocks=chosen.blocks)),
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return *seen["qk"], seen["blocks"]


samples = read_sample_texts(model_directory("demo"))
code = encode(samples["code"][0])[:, :256]
q, k, blocks = attention_inputs(code, 5)
v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
parts = reference.parts(blocks, num_keys=k.shape[1], start=None, window=WINDOW, block_size=BLOCK)
mask = (parts[0] | parts[1] | parts[2]).transpose(1, 2).repeat_interleave(2, dim=1)  # [1, H, L, L]
dense = F.scaled_dot_product_attention(
    q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(2, dim=1), v.transpose(1, 2).repeat_interleave(2, dim=1),
    attn_mask=mask,
).transpose(1, 2)  # fmt: skip
sparse = sparse_attention(q, k, v, blocks, window=WINDOW, block_size=BLOCK).y
print(f"largest difference from dense attention under the mask: {(sparse - dense).abs().max():.0e}")

# %%
KINDS = ("not seen", *metrics.KINDS)


def draw_mask(block: int, head: int) -> None:
    """What every query of a key-value head sees, by kind."""
    chosen = attention_inputs(code, block)[2]
    by_kind = reference.parts(chosen, num_keys=code.shape[1], start=None, window=WINDOW, block_size=BLOCK)
    together = (chosen[0, 1:, head].sort(dim=-1).values == chosen[0, :-1, head].sort(dim=-1).values).all(
        dim=-1
    )
    kind = sum((index + 1) * part[0, :, head].float() for index, part in enumerate(by_kind)).numpy()
    kind[np.triu_indices(len(kind), 1)] = np.nan
    colours = ["#e3e6ea", *figures.colours(3)]
    steps = [[edge / 4, colours[index]] for index in range(4) for edge in (index, index + 1)]
    heat_map = go.Heatmap(
        z=kind, zmin=-0.5, zmax=3.5, colorscale=steps,
        colorbar={"tickvals": list(range(4)), "ticktext": list(KINDS), "title": {"text": "key", "side": "top"}},
        hovertemplate="query %{y}, key %{x}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(heat_map)
    figure.update_xaxes(title_text="key (token)", dtick=BLOCK, showgrid=False, constrain="domain")
    figure.update_yaxes(
        title_text="query (token)",
        dtick=BLOCK,
        autorange="reversed",
        scaleanchor="x",
        showgrid=False,
        constrain="domain",
    )
    finish(
        figure, title=f"A band, a margin and a choice: block {block}, key-value head {head}",
        subtitle=f"one sample of code, {code.shape[1]} tokens; {together.float().mean():.0%} of the queries choose as the one before", theme="light",
        path="attention", layer=block, path_use=use, height=440,
    )  # fmt: skip
    display(figure)


which_block = ipywidgets.ToggleButtons(options=config.attention_layers, value=5, description="block")
which_head = ipywidgets.ToggleButtons(
    options=range(config.attention_num_kv_heads), value=0, description="head"
)
display(
    which_block,
    which_head,
    ipywidgets.interactive_output(draw_mask, {"block": which_block, "head": which_head}),
)

# %% [markdown]
# ### Exercise 4.1: the mask of one query
#
# Write `visible(t, blocks, num_keys, window, block_size)`: `blocks` is an int64 tensor `[K]` of selected blocks, in which -1 means
# "none". Return a boolean tensor `[num_keys]`: the keys that the query at position `t` sees. There may be keys after `t`.


# %% tags=["exercise"]
def visible(t, blocks, num_keys, window, block_size):
    """[num_keys] bool: what the query at position t sees."""
    # BEGIN SOLUTION: j <= t, and one of window, sink, selected
    j = torch.arange(num_keys)
    selected = torch.isin(j // block_size, blocks)
    return (j <= t) & ((t - j < window) | (j < block_size) | selected)
    # END SOLUTION


# %% tags=["check"]
nothing = torch.tensor([-1, -1])
seen = visible(13, nothing, 20, 3, 4)
check(
    seen is not None and seen.dtype == torch.bool and seen.shape == (20,),
    "Return a boolean tensor of shape [num_keys].",
)
check(not seen[14:].any(), "Keys after t are never seen.")
check(
    seen[11:14].all() and not seen[10],
    "The window holds `window` keys, the query's own included: t - j < window.",
)
check(seen[:4].all(), "Every query sees the sink, block 0.")
check(not seen[4:11].any(), "With nothing selected only window and sink are seen.")
check(not visible(19, nothing, 20, 3, 4)[16], "-1 means that nothing was selected; it is not the last block.")
check_close(
    visible(13, torch.tensor([1, -1]), 20, 3, 4).nonzero()[:, 0], [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13],
    "With block 1 selected, keys 4 to 7 are seen besides sink and window.",
)  # fmt: skip
check(
    not visible(13, torch.tensor([3, -1]), 20, 3, 4)[14:].any(),
    "Of a selected block only keys up to t are seen.",
)
check(not visible(2, nothing, 20, 3, 4)[3:].any(), "The sink too is seen only up to t.")
for t in (40, 100, 255):
    check_close(
        visible(t, blocks[0, t, 1], code.shape[1], WINDOW, BLOCK), (parts[0] | parts[1] | parts[2])[0, t, 1],
        f"The model's own query {t} sees other keys.",
    )  # fmt: skip
passed("4.1")

# %% [markdown]
# ## Choosing blocks
#
# To choose, a query compares itself with one summary per block, the mean of its keys. The query heads $q^{(1)} \dots q^{(G)}$ that share a
# key-value head choose together:
#
# $$\mathrm{score}(t, B) = \frac{1}{G} \sum_g q_t^{(g)\top} \bar k_B, \qquad \bar k_B = \frac{1}{b} \sum_{j \in B} k_j, \qquad
# S(t) = \operatorname*{top\text{-}K}_{B \in \mathcal C(t)} \mathrm{score}(t, B),$$
#
# $$\mathcal C(t) = \big\{\, B \ge 1 \;:\; \underbrace{B < \lfloor t / b \rfloor}_{\text{completed before } t\text{'s own block}} \;\wedge\;
# \underbrace{B b \le t - w}_{\text{reaches out of the window}} \,\big\} .$$
#
# The mean key is the summary of MoBA ([arXiv 2502.13189](https://arxiv.org/abs/2502.13189)). Each of the three conditions has its reason. Block 0 is seen
# anyway, and so is a block inside the window: choosing them would waste a place. And the current block is no candidate because of
# what its mean is made of.

# %%
show_source(reference.select_blocks)

# %% [markdown]
# ### Exercise 4.2: choose without looking ahead
#
# Write `choose_blocks(q, k, t, window, block_size, num_selected)` for one query and one key-value head. `q` is `[G, d]`, the group's queries at
# position `t`; `k` is `[L, d]`, the keys of the *whole* sequence, those after `t` included. Return `[num_selected]` int64: the
# blocks, best first, and -1 where fewer qualify.


# %% tags=["exercise"]
def choose_blocks(q, k, t, window, block_size, num_selected):
    """[num_selected] blocks that the query at position t selects, best first; -1 where fewer qualify."""
    # BEGIN SOLUTION: mean keys of the candidate blocks, their scores averaged over the group, top-k, filled up with -1
    chosen = torch.full((num_selected,), -1)
    candidates = [j for j in range(1, t // block_size) if j * block_size <= t - window]
    if candidates:
        means = torch.stack([k[j * block_size : (j + 1) * block_size].mean(dim=0) for j in candidates])
        best = (means @ q.T).mean(dim=1).topk(min(num_selected, len(candidates))).indices
        chosen[: len(best)] = torch.tensor(candidates)[best]
    return chosen
    # END SOLUTION


# %% tags=["check"]
generator = torch.Generator().manual_seed(0)
q_, k_ = torch.randn(2, 8, generator=generator), torch.randn(40, 8, generator=generator)
one = choose_blocks(q_, k_, 33, 6, 4, 3)
check(one is not None and tuple(one.shape) == (3,), "Return a tensor of shape [num_selected].")
changed = k_.clone()
changed[34:] += 5 * q_.mean(dim=0)
check_close(
    choose_blocks(q_, changed, 33, 6, 4, 3),
    one,
    "Keys after t changed the choice: the query's own block is not complete.",
)
changed = k_.clone()
changed[32] += 50 * q_.mean(dim=0)
check(
    8 not in choose_blocks(q_, changed, 33, 6, 4, 3),
    "Block 8 is the query's own: no candidate, however well it scores.",
)
changed = k_.clone()
changed[:4] += 5 * q_.mean(dim=0)
check(0 not in choose_blocks(q_, changed, 33, 6, 4, 3), "Block 0 is seen anyway: no candidate.")
changed = k_.clone()
changed[28:32] += 5 * q_.mean(dim=0)
check(
    7 not in choose_blocks(q_, changed, 33, 6, 4, 3),
    "Block 7 lies wholly in the window (j * block_size > t - window): no candidate.",
)
check_close(
    choose_blocks(q_, k_, 13, 6, 4, 3), [1, -1, -1], "At t = 13 block 1 alone qualifies: fill up with -1."
)
check_close(choose_blocks(q_, k_, 3, 6, 4, 3), [-1, -1, -1], "At t = 3 no block is complete.")
for t in (30, 150, 255):
    check_close(
        choose_blocks(q[0, t, 2:4], k[0, :, 1], t, WINDOW, BLOCK, NUM_SELECTED), blocks[0, t, 1],
        f"The model's own query {t} chooses otherwise: the score is the mean over the group of q . mean(k).",
    )  # fmt: skip
passed("4.2")

# %% [markdown]
# ## A leak
#
# Here is a selection that looks harmless. A query may also score the block it stands in. Its window ($w \ge b$) shows it that block anyway, and the mask still cuts
# off every key after $t$. We write it down, put it in place of the library's at the tap `attention.selection`, and leave everything else as
# it is. The second variant lets a tile of queries choose together, by the mean of *all* its queries, as one might for speed.


# %%
Select = Callable[[torch.nn.Module, Tensor, Tensor], Selection]


def scoring_the_current_block(path: torch.nn.Module, q: Tensor, k: Tensor) -> Selection:
    """Leaks: a block's mean holds keys that come after the query, as long as the query stands in the block."""
    group = q.unflatten(2, (path.num_kv_heads, -1)).mean(dim=3)
    scores = torch.einsum("blgd,bjgd->blgj", group, block_means(k, block_size=path.block_size))
    t, j = torch.arange(q.shape[1])[:, None], torch.arange(scores.shape[-1])
    candidates = (j >= 1) & (j <= t // path.block_size)
    best, chosen = scores.masked_fill(~candidates[:, None], -torch.inf).topk(path.num_selected, dim=-1)
    return Selection(chosen.masked_fill(best == -torch.inf, -1), best)


def pooling_the_tile(path: torch.nn.Module, q: Tensor, k: Tensor) -> Selection:
    """Leaks: the mean of a tile's queries holds queries that come after the first ones of the tile."""
    tiles = q.unflatten(1, (-1, path.block_size)).mean(dim=2)
    chosen = select_blocks(
        tiles, block_means(k, block_size=path.block_size), window=path.window, block_size=path.block_size,
        num_selected=path.num_selected, serves=path.block_size,
    )  # fmt: skip
    return Selection(*(each.repeat_interleave(path.block_size, dim=1) for each in chosen))


@contextmanager
def selecting(select: Select) -> Iterator[None]:
    """Within the context the attention selects by `select(path, queries, keys)`."""
    with ExitStack() as stack:
        for layer in config.attention_layers:
            path, seen = model.model.layers[layer].attention, []
            before = path.register_forward_pre_hook(
                lambda path, args, seen=seen: seen.append(path.queries_and_keys(*args[:2]))
            )
            at_tap = path.selection.register_forward_hook(
                lambda _tap, _args, _chosen, path=path, seen=seen: select(path, *seen.pop())
            )
            stack.callback(before.remove)
            stack.callback(at_tap.remove)
        yield


def run_with(select: Select | None) -> Callable[[Tensor], Tensor]:
    """The model as a function ids [1, L] -> logits [1, L, V], with this selection; None: its own."""

    @torch.no_grad()
    def run(ids: Tensor) -> Tensor:
        with selecting(select) if select else ExitStack():
            return model(ids).logits

    return run


# %% tags=["predict"]
reaches = predict(
    "Queries may score their own block; no query sees a key after itself. Token 215 and all later ones are replaced. Which logits before 215 move?",
    [
        "none: causality is a matter of the mask, and the mask is right",
        "some of those in the same block, 192 to 214",
        "some in any earlier block",
    ],
)

# %%
leaking = run_with(scoring_the_current_block)
replaced = code.clone()
replaced[:, 215:] = torch.randint(
    config.vocab_size, (1, code.shape[1] - 215), generator=torch.Generator().manual_seed(1)
)
moved = (leaking(replaced) - leaking(code))[0, :215].abs().amax(dim=-1)
where = (moved > 1e-4).nonzero()[:, 0].tolist()
print("positions whose logits moved:", where)
print(f"largest change of a logit: {moved.max():.2f};  with the library's selection:", end=" ")
own = run_with(None)
print(f"{(own(replaced) - own(code))[0, :215].abs().max():.0e}")
in_block = [position for position in where if position >= 192]
reaches.reveal(
    reaches.options[0 if not where else 1 if len(in_block) == len(where) else 2],
    f"{len(where)} of the 23 earlier positions of the block move. The block's mean is made of keys that come later; it decides "
    "whether the block takes one of the two places, and so whether another block, wholly in the past, is seen or not. "
    "What is shown is past; that it is shown says something of the future.",
)

# %% [markdown]
# A mask can be right and the model acausal. So the mask is not what to test. Perturb the future and compare the past, from many places. Below, each row replaces
# every token from some position on and shows how far each earlier logit moved.

# %%
cuts = list(range(160 if quick() else 128, 256, 8))
sweeps = {}
for name, select in (
    ("scoring the current block", scoring_the_current_block),
    ("pooling the tile", pooling_the_tile),
    ("library", None),
):
    run = run_with(select)
    untouched = run(code)[0]
    change = np.full((len(cuts), code.shape[1]), np.nan)
    for row, first in enumerate(cuts):
        replaced = code.clone()
        generator = torch.Generator().manual_seed(first)
        replaced[:, first:] = torch.randint(
            config.vocab_size, (1, code.shape[1] - first), generator=generator
        )
        change[row, :first] = (run(replaced)[0] - untouched)[:first].abs().amax(dim=-1)
    sweeps[name] = change
    caught = (np.nan_to_num(change) > 1e-4).any(axis=1)
    print(
        f"{name:26s} caught from {caught.sum():2d} of {len(cuts)} places; largest change of a logit {np.nanmax(change):.2g}"
    )

FLOOR = 1e-4  # what counts as a change; far above rounding, which is 0 here
shown = np.log10(np.maximum(sweeps["scoring the current block"], FLOOR))
decades = list(range(-4, 1))
figure = go.Figure(
    go.Heatmap(
        z=shown[:, 96:], x=list(range(96, 256)), y=[str(first) for first in cuts], colorscale="Viridis", ygap=1,
        colorbar={
            "title": {"text": "largest change<br>of a logit", "side": "top"}, "tickvals": decades,
            "ticktext": ["none", *(f"{10.0**power:g}" for power in decades[1:])],
        },
        hovertemplate="replaced from %{y} on, logits at %{x}: 10^%{z:.1f}<extra></extra>",
    )
)  # fmt: skip
figure.update_xaxes(title_text="position of the logits (token)", tick0=96, dtick=BLOCK, showgrid=False)
figure.update_yaxes(title_text="first replaced token", type="category", autorange="reversed", showgrid=False)
finish(
    figure, title="The leak runs back to the start of the block, and no further",
    subtitle=f"queries score their own block; one sample of code, {len(cuts)} runs; causal would be all dark",
    theme="light", path="attention", path_use=use, height=300,
)  # fmt: skip
display(figure)

# %% [markdown]
# Two things to take away. Replaced from a block's *first* token on, nothing moves: a test that perturbs only at multiples of 32
# passes. And a top-k is a step function: most perturbations do not flip it, so one perturbation proves nothing.
#
# ### Exercise 4.3: a leak test
#
# Write `leaks(run, ids, position, generator)`: replace every token *after* `position` by a different one (add a random 1 to 1000 to its id, modulo
# 4,000) and return the positions up to and including `position` whose logits moved by more than $10^{-4}$, as an int64 tensor. `run` maps ids
# `[1, L]` to logits `[1, L, V]`. Leave `ids` as they are.


# %% tags=["exercise"]
def leaks(run, ids, position, generator):
    """Positions <= position whose logits depend on the tokens after it."""
    # BEGIN SOLUTION: a copy with other tokens after position; compare the logits up to position
    other = ids.clone()
    shift = torch.randint(1, 1001, other[:, position + 1 :].shape, generator=generator)
    other[:, position + 1 :] = (other[:, position + 1 :] + shift) % 4000
    change = (run(other) - run(ids))[0, : position + 1].abs().amax(dim=-1)
    return (change > 1e-4).nonzero()[:, 0]
    # END SOLUTION


# %% tags=["check"]
def toy(reach: int) -> Callable[[Tensor], Tensor]:
    """A function whose logits at t are the id of token t + reach."""

    def run(ids: Tensor) -> Tensor:
        check(ids.min() >= 0 and ids.max() < 4000, "An id is out of range: take the sum modulo 4,000.")
        ahead = (torch.arange(ids.shape[1]) + reach).clamp(max=ids.shape[1] - 1)
        return ids[:, ahead, None].double().expand(-1, -1, 3)

    return run


def seeded() -> torch.Generator:
    """A fresh generator, so that every call draws the same numbers."""
    return torch.Generator().manual_seed(2)


toy_ids = torch.arange(30)[None] * 135
kept = toy_ids.clone()
found = leaks(toy(0), toy_ids, 20, seeded())
check(torch.equal(toy_ids, kept), "The caller's ids were changed: work on a clone.")
check(found is not None and found.ndim == 1, "Return the positions, a tensor with one axis.")
check(
    len(found) == 0,
    "A causal function is accused: compare logits up to `position` only, and change tokens after it only.",
)
check_close(
    leaks(toy(1), toy_ids, 20, seeded()),
    [20],
    "One token of look-ahead moves `position` itself: it belongs to the past too.",
)
check_close(
    leaks(toy(3), toy_ids, 20, seeded()), [18, 19, 20],
    "Three tokens of look-ahead move three positions: replace all tokens after `position`, not only the next.",
)  # fmt: skip
check(len(leaks(run_with(None), code, 200, seeded())) == 0, "The library's selection does not leak.")
check(
    len(leaks(leaking, code, 207, seeded())) > 0,
    "The current block's mean leaks at 207: are all later tokens replaced?",
)
check(
    len(leaks(leaking, code, 191, seeded())) == 0,
    "At a block's end the leak cannot show: replace tokens after `position`, not at it.",
)
passed("4.3")

# %% [markdown]
# ## What it costs
#
# Dense attention multiplies $L/2$ keys per query on average. Here it is at most $w + b + K b$, whatever $L$. But the choice itself compares
# every query with every block: $L/b$ products of a query with a mean key, so it is still quadratic, with a small factor.

# %%
show_source(flops_per_token)


# %%
def attention_flops(preset: HydraConfig, length: int) -> dict[str, float]:
    """MFLOPs per token of one attention path in prefill: all of it, its dense equal, and the choice alone."""
    rows = [row.prefill for row in flops_per_token(preset, length).rows if row.component == "attention"]
    heads, kv_heads, width = (
        preset.attention_num_heads,
        preset.attention_num_kv_heads,
        preset.attention_head_dim,
    )
    projections = 4 * preset.hidden_size * (heads + kv_heads) * width
    return {
        "sparse": rows[0] / 1e6,
        "dense": (projections + 4 * heads * width * (length + 1) / 2) / 1e6,
        "the choice alone": 2 * kv_heads * width * (length // preset.attention_block_size) / 1e6,
    }


LENGTHS = [2**power for power in range(8, 18)]
costs = [attention_flops(config, length) for length in LENGTHS]
figure = go.Figure()
for name, colour, symbol, dash in zip(
    costs[0], figures.colours(3), SYMBOLS, ("solid", "dash", "dot"), strict=False
):
    figure.add_trace(
        go.Scatter(
            x=LENGTHS, y=[cost[name] for cost in costs], name=name, mode="lines+markers",
            line={"color": colour, "dash": dash}, marker={"symbol": symbol, "size": 9},
        )
    )  # fmt: skip
figure.update_xaxes(
    type="log",
    tickvals=LENGTHS[::2],
    ticktext=[f"{length:,}" for length in LENGTHS[::2]],
    title_text="context (tokens, log scale)",
)
figure.update_yaxes(type="log", title_text="MFLOP per token and path (log scale)", dtick=1)
finish(
    figure, title="Sparse attention stays flat until the choice itself costs something",
    subtitle=f"counted, not timed: one attention path of the demo, forward, prefill; window {WINDOW}, {NUM_SELECTED} blocks of {BLOCK}",
    theme="light", path="attention", path_use=use, height=330,
)  # fmt: skip
display(figure)
cheaper = next(
    (length for length, cost in zip(LENGTHS, costs, strict=True) if cost["sparse"] < cost["dense"]), None
)
print(f"cheaper than dense from {cheaper:,} tokens on (of those counted)")
scores_16k = config.attention_num_heads * 16384**2 * 4 / 2**30
print(
    f"one T x T score matrix of {config.attention_num_heads} heads at 16,384 tokens, fp32: {scores_16k:.0f} GiB per block"
)

# %% [markdown]
# That last matrix is what the paper's prototype builds and then masks: sparse in what it sees, dense in what it computes. It reports
# a peak of 18.2 GB at 16K tokens, the transformer beside it 17.9 GB.
#
# ## What it misses
#
# Where does the probability go, and what would dense attention have looked at with the same queries and keys?

# %%
kinds = ("prose", "code", "chains", "recall")
rows = torch.cat([encode(samples[kind][0])[:, :512] for kind in kinds])
captured = capture_batch(model, rows, domains=kinds, signals=["attention", "mass"])
display(figures.mass_by_kind(metrics.mass_by_kind(metrics.mass_record(captured)), path_use=use))
display(figures.selection_use(metrics.selection_use(metrics.selection_record(captured, 5)), path_use=use))
for layer in config.attention_layers:
    coverage = dense_attention(model, rows, layer).coverage[:, 256:].mean(axis=1)
    print(
        f"block {layer}: of dense attention's probability, tokens 256 on, shown:",
        ", ".join(f"{kind} {share:.2f}" for kind, share in zip(kinds, coverage, strict=True)),
    )
in_view = metrics.keys_in_view(
    np.arange(256, 512), window=WINDOW, block_size=BLOCK, num_selected=NUM_SELECTED
).sum(axis=1)
print(f"keys in view there: {(in_view / np.arange(257, 513)).mean():.2f} of all")

# %% [markdown]
# Read the bars against "keys in view". In both blocks the first block of keys gets no more than its even share: the reason for which one keeps a sink does not
# show in this model. Block 2 looks at what it sees nearly evenly, and its coverage is hardly above the share of keys in view. Block 5
# picks. Neither covers all that dense attention would have looked at. But coverage is no verdict: the model was trained with this selection, and nothing
# taught its queries how to score keys that they never see.
#
# A verdict needs a task. Sixteen pairs, then filler, then one question, at a growing distance. In three runs the same model answers: as it is; with the
# block of the asked pair **forbidden** to the selection; and with it **forced** into the selection, while the question is read.

# %%
NUM_PAIRS, LEAD, PAIR_TOKENS = 16, 64, 7
ASKED = (0, 3, 6, 9, 12, 15)
DISTANCES = (64, 1024, 4096)


def make_problem(rng: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text up to the end of the pairs [1, L], filler [1, F], questions [A, 6], ids of the values [P]. The pairs follow other text, so none
    lies in the sink."""
    names = [f" {name}" for name in invent_names(rng, 300) if encode(f" {name}").shape[1] == 4][:NUM_PAIRS]
    values = rng.sample(VALUES, NUM_PAIRS)
    pairs = "".join(f"{name} ={value};" for name, value in zip(names, values, strict=True))
    given = torch.cat([encode(rng.choice(samples["prose"]))[:, :LEAD], encode("recall:" + pairs)], dim=1)
    filler = encode("".join(rng.choices(FILLER, k=DISTANCES[-1])))
    questions = torch.cat([encode(query(names[pair])) for pair in ASKED])
    return given, filler, questions, torch.tensor([encode(value)[0, 0].item() for value in values])


rng = random.Random(0)
problems = [make_problem(rng) for _ in range(3 if quick() else 6)]
given, filler, questions, values = (torch.stack(each).squeeze(1) for each in zip(*problems, strict=True))
premise = (LEAD + 2 + PAIR_TOKENS * np.array(ASKED) + 5) // BLOCK
print(
    f"{len(problems)} problems of {given.shape[1]} tokens; the asked values lie in blocks {premise.tolist()}"
)

# %% tags=["predict"]
distant = predict(
    f"At {DISTANCES[-1]:,} tokens of filler part of the answers are wrong. What if the right block is forced into the selection?",
    [
        "no gain: so far back the keys are of no use any more",
        "no gain: the state answers, the attention does not",
        "nearly all are right: it can read the block, it does not find it",
    ],
)

# %%
CHANGES = {
    "as it is": "",
    "block forbidden": "attention[*].forbid(blocks=[{}])",
    "block forced": "attention[*].select(blocks=[{}])",
}
right = {name: [] for name in CHANGES}
_, cache = read_on(model, given, last_only=True)
reached = 0
for distance in DISTANCES:
    while reached < distance:
        end = min(reached + 512, distance)
        _, cache = read_on(model, filler[:, reached:end], cache, last_only=True)
        reached = end
    for name, change in CHANGES.items():
        answers = []
        for index, pair in enumerate(ASKED):
            with intervened(model, *([change.format(premise[index])] if change else [])):
                logits = read_on(model, questions[:, index], cache, last_only=True)[0][:, -1]
            answers.append(logits.gather(1, values).argmax(dim=1) == pair)
        right[name].append(torch.stack(answers).float().mean().item())

figure = go.Figure()
for index, (name, colour) in enumerate(zip(right, figures.colours(3), strict=True)):
    figure.add_trace(
        go.Bar(
            x=[f"{distance:,}" for distance in DISTANCES], y=[100 * share for share in right[name]], name=name,
            marker={"color": colour, "pattern": hatching(index, "light")},
        )
    )  # fmt: skip
figure.add_hline(
    y=100 / NUM_PAIRS,
    line={"dash": "dash", "width": 1},
    annotation_text="blind choice",
    annotation_position="top left",
)
figure.update_xaxes(title_text="filler between pairs and question (tokens)", type="category")
figure.update_yaxes(title_text="questions answered right (%)", range=[0, 103])
finish(
    figure, title="What gets lost with distance is the choice of the block",
    subtitle=f"best of the problem's {NUM_PAIRS} values; {len(problems)} problems of {len(ASKED)} questions",
    theme="light", path="attention", path_use=use, height=320,
)  # fmt: skip
display(figure)
far = {name: shares[-1] for name, shares in right.items()}
print({name: [round(share, 2) for share in shares] for name, shares in right.items()})
gain, worth = far["block forced"] - far["as it is"], far["as it is"] - far["block forbidden"]
distant.reveal(
    distant.options[2 if gain > 0.1 and far["block forced"] > 0.8 else 0 if worth > 0.1 else 1],
    f"As it is {far['as it is']:.0%} are right, with the block forced {far['block forced']:.0%}, with it forbidden "
    f"{far['block forbidden']:.0%} (n = {len(problems) * len(ASKED)}). The keys and values are as good as ever. A mean of 32 keys is a blurred "
    "summary, and the more blocks compete, the more often another one looks better.",
)

# %% [markdown]
# ## Where this breaks
#
# - **Few questions.** The bars above rest on a handful of problems that share their distances. `hydra-lab probe distant-premise demo` asks 96 questions up to
#   32,768 tokens, with controls: there 31% are right at 16,384 tokens, and 100% with the block forced, at every distance.
# - **Selection is not trained.** Top-k passes no gradient, so nothing tells a query that the block it did not choose held the answer. It learns only through
#   keys that were shown for other reasons. Native sparse attention trains its selection through a compressed branch that shares the scores.
# - **A leak need not be large to matter.** Here the weights never saw one. A model *trained* with a leaking selection can learn to use it; its training loss then looks
#   better than it is, and falls apart in generation, where the future does not exist. How much it would gain we did not measure.
# - **Near the pairs, the attention may look idle.** At short distance the state answers as well (lesson 3), and forbidding the block costs little.
# - **FLOPs are not time.** Gathered blocks use a processor worse than one dense product; on the two cores of `hydra_lab/bench/README.md` and on a GPU the crossover lies
#   elsewhere than counted here.

# %% [markdown]
# ## Next
#
# - Lesson 5 finds the same kind of leak in a router that averages over its chunk.
# - `hydra-lab dashboard` shows the selection of every token for text of your own; `hydra-lab probe distant-premise demo` is the study behind the last figure.
# - `hydra_lab/ops/sparse_attention/README.md` explains how the fast path and the Triton kernels never form the mask.

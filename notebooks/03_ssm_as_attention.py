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
# # 3. What a state remembers
#
# **Goal:** read a state-space path as attention, say how long each head remembers, and show by patching a state which block carries a fact · **Minutes:** 30 · **Difficulty:** medium
#
# Lesson 2 (the recurrence) and attention are assumed.
#
# A state-space path keeps no list of earlier tokens. It keeps, per head, one matrix of fixed size, and every token
# overwrites a little of it. So "which token does it look at?" seems to have no answer. But the recurrence is linear in
# what the tokens write, and unrolled it *is* an attention matrix. This lesson reads that matrix, then asks the two
# questions that such a picture leaves open: for how long is something kept, and does the model use what is kept?

# %%
import random
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from IPython.display import display
from plotly.subplots import make_subplots
from torch import Tensor

import hydra_lab
from hydra_lab import figures, metrics
from hydra_lab.attribution import SSMAttention, ssm_attention
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.names import invent_names
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.data.tasks import FILLER, VALUES, query
from hydra_lab.figures.theme import SYMBOLS, finish
from hydra_lab.interventions import PatchState, capture_state, intervened
from hydra_lab.loading import model_directory
from hydra_lab.ops.ssd import reference
from hydra_lab.path_use import read_path_use
from hydra_lab.probing.continuation import read_on, with_memory_of
from hydra_lab.widgets import TokenStrip

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
NUM_BLOCKS, NUM_HEADS = model.config.num_hidden_layers, model.config.ssm_num_heads
use = read_path_use(model_directory("demo"))
print(
    f"{NUM_BLOCKS} blocks, {NUM_HEADS} heads, per head a state of",
    model.config.ssm_head_dim,
    "x",
    model.config.ssm_state_size,
)
print(use.describe("ssm"))

# %% [markdown]
# ## The recurrence, unrolled
#
# Per head, with $a_t = e^{\Delta_t A}$ and the state $h_t \in \mathbb{R}^{P \times N}$,
#
# $$h_t = a_t\, h_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = h_t C_t + D x_t .$$
#
# Put the first line into itself until it reaches the start ($h_0 = 0$):
#
# $$h_t = \sum_{s \le t} \Big(\prod_{r=s+1}^{t} a_r\Big) \Delta_s\, x_s B_s^\top
# \quad\Longrightarrow\quad y_t = \sum_{s \le t} M_{ts}\, x_s + D x_t, \qquad
# M_{ts} = \Delta_s \, (C_t^\top B_s)\, \exp\Big(\sum_{r=s+1}^{t} \Delta_r A\Big).$$
#
# The product begins at $s+1$: a token's own decay acts on what was there *before* it wrote. This matrix form is section 3
# of Dao and Gu ([arXiv 2405.21060](https://arxiv.org/abs/2405.21060)); Ali et al.
# ([arXiv 2403.01590](https://arxiv.org/abs/2403.01590)) read it as attention.
#
# | attention | here | |
# |---|---|---|
# | query $q_t$, key $k_s$ | $C_t$, $B_s$ | all heads of a group share them; here all heads of a block |
# | value $v_s$ | $x_s$ | a short convolution has already mixed it with the three tokens before |
# | positional bias | $\prod a_r$ | learned, and it depends on the tokens in between |
# | softmax | none | rows do not sum to one, and an entry may be negative |
# | (nothing) | $\Delta_s$ | how strongly token $s$ writes, decided at $s$, before any query is known |

# %%
show_source(reference.ssd_step)
show_source(SSMAttention)


# %% [markdown]
# Does the library's $M$ reproduce what its recurrence puts out? The left side below is `M x + D x`, the right side runs the
# oracle token by token on the same inputs.


# %%
class Scan(NamedTuple):
    """What the recurrence of one block works on, for one row of tokens."""

    x: Tensor  # [1, L, H, P]
    dt: Tensor  # [1, L, H]
    B: Tensor  # [1, L, 1, N]
    C: Tensor  # [1, L, 1, N]
    log_decay: Tensor  # [1, L, H], dt * A


def encode(text: str) -> Tensor:
    """Token ids, [1, L]."""
    return tokenizer(text, return_tensors="pt").input_ids


def scan_of(ids: Tensor, block: int) -> Scan:
    """Inputs of the recurrence of `block` while the model reads `ids`."""
    path, seen = model.model.layers[block].ssm, []
    handle = path.register_forward_hook(lambda _path, args, _output: seen.append(path.scan_inputs(*args[:2])))
    with torch.no_grad():
        model(ids)
        handle.remove()
        A = -torch.exp(path.A_log.float())
    return Scan(*seen[0], log_decay=seen[0].dt * A)


text = (
    "The state has a fixed size, and every token overwrites a little of it. What was said first fades first."
)
ids = encode(text)
for block in (0, 2):
    path, scan = model.model.layers[block].ssm, scan_of(ids, block)
    A = -torch.exp(path.A_log.detach().float())
    by_recurrence = reference.ssd(
        scan.x, scan.dt, A, scan.B, scan.C, path.D.detach(), None, None, None, 64, False, False
    ).y
    by_matrix = torch.tensor(ssm_attention(model, ids, block).output()).transpose(1, 2)
    error = (by_matrix - by_recurrence).abs().max() / by_recurrence.abs().max()
    print(f"block {block}: largest difference {error:.0e} of the largest output")


# %% [markdown]
# ## Looking at it
#
# Recall is what this model does best: pairs, some words that carry nothing, then a question. All names below have four
# tokens, so that a pair is seven: four of the name, `=`, the value, `;`. Each problem comes with a **donor** for later: the
# same text with the values handed on by one name, so that only the binding differs.


# %%
NUM_PAIRS = 6
PAIR_TOKENS = 7
FIRST_PAIR = 2  # after `recall` and `:`


class Problem(NamedTuple):
    """A recall problem and its donor, which binds the same names to other values."""

    prompt: Tensor  # [1, L]
    donor: Tensor  # [1, L]
    asked: int  # which pair
    right: int  # token id of its value in the prompt
    other: int  # token id of its value in the donor


def make_problem(rng: random.Random, *, num_filler: int = 64) -> Problem:
    """Draw names of four tokens, values, filler and which pair is asked for."""
    names = [f" {name}" for name in invent_names(rng, 200) if encode(f" {name}").shape[1] == 4][:NUM_PAIRS]
    values = rng.sample(VALUES, NUM_PAIRS)
    rotated = values[1:] + values[:1]
    asked = rng.randrange(NUM_PAIRS)
    end = "".join(rng.choices(FILLER, k=num_filler)) + query(names[asked])
    prompt, donor = (
        encode("recall:" + "".join(f"{n} ={v};" for n, v in zip(names, bound, strict=True)) + end)
        for bound in (values, rotated)
    )
    return Problem(prompt, donor, asked, *(encode(v[asked])[0, 0].item() for v in (values, rotated)))


rng = random.Random(0)
problems = [make_problem(rng) for _ in range(4 if quick() else 8)]
short = make_problem(rng, num_filler=4)
labels = [tokenizer.decode(i) for i in short.prompt[0]]
print("".join(labels))
print("the model says", repr(tokenizer.decode(model(short.prompt).logits[0, -1].argmax())))

# %% tags=["predict"]
most_read = predict(
    "The last token, `=`, must find the value of the name before it. Where is block 2's effective attention largest?",
    [
        "at the last four tokens, as in a convolution",
        "at the value of the pair that is asked for",
        "at the `;` after the pair that is asked for",
        "nowhere in particular: it only falls with distance",
    ],
)

# %%
attention = ssm_attention(model, short.prompt, 2)
scan = scan_of(short.prompt, 2)
shown = ssm_attention(model, short.prompt, 2, heads=(0, 3))
display(figures.ssm_attention(shown, labels, view="contribution", path_use=use))

# %%
prompts = torch.cat([problem.prompt for problem in problems])
last_row = ssm_attention(model, prompts, 2).contribution()[:, :, -1]  # [B, H, L]
last_row /= last_row.sum(axis=-1, keepdims=True)
asked = np.array([problem.asked for problem in problems])
rows = np.arange(len(problems))
value = FIRST_PAIR + PAIR_TOKENS * asked + 5
share = {
    most_read.options[0]: last_row[:, :, -4:].sum(axis=-1),
    most_read.options[1]: last_row[rows, :, value],
    most_read.options[2]: last_row[rows, :, value + 1],
}
for place, share_BH in share.items():
    print(
        f"{place[:46]:46s} share of |M x| by head: {[round(float(each), 2) for each in share_BH.mean(axis=0)]}"
    )
best = max(share, key=lambda place: share[place].mean())
semicolons = FIRST_PAIR + PAIR_TOKENS * np.arange(NUM_PAIRS) + 6
found = (last_row[:, :, semicolons].argmax(axis=-1) == asked[:, None]).mean(axis=0)
print(
    f"of the {NUM_PAIRS} semicolons the right one is read most in",
    found.round(2).tolist(),
    f"of {len(problems)} problems",
)
most_read.reveal(
    best if share[best].mean() > 0.2 else most_read.options[3],
    f"On average over {len(problems)} problems and the heads that place takes {share[best].mean():.0%} of the row; "
    f"an even share of {prompts.shape[1]} tokens would be {1 / prompts.shape[1]:.1%}. A pair is written when it is "
    "complete, at the token that closes it, and the query finds it by content.",
)

# %% [markdown]
# This is key-value lookup without a softmax: $B$ at the semicolon is a key that describes the name, $C$ at the question is the
# query. That `;` knows the name is the work of the blocks below, and of the convolution.
#
# The picture leaves something out on purpose. $|M_{ts}|$ alone ignores how long $x_s$ is; `view="contribution"` shows
# $|M_{ts}|\,\lVert x_s \rVert$, which is why we look at it. What comes after, the gate $z_t$ and the norm, is in neither.
#
# ### Exercise 3.1: one row of the effective attention
#
# Write `attention_row(C, B, dt, log_decay, t)` for one head: `C` and `B` are `[L, N]`, `dt` and `log_decay` are `[L]`.
# Return `[L]`: $M_{ts}$ for every $s$, and 0 for $s > t$. Decays may be so strong that the product of all of them
# is 0 in floating point; the row must be right all the same.


# %% tags=["exercise"]
def attention_row(C, B, dt, log_decay, t):
    """[L] coefficients with which token t's output mixes in every token's x."""
    # BEGIN SOLUTION: dt_s (C_t . B_s) exp(sum of log_decay from s+1 to t), and 0 for s > t
    row = torch.zeros_like(dt)
    log_kept = torch.zeros((), dtype=dt.dtype)
    for s in range(t, -1, -1):
        row[s] = dt[s] * (C[t] @ B[s]) * log_kept.exp()
        log_kept = log_kept + log_decay[s]
    return row
    # END SOLUTION


# %% tags=["check"]
generator = torch.Generator().manual_seed(0)
C_, B_ = torch.randn(2, 6, 4, generator=generator).double()
dt_ = torch.rand(6, generator=generator).double() + 0.1
mild, strong = -dt_, torch.tensor([-1.0, -2.0, -900.0, -0.5, -800.0, -0.25]).double()
answer = attention_row(C_, B_, dt_, mild, 3)
check_close(answer[4:], torch.zeros(2), "A later token must not count: entries past t are 0.")
check_close(
    answer[3], dt_[3] * (C_[3] @ B_[3]), "At s = t nothing has decayed yet: the sum runs from s + 1 to t."
)
check_close(
    answer[2], dt_[2] * (C_[3] @ B_[2]) * mild[3].exp(),
    "Token t-1 has decayed by token t's decay alone, and it writes with its own dt.",
)  # fmt: skip
check_close(
    attention_row(C_, B_, dt_, strong, 5)[4], dt_[4] * (C_[5] @ B_[4]) * strong[5].exp(),
    "With strong decays a quotient of two products is 0/0: add logs from s + 1 to t and exponentiate the sum.",
)  # fmt: skip
for head, t in ((0, -1), (3, 20)):
    t %= short.prompt.shape[1]
    one = (scan.C[0, :, 0], scan.B[0, :, 0], scan.dt[0, :, head], scan.log_decay[0, :, head])
    check_close(
        attention_row(*one, t), attention.matrix[0, head, t],
        "On the model's own inputs the row differs from the library's.", rtol=1e-3, atol=1e-5,
    )  # fmt: skip
passed("3.1")

# %% [markdown]
# ## What it forgets, and when
#
# How can a pair survive the words in between? One number decides both how much is forgotten and how much is written. The
# projection gives each token and head a number $z_t$ (with a bias), and
#
# $$\Delta_t = \mathrm{softplus}(z_t), \qquad a_t = e^{\Delta_t A}; \qquad
# \text{for } A = -1:\quad a_t = \frac{1}{1 + e^{z_t}} = 1 - \sigma(z_t).$$
#
# So $\Delta$ is a gate, as in an LSTM or a GRU (the case of Theorem 1 in Mamba, [arXiv 2312.00752](https://arxiv.org/abs/2312.00752), section 3.5).
# $\Delta \to 0$: the token is **skipped**, the state stays as it is. $\Delta$ large: the state is wiped and the token put in
# its place. This is the "selection" of selective state spaces. Colours below: the share of its state that a head of block 2
# forgets at each token.

# %%
z = torch.linspace(-6, 6, 7)
print(
    "exp(-softplus(z)) - (1 - sigmoid(z)):",
    (torch.exp(-F.softplus(z)) - (1 - torch.sigmoid(z))).abs().max().item(),
)
forgotten = 1 - scan.log_decay[0, :, 0].exp()
TokenStrip(labels, forgotten.tolist(), label="share of head 0's state forgotten at the token")

# %% [markdown]
# Half of what a head holds is gone after
#
# $$t_{1/2} = \frac{\ln 2}{-\,\overline{\log a}}$$
#
# tokens, if every token had the *mean* log decay of the text. The library measures this **half-life** at the tap `ssm.state`, which
# carries $\log a_t = \Delta_t A$. Here it is on held-out text of five kinds.

# %%
samples = read_sample_texts(model_directory("demo"))
DOMAINS = ("prose", "code", "facts", "chains", "recall")
number = 1 if quick() else 4
batch = tokenizer(
    [text for domain in DOMAINS for text in samples[domain][:number]],
    return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=256,
)  # fmt: skip
captured = capture_batch(
    model, batch["input_ids"], batch["attention_mask"], signals=["ssm"],
    domains=[domain for domain in DOMAINS for _ in range(number)],
)  # fmt: skip
records = [metrics.state_record(captured, block) for block in range(NUM_BLOCKS)]
for block in (0, 2):
    display(figures.half_life_by_domain(metrics.half_life_by_domain(records[block]), path_use=use))
display(figures.half_life(metrics.half_life(records[2]), path_use=use))

# %% [markdown]
# Two things to see. The half-life is a property of a head *on a text*, not of the head. And the bars of the last figure, the
# 5 and 95% quantiles over tokens, span orders of magnitude: the mean describes hardly any token.
#
# ### Exercise 3.2: the half-life on some of the tokens
#
# Write `half_life(log_decay, counts)`: `log_decay` is `[L, H]`, `counts` a boolean `[L]`; return `[H]`, the half-life in
# tokens at the mean log decay of those tokens alone.


# %% tags=["exercise"]
def half_life(log_decay, counts):
    """[H] tokens until half is gone, at the mean log decay of the tokens that count."""
    # BEGIN SOLUTION: ln 2 over minus the mean of log_decay over the tokens that count
    return np.log(2) / -log_decay[counts].mean(dim=0)
    # END SOLUTION


# %% tags=["check"]
every = torch.ones(2, dtype=torch.bool)
halving = torch.full((2, 1), float(np.log(0.5)))
check_close(
    half_life(halving, every),
    [1.0],
    "A state that is halved at every token has a half-life of 1 token (ln 2, and a sign).",
)
uneven = torch.tensor([[-1.0], [-0.01]])
check_close(
    half_life(uneven, every), [np.log(2) / 0.505],
    "Average the log decays, then turn the mean into a half-life: a mean of half-lives is ruled by the longest.",
)  # fmt: skip
check_close(
    half_life(uneven, torch.tensor([False, True])), [np.log(2) / 0.01], "Use the tokens that count alone."
)
expected = metrics.half_life(records[2]).half_life
all_decays = torch.cat(
    [torch.tensor(d[:n]) for d, n in zip(records[2].decay, records[2].length, strict=True)]
)
check_close(
    half_life(all_decays, torch.ones(len(all_decays), dtype=torch.bool)), expected,
    "Over all tokens it should be the library's metric.", rtol=1e-3,
)  # fmt: skip
passed("3.2")

# %% tags=["predict"]
survives = predict(
    "In the recall problems 64 filler words stand between the pairs and the question. At the half-lives that block 2's "
    "heads have on the five domains above, how much of the pairs would be left at the question, and how much is?",
    [
        "little would be, and little is",
        "little would be, but most is",
        "most would be, and most is",
        "most would be, but little is",
    ],
)

# %%
first_filler = FIRST_PAIR + PAIR_TOKENS * NUM_PAIRS
mean_half_life = metrics.half_life(records[2]).half_life
gap = prompts.shape[1] - first_filler
would_be = 0.5 ** (gap / mean_half_life)
decays = torch.cat([scan_of(problem.prompt, 2).log_decay for problem in problems])  # [B, L, H]
kept = decays[:, first_filler:].sum(dim=1).exp().mean(dim=0)
print("half-life on the five domains (tokens):  ", mean_half_life.round(1).tolist())
print(f"left after {gap} tokens at that half-life:  ", would_be.round(2).tolist())
print("left, measured on the recall problems:   ", [round(k, 2) for k in kept.tolist()])
little, most = (float(np.median(each)) > 0.5 for each in (would_be, kept.numpy()))
survives.reveal(
    survives.options[{(False, False): 0, (False, True): 1, (True, True): 2, (True, False): 3}[little, most]],
    f"Medians over the heads: {np.median(would_be):.0%} would be left, {np.median(kept.numpy()):.0%} is. The filler is "
    "skipped. A half-life from other text says nothing about what the model has learned to keep.",
)
in_pair = (torch.arange(first_filler) - FIRST_PAIR) % PAIR_TOKENS
kinds = {
    "`recall:` at the start": slice(0, FIRST_PAIR),
    "names and `=`": (in_pair <= 4).nonzero()[FIRST_PAIR:, 0],
    "values": (in_pair == 5).nonzero()[:, 0][-NUM_PAIRS:],
    "the `;` after a value": torch.tensor(semicolons),
    "filler": slice(first_filler, -6),
}
for kind, places in kinds.items():
    share = 1 - decays[:, places].exp().mean(dim=(0, 1))
    print(f"forgotten per token at {kind:23s}", [f"{each:.1%}" for each in share.tolist()])

# %% [markdown]
# ## Is it there, and is it used?
#
# So far we looked. The matrix says that block 2 *reads* the pairs. It does not say that the answer depends on it: the output could be
# ignored, or another block could hold the pairs as well. The test is an **interchange**: run the prompt, but after token 63 put
# in one block's state from the donor, in which the same names have other values. Everything else (other blocks' states, keys and
# values of the attention, the text itself) still says the right value. Activation patching of states is also how Sharma et al.
# locate facts in Mamba ([arXiv 2404.03646](https://arxiv.org/abs/2404.03646)).
#
# We measure the **margin**: logit of the right value less that of the donor's value.

# %%
show_source(capture_state)
POSITION = (
    model.config.ssm_chunk_size - 1
)  # states can be written where a chunk ends: here in the middle of the filler


def margin(ids: Tensor, problem: Problem) -> float:
    """Logit of the prompt's value less the donor's, after the last token."""
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    return (logits[problem.right] - logits[problem.other]).item()


# %% tags=["predict"]
carrier = predict(
    "Whose state, taken from the donor, makes the model answer with the donor's value?",
    [
        "block 0's: the first to see the pairs",
        "block 2's",
        "block 5's: the last before the answer",
        "no single block's: they all hold a copy",
    ],
)

# %%
whole = np.array([margin(problem.prompt, problem) for problem in problems])
patched, differs = np.zeros((2, NUM_BLOCKS, len(problems)))
for block in range(NUM_BLOCKS):
    for n, problem in enumerate(problems):
        state = capture_state(model, problem.donor, block, POSITION)
        own = capture_state(model, problem.prompt, block, POSITION)
        differs[block, n] = (state - own).norm() / own.norm()
        with intervened(model, PatchState(block=block, position=POSITION, state=state)):
            patched[block, n] = margin(problem.prompt, problem)
effect = (whole - patched).mean(axis=1)

figure = make_subplots(
    rows=1, cols=2, subplot_titles=["the state differs", "the answer changes"], horizontal_spacing=0.14
)
blue, orange = figures.colours(2)
for column, (values, colour) in enumerate(((100 * differs, blue), (whole - patched, orange)), start=1):
    figure.add_trace(
        go.Bar(
            x=[str(block) for block in range(NUM_BLOCKS)], y=values.mean(axis=1), marker={"color": colour},
            error_y={"type": "data", "array": 1.96 * values.std(axis=1, ddof=1) / len(problems) ** 0.5},
        ),
        row=1, col=column,
    )  # fmt: skip
figure.update_xaxes(title_text="block")
figure.update_yaxes(title_text="|donor's - own| / |own| (%)", row=1, col=1)
figure.update_yaxes(title_text="fall of the margin (logits)", row=1, col=2)
figure.update_layout(showlegend=False)
finish(
    figure, title="A state can differ without consequence",
    subtitle=f"the donor's state after token {POSITION}; mean and 95% interval over {len(problems)} problems",
    theme="light", path="ssm", path_use=use, height=270,
)  # fmt: skip
display(figure)
top = int(effect.argmax())
alone = effect[top] > 0.8 * np.abs(effect).sum()
option = {0: 0, 2: 1, 5: 2}.get(top, 3) if alone else 3
carrier.reveal(
    carrier.options[option],
    f"The margin is {whole.mean():.1f} untouched and {patched[top].mean():.1f} with block {top}'s state from the donor; "
    f"the largest effect of any other block is {np.abs(np.delete(effect, top)).max():.2f}.",
)

# %% [markdown]
# On the left, the states of later blocks differ between the two texts as well. So the pairs could be *decoded* from them, by a
# linear probe for example. For the answer it makes no difference. Presence is not use; only the intervention tells them apart.
#
# Did block 2 settle it alone? The attention's keys and values were not exchanged and still hold the right value. We repeat the
# exchange without the attention of block 2 and without that of block 5.

# %%
for cut in ((), ("attention[2].cut()",), ("attention[5].cut()",)):
    margins = np.zeros((2, len(problems)))
    with intervened(model, *cut):
        for n, problem in enumerate(problems):
            state = capture_state(model, problem.donor, 2, POSITION)
            margins[0, n] = margin(problem.prompt, problem)
            with intervened(model, PatchState(block=2, position=POSITION, state=state)):
                margins[1, n] = margin(problem.prompt, problem)
    donor_wins = (margins[1] < 0).mean()
    print(
        f"{cut[0] if cut else 'all paths':20s} margin untouched {margins[0].mean():6.1f}, block 2 patched "
        f"{margins[1].mean():6.1f}; the donor's value beats the right one in {donor_wins:.0%} of {len(problems)}"
    )

# %% [markdown]
# The attention of block 5 is a second witness: without it the donor's state convinces the model completely. It is easily overlooked. Cut
# alone it takes a few logits from a large margin, and every answer stays right, because block 2 answers anyway.
#
# ### Exercise 3.3: which head carries it?
#
# Write `share_of_head(problem, block, head)`: swap *one head's* state at `POSITION` for the donor's, and return how far that moves the
# margin on the way from the prompt's to the donor's:
# $\dfrac{m(\text{prompt}) - m(\text{patched})}{m(\text{prompt}) - m(\text{donor})}$, where $m$ is `margin(ids, problem)`. It is 0 if nothing
# changes, 1 if the model answers as if it had read the donor. (The shares of the heads need not add up to that of the whole state: what
# follows is not linear.) `PatchState` takes `head=` and then a state of shape `[P, N]`.


# %% tags=["exercise"]
def share_of_head(problem, block, head):
    """Normalised effect of one head's state from the donor: 0 none, 1 all of it."""
    # BEGIN SOLUTION: capture the donor's state at POSITION, patch this head's, normalise the fall of the margin
    state = capture_state(model, problem.donor, block, POSITION)[head]
    with intervened(model, PatchState(block=block, position=POSITION, head=head, state=state)):
        changed = margin(problem.prompt, problem)
    untouched = margin(problem.prompt, problem)
    return (untouched - changed) / (untouched - margin(problem.donor, problem))
    # END SOLUTION


# %% tags=["check"]
problem = problems[0]
_, before = read_on(model, problem.prompt[:, : POSITION + 1])
_, donor_before = read_on(model, problem.donor[:, : POSITION + 1])
ends = [margin(problem.prompt, problem), margin(problem.donor, problem)]


def through_the_cache(block: int, head: int) -> float:
    """The same by another way: mix the two caches, then read on."""
    mixed = with_memory_of(before, donor_before, "ssm", layer=block, head=head)
    logits = read_on(model, problem.prompt[:, POSITION + 1 :], mixed, last_only=True)[0][0, -1]
    return (ends[0] - (logits[problem.right] - logits[problem.other]).item()) / (ends[0] - ends[1])


answer = share_of_head(problem, 2, 3)
check(answer is not None, "Does the function return the share?")
check(
    abs(answer) < 1.5,
    "Divide by m(prompt) - m(donor): the share is 1 where the model answers as for the donor.",
)
check(
    abs(answer) > 1e-3,
    "Nothing moved: the state must be the donor's, and the margin be measured inside the `with`.",
)
check(answer > 0, "The donor's state moves the answer towards the donor: check the signs.")
for block, head in ((2, 3), (2, 0), (0, 1)):
    check_close(
        share_of_head(problem, block, head), through_the_cache(block, head),
        "Capture at POSITION, not at the end; use the arguments `block` and `head`; put in that head's [P, N] alone.",
        rtol=1e-3, atol=2e-4,
    )  # fmt: skip
passed("3.3")

# %% [markdown]
# ## Used, but needed?
#
# The prototype's fast "SSM" is a gated depthwise convolution of width 8: it has no state. What would be lost without one? We
# write $\log a_t = -\infty$ at every $R$-th token, in all blocks, so that no state reaches back further than $R$ tokens. The attention
# stays as it is, except in the last case, where that of block 5 is cut. Before you run it: how many of the four lines will leave the floor?

# %%
PERIODS = (1, 8, 32, 64)


def loss_with_resets(ids: Tensor, period: int | None, positions: slice) -> float:
    """Mean loss (nats) of the tokens predicted at `positions`, with every state emptied each `period` tokens."""

    def empty(_tap, _inputs, summary):
        decay = summary.decay.clone()
        decay[:, torch.arange(decay.shape[1]) % period == 0] = -torch.inf
        return summary._replace(decay=decay)

    taps = [block.ssm.state for block in model.model.layers] if period else []
    handles = [tap.register_forward_hook(empty) for tap in taps]
    with torch.no_grad():
        log_probabilities = model(ids).logits[:, :-1].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return -log_probabilities.gather(-1, ids[:, 1:, None])[:, positions].mean().item()


prose, code = (
    torch.cat([encode(text)[:, :256] for text in samples[domain][: 2 * number]]) for domain in ("prose", "code")
)  # fmt: skip
answers = torch.cat([prompts, torch.tensor([[problem.right] for problem in problems])], dim=1)
CUT = "attention[5].cut()"
cases = {
    "prose": (prose, slice(None), ()),
    "code": (code, slice(None), ()),
    "recall, the answer": (answers, slice(-1, None), ()),
    "recall, attention of block 5 cut": (answers, slice(-1, None), (CUT,)),
}
figure = go.Figure()
for (name, (ids, positions, cut)), colour, symbol, dash in zip(
    cases.items(), figures.colours(4), SYMBOLS, ("solid", "dash", "dot", "dashdot"), strict=False
):
    untouched = loss_with_resets(ids, None, positions)
    with intervened(model, *cut):
        without_resets = loss_with_resets(ids, None, positions) - untouched
        rise = [loss_with_resets(ids, period, positions) - untouched for period in PERIODS]
    by_period = ", ".join(f"{period}: {nats:+.2f}" for period, nats in zip(PERIODS, rise, strict=True))
    print(f"{name:33s} no resets: {without_resets:+.2f}, every {by_period} nats")
    figure.add_trace(
        go.Scatter(
            x=PERIODS, y=rise, mode="lines+markers", name=f"{name} (n = {len(ids)})",
            line={"color": colour, "dash": dash}, marker={"symbol": symbol, "size": 10},
        )
    )  # fmt: skip
figure.update_xaxes(type="log", tickvals=PERIODS, title_text="states emptied every R tokens (log scale)")
figure.update_yaxes(title_text="rise of the loss (nats per token)", rangemode="tozero")
figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"})
finish(
    figure, title="What it costs when the state reaches back R tokens at most",
    subtitle="against the untouched model; mean over the tokens of n texts, or over the answers to n problems",
    theme="light", path="ssm", path_use=use, height=330,
)  # fmt: skip
display(figure)

# %% [markdown]
# When the state of block 2 is there, the answer follows it, against the attention more often than not. Yet empty every state, and the attention
# answers as well. Either copy suffices, neither is necessary, and only taking both away shows what they carry. "Exchanging X changes the
# answer" and "without X the answer is lost" are two different claims; say which one you tested.
#
# (The weights were trained *with* a state. A model trained without one would lean on its attention from the start.)

# %% [markdown]
# ## Where this breaks
#
# - **$M$ stops at the scan.** The gate $z_t$, the norm and the output projection come after it, and $x_s$ is already a mixture of four tokens
#   and of all blocks below. A bright cell at token $s$ is about what stands *at* $s$, here a semicolon that knows a whole pair.
# - **Half-lives do not say how long the model remembers.** `hydra-lab probe state-horizon demo` replaces a token and follows the change: over the
#   24 heads the rank correlation of measured and predicted half-life is 0.11 (95%: -0.32 to 0.49), and a state stays changed 5 times as long as
#   its decay says, since the blocks below still differ. Only in block 0, which has none below, do the two agree.
# - **A patched state is a mixed input.** Block 2 says one thing, the text and the attention another. Here the donor differs in nothing but
#   the binding; with a donor of another length or topic the patch would measure the shock as well.
# - **Six pairs are easy.** How many pairs one state can hold, and whether the rest of the model still reads them at 16K tokens, is another question:
#   `hydra-lab probe distant-premise demo` finds that there the state no longer matters and the attention's selection decides.
# - The paper's prototype cannot be asked any of this: its fast path has no state.

# %% [markdown]
# ## Next
#
# - Lesson 4 takes the other reader of the past apart: sparse attention, the second copy above.
# - `hydra-lab probe induction demo` and `hydra-lab probe state-horizon demo` ask these questions over many texts, with their error rates.
# - `hydra-lab dashboard` shows half-lives and effective attention for text of your own.

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
# # 2. State spaces: recurrence, matrix, chunks
#
# **Goal:** write the Mamba-2 recurrence in its three equal forms, and say what each costs and why the chunked one is run · **Minutes:** 45 · **Difficulty:** medium
#
# You need PyTorch, lesson 1, and attention as a matrix.
#
# The `ssm` path is in every block of Hydra and costs most to cut. At its heart is one linear recurrence per head, taken from
# Mamba-2 (Dao and Gu, *Transformers are SSMs*, [arXiv 2405.21060](https://arxiv.org/abs/2405.21060)). The paper's point is
# that this recurrence *is* a matrix of attention weights without the softmax, and that neither form is the one to run: cut the
# text into chunks, use the matrix inside a chunk and the recurrence between them. We build all three and hold each against
# the library, on numbers that the trained demo feeds its own scan.

# %%
import time

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from IPython.display import display
from plotly.subplots import make_subplots
from torch.utils.flop_counter import FlopCounterMode

import hydra_lab
from hydra_lab import figures
from hydra_lab.accounting import state_bytes
from hydra_lab.attribution import ssm_attention
from hydra_lab.chunks import Span
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.figures.theme import finish, log_ticks
from hydra_lab.loading import model_directory
from hydra_lab.ops.causal_conv import causal_conv
from hydra_lab.ops.ssd import reference, ssd

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
text = read_sample_texts(model_directory("demo"))["code"][0]
ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]

# %% [markdown]
# ## From a differential equation to a recurrence
#
# A state-space model in continuous time has a state $h$ that decays at a rate $A < 0$ and is driven by an input $x$:
#
# $$h'(t) = A\,h(t) + B\,x(t), \qquad y(t) = C^\top h(t) + D\,x(t)$$
#
# A text has tokens, not seconds. Let token $t$ hold its input for a time $\Delta_t$ (in code: `dt`). The equation is then solved exactly
# (zero-order hold; Mamba, [arXiv 2312.00752](https://arxiv.org/abs/2312.00752), section 2):
#
# $$h_t = e^{\Delta_t A} h_{t-1} + \frac{e^{\Delta_t A} - 1}{A}\, B_t x_t \;\approx\; e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t$$
#
# The right-hand side is what Mamba-2 and this library run: the decay is exact, the input is taken to first order in
# $\Delta A$. In both Mambas $\Delta_t$, $B_t$ and $C_t$ are computed from the token. A token with $\Delta_t = 0$ changes
# nothing, neither decay nor input; one with a large $\Delta_t$ forgets the past and writes itself. That is the selection.
#
# Move the step. The line is the exact state under an input that is 1 for one second and then 0.


# %%
def draw_steps(step: float, rate: float) -> None:
    """The exact state and both recurrences, for steps of `step` seconds and a decay `rate` per second."""
    seconds = np.linspace(0, 3, 301)
    exact = (1 - np.exp(rate * np.minimum(seconds, 1))) / -rate * np.exp(rate * np.maximum(seconds - 1, 0))
    count = int(3 / step)
    states = {"zero-order hold": [0.0], "first order (Mamba-2)": [0.0]}
    gains = {"zero-order hold": (np.exp(step * rate) - 1) / rate, "first order (Mamba-2)": step}
    for t in range(count):
        for name, state in states.items():
            state.append(np.exp(step * rate) * state[-1] + gains[name] * (t * step < 1 - 1e-9))
    figure = go.Figure(go.Scatter(x=seconds, y=exact, name="exact", line={"color": "black"}))
    for index, (name, state) in enumerate(states.items()):
        marker = {"color": figures.colours(2)[index], "symbol": ("circle", "diamond-open")[index], "size": 8}
        figure.add_scatter(x=step * np.arange(count + 1), y=state, name=name, mode="markers", marker=marker)
    figure.update_xaxes(title_text="time (seconds)")
    figure.update_yaxes(title_text="state h")
    finish(
        figure,
        title="The first-order input overshoots when a step is long beside 1/|A|",
        subtitle=f"dt A = {step * rate:.2f}; B = 1, one state",
        theme="light",
        height=260,
    )
    display(figure)


step = ipywidgets.SelectionSlider(options=[0.01, 0.05, 0.1, 0.2, 0.25, 0.5], value=0.2, description="dt")
rate = ipywidgets.FloatSlider(value=-3.0, min=-10.0, max=-0.5, step=0.5, description="A")
display(step, rate, ipywidgets.interactive_output(draw_steps, {"step": step, "rate": rate}))

# %% [markdown]
# Where does the trained model stand? `scan_inputs` gives what a path's recurrence works on, after the projection and the
# short convolution. We take it for all blocks on one text and ask how much the first-order input exceeds the exact one.

# %%
with torch.no_grad():
    streams = model(ids, output_hidden_states=True).hidden_states
    scans = [
        block.ssm.scan_inputs(block.norm(x), Span(ids.shape[1]))
        for block, x in zip(model.model.blocks, streams, strict=False)
    ]
rates = [-block.ssm.A_log.detach().exp() for block in model.model.blocks]
print(
    {name: list(value.shape) for name, value in scans[0]._asdict().items()},
    "(batch, token, head or group, size)",
)
print("block  |dt A|: median, 99th percentile   first order over exact: median, 99th percentile")
for index, (inputs, A) in enumerate(zip(scans, rates, strict=True)):
    decay = (inputs.dt * -A).double()
    excess = decay / -torch.expm1(-decay)
    low, high = (torch.quantile(decay, q).item() for q in (0.5, 0.99))
    print(
        f"{index:5d}  {low:14.3f}, {high:15.3f} {excess.median().item():24.2f}, {torch.quantile(excess, 0.99).item():15.2f}"
    )

# %% [markdown]
# On the tokens that forget most, the two differ a good deal. That is no error of the model: it was trained with the first-order
# form, which is part of its definition. But a "continuous-time" reading of its weights would be off by that factor.
#
# ## The recurrence
#
# Each head has a state of $P \times N$ numbers ($P$ channels, $N$ numbers each), so $x_t \in \mathbb{R}^P$ enters as an outer product:
#
# $$h_t = e^{\Delta_t A}\, h_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = h_t C_t + D\, x_t$$
#
# (arXiv 2405.21060, section 6.) One step of the library's oracle, all heads at once:

# %%
show_source(reference.ssd_step)

# %% [markdown]
# ### Exercise 2.1: the recurrence of one head
#
# Write `scan(x, dt, A, B, C, D)` for one head: `x` `[L, P]`, `dt` `[L]`, `A` and `D` single numbers, `B` and `C` `[L, N]`. It returns `y`
# `[L, P]`. The state starts at zero. A loop over the tokens is right.


# %% tags=["exercise"]
def scan(x, dt, A, B, C, D):
    """Outputs of one head's recurrence, [L, P]."""
    # BEGIN SOLUTION: loop: decay the state, add dt times the outer product of x and B, read it with C, add D x
    state = x.new_zeros(x.shape[1], B.shape[1])
    outputs = []
    for t in range(x.shape[0]):
        state = torch.exp(dt[t] * A) * state + dt[t] * torch.outer(x[t], B[t])
        outputs.append(state @ C[t] + D * x[t])
    return torch.stack(outputs)
    # END SOLUTION


# %% tags=["check"]
generator = torch.Generator().manual_seed(0)
x, B, C = (torch.randn(40, size, generator=generator) for size in (6, 5, 5))
dt, A, D = torch.rand(40, generator=generator), torch.tensor(-0.7), torch.tensor(0.3)


def library_scan(x, dt, A, B, C):
    """The library's oracle on one head, without the skip."""
    one_head = (x[None, :, None], dt[None, :, None], A[None], B[None, :, None], C[None, :, None])
    return ssd(*one_head, backend="reference").y[0, :, 0]


read = library_scan(x, dt, A, B, C)
expected = read + D * x
y = scan(x, dt, A, B, C, D)
check(y is not None, "Does the function return the outputs?")
check(y.shape == x.shape, f"There is one output of size P per token: {list(x.shape)}.")
own = (dt * (B * C).sum(dim=-1))[:, None] * x
held = torch.expm1(dt * A) / (dt * A)
for wrong, hint in (
    (read, "D x is missing."),
    (
        (read - own) / torch.exp(dt * A)[:, None] + D * x,
        "You read the state before token t is in it: y_t needs h_t.",
    ),
    (library_scan(x / dt[:, None], dt, A, B, C) + D * x, "The input is not multiplied by dt."),
    (library_scan(x * dt[:, None], torch.ones(40), A, B, C) + D * x, "The decay is exp(dt A), not exp(A)."),
    (
        library_scan(x * torch.exp(dt * A)[:, None], dt, A, B, C) + D * x,
        "Decay the old state alone, then write token t.",
    ),
    (
        library_scan(x * held[:, None], dt, A, B, C) + D * x,
        "That is zero-order hold. Mamba-2 writes dt x B^T.",
    ),
):
    check(not torch.allclose(y, wrong, rtol=1e-3, atol=1e-3), hint)
check_close(y, expected, "Compare your loop with the two equations, line by line.", rtol=1e-4, atol=1e-5)
passed("2.1")

# %% [markdown]
# On the demo's own numbers (block 2), the library's fast path gives what this loop gives. And a token with `dt = 0` might as
# well not be there:

# %%
LAYER = 2
block_scan, block_rate = scans[LAYER], rates[LAYER]
skip = model.model.blocks[LAYER].ssm.D.detach()
by_step = ssd(*block_scan[:2], block_rate, *block_scan[2:], D=skip, backend="reference")
fast = ssd(*block_scan[:2], block_rate, *block_scan[2:], D=skip, backend="torch")
size = by_step.y.abs().max()
print(f"fast path and oracle differ by {(fast.y - by_step.y).abs().max() / size:.1e} of the largest output")

dt_without = block_scan.dt.clone()
dt_without[:, 100] = 0.0
kept = [t for t in range(ids.shape[1]) if t != 100]
skipped = ssd(block_scan.x, dt_without, block_rate, *block_scan[2:]).y[:, kept]
absent = ssd(
    *(each[:, kept] for each in block_scan[:2]), block_rate, *(each[:, kept] for each in block_scan[2:])
).y
print(f"token 100 with dt = 0, or not there at all: {(skipped - absent).abs().max() / size:.1e} apart")

# %% [markdown]
# ## The matrix
#
# Unroll the recurrence, with $a_t = \Delta_t A$ the log decay:
#
# $$y_t = \sum_{s \le t} M_{ts}\, x_s + D x_t, \qquad M_{ts} = (C_t \cdot B_s)\; L_{ts}\; \Delta_s, \qquad
# L_{ts} = \exp\Big(\sum_{r=s+1}^{t} a_r\Big)$$
#
# (arXiv 2405.21060, section 3.) Read $C$ as queries, $B$ as keys, $x$ as values: this is attention without a softmax, masked by $L$
# instead of by a triangle of ones. With all $a = 0$ it is causal linear attention ([arXiv 2006.16236](https://arxiv.org/abs/2006.16236)).
# Token $s$ is written before it decays, so the sum begins at $s + 1$ and the diagonal of $L$ is 1.
#
# ### Exercise 2.2: the decay matrix
#
# Write `decay_matrix(log_decay)` for `log_decay` $a$ of shape `[L]`: the matrix $L$, `[L, L]`, reading position first, zero above the
# diagonal. It must stay finite, gradient included, when the decays are strong ($a_t = -50$): a training run meets such tokens.


# %% tags=["exercise"]
def decay_matrix(log_decay):
    """L_ts = exp(sum of log_decay over s+1..t) for s <= t, else 0; [L, L]."""
    # BEGIN SOLUTION: differences of running sums, -inf above the diagonal before the exponential
    passed_until = log_decay.cumsum(dim=0)
    log_kept = passed_until[:, None] - passed_until[None, :]
    future = torch.ones_like(log_kept, dtype=torch.bool).triu(1)
    return log_kept.masked_fill(future, -torch.inf).exp()
    # END SOLUTION


# %% tags=["check"]
weak = -torch.rand(12, generator=torch.Generator().manual_seed(1))
kept = decay_matrix(weak)
check(kept is not None and kept.shape == (12, 12), "L is square, one row per reading token: [L, L].")
check(bool(kept.diagonal().any()), "The diagonal is 0: is the exponential missing?")
check(bool((kept.triu(1) == 0).all()), "Above the diagonal (the future) L is 0.")
check(
    bool((kept.diagonal() == 1).all()),
    "The diagonal is 1: a token is written before it decays, so the sum starts at s + 1.",
)
check(
    not np.isclose(kept[1, 0].item(), weak[0].exp().item()),
    "From token 0 to 1 it is the decay of token 1 that counts.",
)
direct = torch.stack(
    [torch.stack([weak[s + 1 : t + 1].sum().exp() * (s <= t) for s in range(12)]) for t in range(12)]
)
check_close(kept, direct, "L_ts = exp(a_(s+1) + ... + a_t).", rtol=1e-4)
strong = torch.full((64,), -50.0, requires_grad=True)
kept = decay_matrix(strong)
check(
    kept.isfinite().all(),
    "Not finite at strong decays: exp of the upper half overflows, and inf * 0 is nan. Mask before exp.",
)
kept.sum().backward()
check(
    strong.grad.isfinite().all(),
    "The gradient is not finite: mask the exponent (with -inf), not what exp made of it.",
)
passed("2.2")

# %% [markdown]
# `ssm_attention` builds $M$ for any text and block. Its output is that of the recurrence:

# %%
matrices = ssm_attention(model, ids, LAYER)
output = torch.from_numpy(matrices.output()).transpose(1, 2)
print(
    f"M x + D x and the recurrence differ by {(output - by_step.y).abs().max() / size:.1e} of the largest output"
)

# %% [markdown]
# One trap is in the running sums. They grow along the text while what counts is the difference of two of them, so float32
# loses digits of every later decay. The library sums in float64 and starts anew in each chunk. The error of the decay
# from one token to the next, for decays up to $e^{-20}$, by distance from the start of the sum:

# %%
log_decay = -20 * torch.rand(100_000, generator=torch.Generator().manual_seed(2))
differences = log_decay.cumsum(dim=0).diff()
error = torch.expm1((differences.double() - log_decay[1:].double()).abs())
for tokens in (64, 1_000, 10_000, 100_000 - 1):
    print(
        f"{tokens:6d} tokens into a float32 sum the decay is off by up to {error[tokens - 63 : tokens].max():.1e} of itself"
    )

# %% [markdown]
# ## What the matrix cannot be
#
# Take the block of $M$ through which the second half of the text (128 tokens) reads the first half: $128 \times 128$ numbers.
# Each head's state has $N = 64$ numbers per channel.

# %% tags=["predict"]
rank = predict(
    "What is the rank of that 128 x 128 block of M, for the slowest head of block 2?",
    ["1, like the decays alone", "64", "128, since every entry is another number"],
)

# %%
half = ids.shape[1] // 2
slowest = int((block_scan.dt[0] * -block_rate).median(dim=0).values.argmin())
C, B = (each[0, :, 0].double() for each in (block_scan.C, block_scan.B))
decay = (block_scan.dt * block_rate)[0, :, slowest].double().cumsum(dim=0)
past = torch.ones(256, 256, dtype=torch.bool).tril()
kept = (decay[:, None] - decay[None]).masked_fill(~past, -torch.inf).exp()
softmax = (C @ B.T / C.shape[1] ** 0.5).masked_fill(~past, -torch.inf).softmax(dim=-1)
lower = {
    "M of the head": (C @ B.T) * kept * block_scan.dt[0, :, slowest].double(),
    "its decays L alone": kept,
    "softmax over the same C and B": softmax,
}
singular = {name: torch.linalg.svdvals(matrix[half:, :half]) for name, matrix in lower.items()}
singular = {name: (values / values[0]).clamp(min=1e-20) for name, values in singular.items()}
figure = go.Figure()
for index, (name, values) in enumerate(singular.items()):
    marker = {"color": figures.colours(3)[index], "symbol": ("circle", "square", "diamond")[index], "size": 5}
    figure.add_scatter(x=list(range(1, half + 1)), y=values, name=name, mode="markers", marker=marker)
figure.add_vline(x=block_scan.B.shape[-1] + 0.5, line={"color": "grey", "dash": "dot"}, annotation_text="N")
figure.update_xaxes(title_text="index of the singular value")
figure.update_yaxes(title_text="singular value over the largest", type="log", dtick=4, exponentformat="power")
finish(
    figure,
    title="All that one half passes to the other goes through N numbers per channel",
    subtitle=f"second half reading the first, {half} tokens each; head {slowest} of block {LAYER}, one text",
    theme="light",
    height=330,
)
display(figure)
ranks = {name: int((values > 1e-12).sum()) for name, values in singular.items()}
rank.reveal(
    rank.options[0 if ranks["M of the head"] == 1 else 1 if ranks["M of the head"] == 64 else 2],
    f"Singular values above 1e-12 of the largest: {ranks}. Above 0.001 of it M has {int((singular['M of the head'] > 1e-3).sum())}.",
)

# %% [markdown]
# Matrices whose every block below the diagonal has rank at most $N$ are called *semiseparable*. Two readings of that one fact:
#
# - It is the limit. Whatever the second half wants from the first must fit into the state. The softmax of the same
#   products has no such limit, and pays for it with a cache that grows.
# - It is the speed. A block of rank $N$ is two thin factors, $(C\,\cdot)$ and $(\cdot\, B)$, with the state in between. Nobody needs to
#   build it.
#
# ## Chunks
#
# So cut the text into chunks of $T$ tokens. On the diagonal the blocks of $M$ are built; below it they go through the states. With
# $h$ the state that enters a chunk and $\sigma_i = a_1 + \dots + a_i$ the running sum of the log decays *within* it:
#
# $$y_i = \underbrace{\sum_{j \le i} (C_i \cdot B_j)\, e^{\sigma_i - \sigma_j} \Delta_j x_j}_{\text{within the chunk: matrix}}
# + \underbrace{e^{\sigma_i} h\, C_i}_{\text{from before}} + D x_i, \qquad
# h' = e^{\sigma_T} h + \underbrace{\sum_j e^{\sigma_T - \sigma_j} \Delta_j\, x_j B_j^\top}_{\text{what the chunk writes}}$$
#
# (section 6 of the paper, and `hydra_lab/ops/ssd/README.md`.) All but the recurrence $h \to h'$ is matrix products, the same for
# every chunk, so they all run at once. What is left to do in order is $L/T$ steps instead of $L$.
#
# ### Exercise 2.3: pass the states
#
# Write `entering_states(x, dt, log_decay, B, size)` for one head: `x` `[L, P]`, `dt` and `log_decay` `[L]`, `B` `[L, N]`, `L` a multiple of
# the chunk size `size`. It returns the state that *enters* each chunk, `[L / size, P, N]`, the first one zero. Loop over chunks, not
# over tokens.


# %% tags=["exercise"]
def entering_states(x, dt, log_decay, B, size):
    """The state before each chunk's first token, [L / size, P, N]."""
    # BEGIN SOLUTION: per chunk: note the state; decay it by the whole chunk; add each token's write, decayed to the end
    state = x.new_zeros(x.shape[1], B.shape[1])
    entering = []
    for start in range(0, x.shape[0], size):
        here = slice(start, start + size)
        passed_until = log_decay[here].cumsum(dim=0)
        to_end = torch.exp(passed_until[-1] - passed_until) * dt[here]
        entering.append(state)
        state = torch.exp(passed_until[-1]) * state + (x[here] * to_end[:, None]).T @ B[here]
    return torch.stack(entering)
    # END SOLUTION


# %% tags=["check"]
SIZE = 32
x, dt, B = block_scan.x[0, :, slowest], block_scan.dt[0, :, slowest], block_scan.B[0, :, 0]
log_decay = dt * block_rate[slowest]
ends = ssd(*block_scan[:2], block_rate, *block_scan[2:], chunk_size=SIZE, chunk_states=True).chunk_states[
    0, :, slowest
]
expected = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
entering = entering_states(x, dt, log_decay, B, SIZE)
check(
    entering is not None and entering.shape == expected.shape, f"One state per chunk: {list(expected.shape)}."
)
check(
    not torch.allclose(entering, ends, rtol=1e-3, atol=1e-4),
    "These are the states that leave: note it before you update it.",
)
check(bool((entering[0] == 0).all()), "Nothing comes before the first chunk: its state is zero.")
first = slice(0, SIZE)
passed_until = log_decay[first].cumsum(dim=0)
for factor, hint in (
    (
        torch.exp(passed_until) * dt[first],
        "A write at j decays from j to the chunk's end: exp(sigma_T - sigma_j), not exp(sigma_j).",
    ),
    (torch.exp(passed_until[-1] - passed_until), "The writes are not multiplied by dt."),
    (
        torch.exp(passed_until[-1] - passed_until + log_decay[first]) * dt[first],
        "A token's own decay does not touch its own write: the sum starts at j + 1.",
    ),
    (dt[first], "What a chunk writes has decayed by its end: the factor exp(sigma_T - sigma_j) is missing."),
):
    check(
        not torch.allclose(entering[1], (x[first] * factor[:, None]).T @ B[first], rtol=1e-3, atol=1e-5), hint
    )
alone = expected[2] - torch.exp(log_decay[SIZE : 2 * SIZE].sum()) * expected[1]
check(
    not torch.allclose(entering[2], alone, rtol=1e-3, atol=1e-4),
    "Only the last chunk is in your state: carry the earlier ones over, decayed.",
)
check(
    not torch.allclose(entering[2], alone + expected[1], rtol=1e-3, atol=1e-4),
    "The old state must decay by the whole chunk, exp(sigma_T).",
)
check_close(entering, expected, "Compare with the formula of h'.", rtol=1e-3, atol=1e-4)
passed("2.3")

# %% [markdown]
# In the library this step is an operation of its own, which the workspace and the experts' router use too:

# %%
show_source(reference.state_passing)

# %% [markdown]
# The rest is two products per chunk. Here is the whole algorithm with the library's own states, checked against the oracle:

# %%
SIZE = 64
x, dt = block_scan.x[0, :, slowest], block_scan.dt[0, :, slowest]
B, C = block_scan.B[0, :, 0], block_scan.C[0, :, 0]
states = ssd(*block_scan[:2], block_rate, *block_scan[2:], chunk_size=SIZE, chunk_states=True).chunk_states[
    0, :, slowest
]
pieces, triangle = [], torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
for chunk, start in enumerate(range(0, len(x), SIZE)):
    here = slice(start, start + SIZE)
    passed_until = (dt[here] * block_rate[slowest]).cumsum(dim=0)
    kept = (passed_until[:, None] - passed_until[None]).masked_fill(~triangle, -torch.inf).exp()
    piece = ((C[here] @ B[here].T) * kept * dt[here]) @ x[here] + skip[slowest] * x[here]
    if chunk:
        piece = piece + torch.exp(passed_until)[:, None] * (C[here] @ states[chunk - 1].T)
    pieces.append(piece)
difference = (torch.cat(pieces) - by_step.y[0, :, slowest]).abs().max()
print(f"chunks of {SIZE}: {difference / size:.1e} of the largest output away from the recurrence")

# %% [markdown]
# Where the two parts lie in the matrix: above the white steps it is built, chunk by chunk; all that lies below them passes
# through three states.

# %%
shown = matrices.normalised()[0, slowest]
chunk_of = np.arange(len(shown)) // SIZE
outside = (shown * (chunk_of[:, None] != chunk_of))[SIZE:].sum(axis=1).mean()
figure = go.Figure(
    go.Heatmap(
        z=np.where(np.tril(np.ones_like(shown)) > 0, shown, np.nan), zmin=0, zmax=float(np.quantile(shown[shown > 0], 0.99)),
        colorscale="Viridis", colorbar={"title": {"text": "share of<br>the row", "side": "top"}},
    )
)  # fmt: skip
for start in range(0, 256, SIZE):
    figure.add_shape(
        type="rect", x0=start - 0.5, x1=start + SIZE - 0.5, y0=start - 0.5, y1=start + SIZE - 0.5, line={"color": "white"}
    )  # fmt: skip
figure.update_xaxes(title_text="token that was written", showgrid=False, constrain="domain")
figure.update_yaxes(title_text="token that reads", autorange="reversed", showgrid=False, scaleanchor="x")
finish(
    figure,
    title=f"{outside:.0%} of what head {slowest} of block {LAYER} reads lies outside its own chunk",
    subtitle=f"|M|, each row divided by its sum; the share is a mean over the rows from {SIZE} on; colours end at the 99th percentile; one text of {len(x)} tokens",
    theme="light",
    height=430,
)
display(figure)

# %% [markdown]
# ## What it costs
#
# Count a multiplication or an addition as one FLOP. Per token, with $I = HP$ channels in $H$ heads, the plain loop needs $5IN$: decay
# the state, form the outer product, add it, and a product and a sum to read. Chunks, with $G$ groups that share $B$ and $C$, need
#
# $$\underbrace{2T(GN + I)}_{\text{within chunks}} + \underbrace{4IN}_{\text{into and out of states}} +
# \underbrace{2IN \min(L/T, 64)/T}_{\text{from state to state}}$$
#
# in this library. Small chunks make many states to pass (by a triangular product over up to 64 chunks at once), large ones large squares.

# %% tags=["predict"]
chunks_or_loop = predict(
    "2048 tokens, 4 heads of 64 channels, N = 64. How do chunks, at their best size, compare with the loop over tokens?",
    ["fewer FLOPs, and faster", "more FLOPs, and yet faster", "more FLOPs, and slower on a CPU"],
)

# %%
LENGTH, HEADS, CHANNELS, STATE = 2048, 4, 64, 64
INNER = HEADS * CHANNELS
SIZES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
generator = torch.Generator().manual_seed(0)
shapes = ((HEADS, CHANNELS), (1, STATE), (1, STATE))
x, B, C = (torch.randn(1, LENGTH, *shape, generator=generator) for shape in shapes)
dt = torch.rand(1, LENGTH, HEADS, generator=generator)


def milliseconds(runs: int, **options) -> float:
    """Time of the scan of all tokens, the best of several runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        with torch.no_grad():
            ssd(x, dt, -torch.ones(HEADS), B, C, **options)
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


counted = []
for chunk_size in SIZES:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ssd(x, dt, -torch.ones(HEADS), B, C, chunk_size=chunk_size)
    counted.append(counter.get_total_flops() / LENGTH)
passing = [2 * INNER * STATE * min(LENGTH // T, 64) / T for T in SIZES]
formula = [2 * T * (STATE + INNER) + 4 * INNER * STATE + more for T, more in zip(SIZES, passing, strict=True)]
print("the formula and torch's counter of matrix products agree:", np.allclose(formula, counted))
RUNS = 2 if quick() else 5
timed = [milliseconds(RUNS, chunk_size=chunk_size) for chunk_size in SIZES]
loop = (5 * INNER * STATE, milliseconds(1, backend="reference"))

figure = make_subplots(
    rows=1, cols=2, subplot_titles=["FLOPs per token", "time of the whole text"], horizontal_spacing=0.14
)
for column, values in enumerate((counted, timed), start=1):
    blue, orange = figures.colours(2)
    show = {"showlegend": column == 1, "row": 1, "col": column}
    figure.add_scatter(x=SIZES, y=values, name="chunks", mode="lines+markers", line={"color": blue}, **show)
    line = {"color": orange, "dash": "dash"}
    figure.add_scatter(
        x=[8, 2048], y=[loop[column - 1]] * 2, name="loop over tokens", mode="lines", line=line, **show
    )
    figure.update_yaxes(
        type="log",
        tickvals=log_ticks(min(*values, loop[column - 1]), max(*values, loop[column - 1])),
        col=column,
    )
figure.update_xaxes(title_text="chunk size T (tokens)", type="log", tickvals=SIZES)
figure.update_yaxes(title_text="FLOPs", col=1)
figure.update_yaxes(title_text="milliseconds", col=2)
finish(
    figure,
    title="Chunks pay more arithmetic for less waiting, and have a best size",
    subtitle=f"2048 random tokens, {HEADS} heads of {CHANNELS}, N = {STATE}; best of {RUNS} runs (the loop: one) on one thread here",
    theme="light",
    height=290,
)
display(figure)
fewest, fastest = int(np.argmin(counted)), int(np.argmin(timed))
fewer, faster = counted[fewest] < loop[0], timed[fastest] < loop[1]
chunks_or_loop.reveal(
    chunks_or_loop.options[2 if not faster else 0 if fewer else 1],
    f"The loop: {loop[0]:,} FLOPs per token, {loop[1]:,.0f} ms. Fewest FLOPs in chunks: {counted[fewest]:,.0f} at T = {SIZES[fewest]}. "
    f"Fastest: {timed[fastest]:.0f} ms at T = {SIZES[fastest]}. The whole text as one matrix: {counted[-1]:,.0f} FLOPs, {timed[-1]:.0f} ms.",
)

# %% [markdown]
# The loop does 2048 small things one after another, each waiting for the one before, and here it is a loop in Python as well.
# Matrix products do many things at once, on a CPU's vector units as on a GPU's.
#
# When the model writes, one token at a time, only the recurrence is left, and its state has one size for ever:

# %%
for length in (1_000, 16_000, 256_000):
    kept = state_bytes(model.config, length).by_component()
    print(
        f"{length:7,} tokens of context: ssm {kept['ssm'] / 1e6:.2f} MB, attention {kept['attention'] / 1e6:.2f} MB"
    )

# %% [markdown]
# ## What is lost without a state
#
# The fast "SSM" of the authors' prototype is a gated convolution of width 8. A convolution reads its last few inputs and
# nothing else. Here is how much an input weighs in the output some tokens later, for the heads of block 2 and for a
# convolution of that width with random weights.

# %%
weights = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
impulse = torch.zeros(1, 256, 1)
impulse[0, 0] = 1.0
lags = np.arange(128)
reach = {"convolution of width 8": causal_conv(impulse, weights, None)[0][0, lags, 0].abs().numpy()}
for head in matrices.heads:
    reach[f"ssm, head {head}"] = np.array(
        [np.abs(matrices.matrix[0, head].diagonal(-lag)).mean() for lag in lags]
    )
figure = go.Figure()
for index, (name, values) in enumerate(reach.items()):
    line = {
        "color": figures.colours(5)[index],
        "dash": ("solid", "dash", "dot", "dashdot", "longdash")[index],
    }
    figure.add_scatter(x=lags, y=np.where(values > 0, values / values.max(), np.nan), name=name, line=line)
figure.update_xaxes(title_text="tokens between writing and reading")
figure.update_yaxes(title_text="mean |weight|, over its largest", type="log", dtick=1, exponentformat="power")
finish(
    figure,
    title="A convolution ends where its window ends; a state fades",
    subtitle=f"block {LAYER}, means over one text of {ids.shape[1]} tokens; the convolution is exactly 0 from 8 tokens on",
    theme="light",
    height=300,
)
display(figure)

# %% [markdown]
# ## Where this breaks
#
# - **The state is small.** All that the past can tell the future passes through it, and most directions of that block of
#   $M$ are far weaker than the first few. Small is not useless: pairs to recall are held by the demo's states, not by its attention
#   (`hydra-lab probe induction demo`). Lesson 3 asks what else they hold.
# - **The forms are equal in exact arithmetic only.** Running sums of decays lose digits (above), and `exp` of the upper half
#   overflows. A kernel that passes a test with mild decays may fail with trained ones.
# - **FLOPs are not time.** The loop needs the fewest FLOPs and was far from the fastest, and the two curves need not have their
#   minimum at the same chunk size. On a GPU the tiles of its matrix units decide: the library's kernels work on at most 64
#   positions at a time for that reason.
# - **A name is no mechanism.** The prototype's fast "SSM" has no state: a convolution of width 8 carries nothing from 8 or more
#   tokens back within a block. Measure the reach before you reason about memory.

# %% [markdown]
# ## Next
#
# - Lesson 3 reads the same matrix as attention and asks what a state remembers. Lesson 6 meets the recurrence over chunks
#   again, in the workspace. Lesson 12 writes a kernel.
# - `hydra_lab/ops/ssd/README.md` has the backward pass and the kernels, `hydra-lab bench kernels` measures them.

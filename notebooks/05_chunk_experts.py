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
# # 5. Experts for whole chunks
#
# **Goal:** route chunks of tokens to experts, read the two router losses for what they are, and prove that a router does not see the future · **Minutes:** 40 · **Difficulty:** medium
#
# You need PyTorch, the transformer's feed-forward layer, and the block formula of lesson 1.
#
# A mixture of experts replaces one feed-forward layer by $E$ smaller ones and lets a router choose $K$ of them.
# Mixtral ([arXiv 2401.04088](https://arxiv.org/abs/2401.04088), section 2.1) chooses for every token. Hydra
# ([arXiv 2508.15099](https://arxiv.org/abs/2508.15099)) chooses once per **chunk** of tokens: the $K$ experts' weights are
# fetched once and serve the whole chunk as one matrix product. The price is that the choice is made when most of the
# chunk is not known yet. This lesson measures that price, and what happens when one refuses to pay it.

# %%
import math
import warnings

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from IPython.display import display
from plotly.subplots import make_subplots
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import hydra_lab
from hydra_lab import figures, metrics
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.figures.theme import finish
from hydra_lab.interventions import intervened
from hydra_lab.loading import model_directory
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.moe import MoEPath
from hydra_lab.ops.chunk_moe import chunk_moe
from hydra_lab.ops.chunk_moe import reference as chunk_moe_reference
from hydra_lab.path_use import read_path_use
from hydra_lab.widgets import RoutingLanes

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
config = model.config
SAMPLES = read_sample_texts(model_directory("demo"))
USE = read_path_use(model_directory("demo"))
CHUNK, EXPERTS, TOP_K = config.moe_chunk_size, config.moe_num_experts, config.moe_top_k


def sample(domain: str, number: int) -> torch.Tensor:
    """Token ids [512] of a held-out text of the demo."""
    return tokenizer(SAMPLES[domain][number], return_tensors="pt")["input_ids"][0]


print(f"blocks {config.moe_layers} have {EXPERTS} experts, {TOP_K} per chunk of {CHUNK} tokens")
print(USE.describe("moe"))

# %% [markdown]
# ## One decision per chunk
#
# Let $h_t$ be the path's input at token $t$ (already normalised), and chunk $c$ the tokens $cT, \dots, cT + T - 1$. The
# router sees what is known at the chunk's *first token*: that token, and an exponential average $m$ of the means of
# the chunks before it.
#
# $$m_c = \alpha\, m_{c-1} + (1 - \alpha)\, \bar h_c, \qquad u_c = [\,h_{cT} \,;\, \mathrm{norm}(m_{c-1})\,], \qquad
# z_c = W_r\, u_c, \qquad \mathcal{E}_c = \mathrm{top}_K(z_c)$$
#
# All tokens of the chunk use the experts $\mathcal{E}_c$. How much of each is up to the token:
#
# $$w_{t} = \mathrm{softmax}_{e \in \mathcal{E}_c}\big(z_{c,e} + (W_t h_t)_e\big), \qquad
# y_t = \sum_{e \in \mathcal{E}_c} w_{t,e}\; W^{\mathrm{down}}_e \big(\mathrm{silu}(g) \odot u\big), \quad
# [g; u] = W^{\mathrm{gate,up}}_e h_t$$
#
# $W_t$ gives every token a say in the weights, so that every token trains the router; it has none in the choice. The
# last equation is a function of its own in the library, one token and one expert at a time:

# %%
show_source(chunk_moe_reference.chunk_moe)

# %% [markdown]
# Do the equations describe the model? We take what enters block 0's experts on a text, compute the routing from the
# equations above, and compare it with what the model did.

# %%
moe = model.model.layers[0].moe
entered, left = [], []
hooks = [
    moe.register_forward_pre_hook(lambda _module, inputs: entered.append(inputs[0])),
    moe.register_forward_hook(lambda _module, _inputs, outputs: left.append(outputs[0])),
]
routing = hydra_lab.record(model, sample("code", 0)[None, : 4 * CHUNK])["layers.0.moe.routing"]
for hook in hooks:
    hook.remove()
hidden = entered[0][0]

with torch.no_grad():
    average, logits = torch.zeros(config.hidden_size), []
    for chunk in hidden.split(CHUNK):
        known = torch.cat([chunk[0], moe.average_norm(average)])
        logits.append(moe.router.weight @ known)
        average = config.moe_ema_decay * average + (1 - config.moe_ema_decay) * chunk.mean(dim=0)
    logits = torch.stack(logits)
    experts = logits.topk(TOP_K).indices
    scores = logits.repeat_interleave(CHUNK, dim=0) + hidden @ moe.token_router.weight.T
    weights = scores.gather(1, experts.repeat_interleave(CHUNK, dim=0)).softmax(dim=-1)
    update = chunk_moe(
        hidden[None], experts[None], weights[None], moe.gate_up_proj, moe.down_proj, chunk_size=CHUNK, backend="reference"
    )  # fmt: skip
print(f"experts by chunk: {experts.tolist()}; the model's own: {routing.experts[0].tolist()}")
pairs = {
    "logits": (logits, routing.logits[0]),
    "weights": (weights, routing.weights[0]),
    "output": (update, left[0]),
}
for what, (by_hand, by_model) in pairs.items():
    print(f"{what}: largest difference {(by_hand - by_model).abs().max():.1e}")

# %% [markdown]
# For the exercise and the tests below, small mixtures of experts with random weights:


# %%
def moe_path(seed: int, **fields: object) -> MoEPath:
    """A mixture of 4 experts on a stream of 32 channels, with random weights."""
    torch.manual_seed(seed)
    path = MoEPath(HydraConfig.from_preset("nano", **fields)).eval()
    for parameter in path.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return path


def routing_of(path: MoEPath, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the library decides for one row [L, D]: experts [C, K] and weights [L, K]."""
    seen = []
    hook = path.routing.register_forward_hook(lambda _module, _inputs, decision: seen.append(decision))
    with torch.no_grad():
        path(hidden[None], Span(len(hidden)), None)
    hook.remove()
    return seen[0].experts[0], seen[0].weights[0]


# %% [markdown]
# ### Exercise 5.1: route chunks from their first tokens
#
# Take the simpler router without the average (`moe_chunk_pooling="first"`): $u_c = h_{cT}$. Write
# `route(hidden, router, token_router, chunk_size, top_k)` for one row: `hidden` is `[L, D]`, both weights are `[E, D]`, and
# the last chunk may be shorter. Return `(experts, weights)`: `experts` is `[C, K]`, best first, and `weights` `[L, K]`.


# %% tags=["exercise"]
def route(hidden, router, token_router, chunk_size, top_k):
    """Experts [C, K] of each chunk and their weights [L, K] for each token."""
    # BEGIN SOLUTION: logits from the first tokens, top-k of them, then a softmax over the chosen of chunk + token logits
    logits = hidden[::chunk_size] @ router.T
    experts = logits.topk(top_k).indices
    chunk_of = torch.arange(len(hidden)) // chunk_size
    scores = logits[chunk_of] + hidden @ token_router.T
    return experts, scores.gather(1, experts[chunk_of]).softmax(dim=-1)
    # END SOLUTION


# %% tags=["check"]
for length, fields in ((16, {}), (29, {}), (29, {"moe_top_k": 3, "moe_chunk_size": 5})):
    path = moe_path(length, moe_chunk_pooling="first", **fields)
    hidden_LD = torch.randn(length, 32)
    expected_experts, expected_weights = routing_of(path, hidden_LD)
    given = route(hidden_LD, path.router.weight, path.token_router.weight, path.chunk_size, path.top_k)
    check(given is not None and len(given) == 2, "Return two tensors: the experts and the weights.")
    check(
        given[0].shape == expected_experts.shape,
        f"One row of experts per chunk: {length} tokens are {len(expected_experts)} chunks of {path.chunk_size}, the last "
        "one shorter.",
    )  # fmt: skip
    check(
        torch.equal(given[0], expected_experts),
        "Other experts than the library's. Only the chunk's first token chooses: no mean over the chunk, and the token "
        "router has no part in the choice.",
    )
    check(given[1].shape == expected_weights.shape, "Every token has its own weights: [L, K].")
    check_close(
        given[1].sum(dim=-1),
        torch.ones(length),
        "The weights of a token sum to 1: take the softmax over the chosen experts alone, after choosing.",
    )
    check_close(
        given[1], expected_weights, "Add the token's own logits to its chunk's, at the chosen experts.", rtol=1e-4
    )  # fmt: skip
passed("5.1")

# %% [markdown]
# With chunks of one token and $W_t = 0$ nothing of Hydra is left: it is Mixtral's layer. The tests hold the library to
# transformers' implementation; here is the comparison.

# %%
ours = moe_path(0, moe_chunk_size=1, moe_chunk_pooling="first")
torch.nn.init.zeros_(ours.token_router.weight)
sizes = {"hidden_size": 32, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
theirs = MixtralSparseMoeBlock(MixtralConfig(**sizes, experts_implementation="eager")).eval()
theirs.load_state_dict(
    {
        "gate.weight": ours.router.weight,
        "experts.gate_up_proj": ours.gate_up_proj,
        "experts.down_proj": ours.down_proj,
    }
)
noise = torch.randn(2, 37, 32)
with torch.no_grad():
    difference = (ours(noise, Span(37), None)[0] - theirs(noise)).abs().max()
print(f"largest difference from MixtralSparseMoeBlock: {difference:.1e}")

# %% [markdown]
# ## What a decision saves
#
# Only the chosen experts are computed. (The paper's prototype computes all of them for all tokens and then multiplies
# most by zero: nothing is saved.) PyTorch counts the operations:

# %%
for count in (TOP_K, EXPERTS):
    chosen = torch.arange(count).expand(1, 4, count)
    even = torch.full((1, 4 * CHUNK, count), 1 / count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chunk_moe(hidden[None], chosen, even, moe.gate_up_proj, moe.down_proj, chunk_size=CHUNK)
    print(f"{count} of {EXPERTS} experts: {counter.get_total_flops() / len(hidden):,.0f} FLOPs per token")

# %% [markdown]
# ## The price: deciding early
#
# Below, a text turns from prose into code. Each cell is a chunk with its experts; point at it for its text. Move the
# slider: the turn falls at another place of its chunk, and the chunk in which it falls keeps the experts of the prose
# that it began with.

# %%
prose, code = sample("prose", 1), sample("code", 3)


def draw_turn(offset: int) -> None:
    """The lanes of a text whose code begins `offset` tokens after a chunk does."""
    ids = torch.cat([prose[: 4 * CHUNK + offset], code[: 6 * CHUNK]])
    display(RoutingLanes.of_capture(capture_batch(model, ids[None]), [tokenizer.decode(i) for i in ids]))


offset = ipywidgets.IntSlider(max=CHUNK - 1, description="tokens late", continuous_update=False)
display(offset, ipywidgets.interactive_output(draw_turn, {"offset": offset}))

# %% [markdown]
# Even when the code begins exactly with a chunk, block 0 does not switch at once: the average $m$ remembers the prose.
# Does that matter? We force block 0 to the two experts that it uses most on pure code, from the first chunk of code on.

# %% tags=["predict"]
gain_of_switching = predict(
    "Four chunks of prose, then code. What does the model gain in the first chunk of code if block 0 takes the code's "
    "experts at once?",
    [
        "nothing: below 0.05 nats per token",
        "a little: 0.05 to 0.3 nats per token",
        "much: more than 0.3 nats per token",
    ],
)

# %%
NUM_TEXTS = 8 if quick() else 12
BEFORE, AFTER = 4, 5


def loss_by_chunk(ids: torch.Tensor, *changes: str) -> torch.Tensor:
    """Mean loss of each chunk's tokens, [B, C], nats per token; the very first token has none."""
    with intervened(model, *changes), torch.no_grad():
        log_probabilities = model(ids).logits[:, :-1].log_softmax(dim=-1)
    loss = -log_probabilities.gather(2, ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(loss, (1, 0), value=torch.nan).unflatten(1, (-1, CHUNK)).nanmean(dim=2)


def experts_of_block_0(ids: torch.Tensor) -> torch.Tensor:
    """[B, C, K]"""
    return hydra_lab.record(model, ids, taps="layers.0.moe.routing")["layers.0.moe.routing"].experts


code_of = torch.stack([sample("code", i) for i in range(NUM_TEXTS)])
prose_of = torch.stack([sample("prose", i) for i in range(NUM_TEXTS)])
turning = torch.cat([prose_of[:, : BEFORE * CHUNK], code_of[:, : AFTER * CHUNK]], dim=1)
on_code = experts_of_block_0(code_of[:, : (BEFORE + AFTER) * CHUNK])[:, BEFORE:]
favourites = torch.bincount(on_code.flatten(), minlength=EXPERTS).topk(TOP_K).indices.tolist()
share = torch.isin(experts_of_block_0(turning), torch.tensor(favourites)).float().mean(dim=(0, 2))

own_loss = loss_by_chunk(turning)
forced = [*[[]] * BEFORE, *[favourites] * AFTER]  # [] leaves a chunk to the router
saved = own_loss - loss_by_chunk(turning, f"moe[0].route(experts={forced})")
mean, error = saved.mean(dim=0), saved.std(dim=0) / math.sqrt(NUM_TEXTS)
on_prose = loss_by_chunk(turning, f"moe[0].force(experts={favourites})") - own_loss

figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
figure.add_bar(x=list(range(-BEFORE, AFTER)), y=100 * share, marker_color=figures.colours(1)[0], row=1, col=1)
figure.add_scatter(
    x=list(range(AFTER)),
    y=mean[BEFORE:],
    error_y={"array": error[BEFORE:]},
    marker={"size": 9, "color": figures.colours(2)[1]},
    row=2,
    col=1,
)
figure.update_yaxes(title_text="% of choices", range=[0, 100], row=1, col=1)
figure.update_yaxes(title_text="nats per token", rangemode="tozero", row=2, col=1)
figure.update_xaxes(title_text=f"chunks of {CHUNK} tokens since the code began", dtick=1, row=2, col=1)
figure.update_layout(showlegend=False)
finish(
    figure,
    title=f"Slow to turn from prose to code: experts {favourites} of block 0",
    subtitle=f"top: their share of the router's own choices; bottom: loss saved by forcing them from chunk 0 on<br>mean of "
    f"{NUM_TEXTS} texts, bars one standard error",
    theme="light",
    path="moe",
    layer=0,
    path_use=USE,
    height=340,
)

# %%
first = mean[BEFORE].item()
print(
    f"control: forced on the prose, the same experts cost {on_prose[:, :BEFORE].mean():.2f} nats per token there"
)
gain_of_switching.reveal(
    gain_of_switching.options[0 if first < 0.05 else 1 if first < 0.3 else 2],
    f"It saves {first:.2f} ± {error[BEFORE]:.2f} nats per token in the first chunk of code and {mean[BEFORE + 1]:.2f} in the "
    f"second. Of the router's own choices there, {share[BEFORE]:.0%} and {share[BEFORE + 1]:.0%} are these experts.",
)

# %% [markdown]
# In the average $m$ the prose halves every $\ln 2 / {-\ln \alpha}$ chunks: about three for the demo's $\alpha = 0.8$. The
# measured lag is of that size. A router that sees only the past cannot turn before it has seen the turn.
#
# ## Two losses for the router
#
# Nothing so far keeps the router from sending everything to the same experts. The **load-balance loss** of Switch
# Transformers ([arXiv 2101.03961](https://arxiv.org/abs/2101.03961), equations 4 to 6), over the decisions of $C$ chunks:
#
# $$\mathcal{L}_{\mathrm{balance}} = E \sum_e f_e\, P_e, \qquad
# f_e = \frac{1}{C K} \sum_c \mathbb{1}[e \in \mathcal{E}_c], \qquad
# P_e = \frac{1}{C} \sum_c \mathrm{softmax}(z_c)_e$$
#
# $f$ is a count and has no gradient; $P$ has. So expert $e$ is pushed down in proportion to the load it has. With an even
# load, $f_e = 1/E$, the loss is 1. The **router z-loss** (ST-MoE, [arXiv 2202.08906](https://arxiv.org/abs/2202.08906),
# equation 5) keeps logits small, where rounding cannot turn a choice:
# $\mathcal{L}_z = \frac{1}{C} \sum_c \big(\log \sum_e e^{z_{c,e}}\big)^2$.

# %% [markdown]
# ### Exercise 5.2: the load-balance loss
#
# Write `load_balance(logits, experts)` for logits `[B, C, E]` and chosen experts `[B, C, K]` (no padding): a scalar that
# can be differentiated with respect to the logits. An expert that no chunk chose counts with load zero.


# %% tags=["exercise"]
def load_balance(logits, experts):
    """Switch load-balance loss over the decisions of all chunks of all rows."""
    # BEGIN SOLUTION: count the choices of each expert, average the probabilities, and take E times the sum of products
    num_experts = logits.shape[-1]
    load = torch.bincount(experts.flatten(), minlength=num_experts) / experts.numel()
    probability = logits.softmax(dim=-1).mean(dim=(0, 1))
    return num_experts * (load * probability).sum()
    # END SOLUTION


# %% tags=["check"]
torch.manual_seed(0)
some_logits = torch.randn(3, 7, EXPERTS)
some_logits[..., -1] -= 10  # an expert that no chunk chooses
some_logits.requires_grad_()
some_experts = some_logits.topk(TOP_K).indices
loss = load_balance(some_logits, some_experts)
check(isinstance(loss, torch.Tensor) and loss.shape == (), "Return a scalar tensor.")
one_hot = torch.nn.functional.one_hot(some_experts, EXPERTS).sum(dim=2).float()
expected = EXPERTS * (one_hot.mean(dim=(0, 1)) / TOP_K * some_logits.softmax(-1).mean(dim=(0, 1))).sum()
check(
    abs(loss.item() - TOP_K * expected.item()) > 1e-4,
    f"{TOP_K} times too large: f is a share of all C K choices, so it sums to 1.",
)
check(abs(EXPERTS * loss.item() - expected.item()) > 1e-4, "The factor E is missing: even load gives 1.")
check_close(
    loss,
    expected,
    "P is the mean of the softmax over all experts, f the share of all choices, best and second best alike; E counts the expert "
    "that nobody chose.",
)
check(
    loss.requires_grad,
    "The loss has no gradient: P must come from the logits, not from the chosen experts.",
)
loss.backward()
gradient = some_logits.grad.clone()
some_logits.grad = None
expected.backward()
check_close(
    gradient, some_logits.grad, "The value is right but the gradient is not: it flows through P alone."
)
with torch.no_grad():
    out = model(sample("code", 1)[None, : 8 * CHUNK])
decisions = hydra_lab.record(model, sample("code", 1)[None, : 8 * CHUNK]).by_layer("moe.routing")
total = sum(load_balance(decision.logits, decision.experts) for decision in decisions.values())
check_close(total, out.load_balance_loss, "Not what the demo reports, summed over its blocks.", rtol=1e-4)
passed("5.2")

# %% [markdown]
# The library's version also leaves out padding:

# %%
show_source(MoEPath._losses)

# %% [markdown]
# The loss is often read as a gauge: near 1, the load is even. Try it on a router that has **collapsed**: every chunk, of
# every text, goes to experts 0 and 1 of eight. All that we vary is by how many logits it prefers them.

# %% tags=["predict"]
collapsed_loss = predict(
    "The router prefers experts 0 and 1 everywhere, by 0.01 logits only. They get everything, six experts get nothing. The "
    "load-balance loss (1 when the load is even) is",
    ["about 1", "about 2", "about 4"],
)


# %%
def losses_of(router: torch.Tensor, hidden: torch.Tensor, top_k: int) -> tuple[float, torch.Tensor]:
    """The library's load-balance loss of a router [E, D] on chunks of one token [C, D], and its gradient [E, D]."""
    fields = {
        "moe_chunk_size": 1,
        "moe_chunk_pooling": "first",
        "moe_num_experts": len(router),
        "moe_top_k": top_k,
    }
    path = MoEPath(HydraConfig.from_preset("nano", **fields))
    path.reset_parameters()
    path.router.weight = torch.nn.Parameter(router)
    loss = path(hidden[None], Span(len(hidden)), None)[2].load_balance
    (gradient,) = torch.autograd.grad(loss, path.router.weight)
    return loss.item(), gradient


def preferring(lead: float) -> torch.Tensor:
    """A router of eight experts that prefers two of them by `lead` logits, whatever the token."""
    router = torch.zeros(8, 32)
    router[:2, 0] = lead
    return router


tokens = torch.zeros(64, 32)
tokens[:, 0] = 1.0
leads = np.geomspace(0.01, 20, 40)
collapsed = [losses_of(preferring(float(lead)), tokens, top_k=2)[0] for lead in leads]
figure = go.Figure(go.Scatter(x=leads, y=collapsed, line={"color": figures.colours(1)[0], "width": 3}))
figure.add_hline(y=1, line={"dash": "dot"}, annotation_text="even load", annotation_position="top right")
figure.update_xaxes(title_text="logits by which experts 0 and 1 lead (log scale)", type="log", dtick=1)
figure.update_yaxes(title_text="load-balance loss", rangemode="tozero")
finish(
    figure,
    title="The loss misses a collapse that is not confident",
    subtitle="two of eight experts get all of 64 chunks, at every point of this curve",
    theme="light",
    height=260,
)
display(figure)
push = -losses_of(preferring(0.01), tokens, top_k=2)[1][:, 0]
collapsed_loss.reveal(
    collapsed_loss.options[int(np.abs(np.array([1, 2, 4]) - collapsed[0]).argmin())],
    f"It is {collapsed[0]:.3f}: where P is even, the loss is 1 whatever f is. Only a confident router shows its collapse "
    f"({collapsed[-1]:.1f}). Its gradient does not miss it: descent moves the logits of experts 0 and 1 by {push[0]:+.2f} and those of the idle "
    f"ones by {push[2]:+.2f} per unit of step.",
)

# %% [markdown]
# Nor is 1 the least value. Let three quarters of the chunks prefer expert 0 of two by a hair, and one quarter expert 1
# strongly; then $f = (3/4, 1/4)$, $P = (3/8, 5/8)$, and the loss is $2\,(9/32 + 5/32) = 7/8$: *less* than for an even load.

# %%
two_kinds = torch.zeros(64, 32)
two_kinds[:48, 0], two_kinds[48:, 1] = 1.0, 1.0
router = torch.zeros(2, 32)
router[0, 0], router[1, 1] = 1e-3, 20.0
print(f"load 75% and 25%: loss {losses_of(router, two_kinds, top_k=1)[0]:.4f}")

# %% [markdown]
# So look at the load itself. The demo on held-out text of all its domains:

# %%
texts = torch.stack([sample(domain, i)[:256] for domain in SAMPLES for i in range(2)])
with torch.no_grad():
    out = model(texts)
print(f"load-balance loss {out.load_balance_loss / len(config.moe_layers):.3f}, router z-loss "
      f"{out.router_z_loss / len(config.moe_layers):.3f} (mean of the blocks)")  # fmt: skip
figures.expert_load(metrics.expert_load(metrics.routing_record(capture_batch(model, texts))), path_use=USE)

# %% [markdown]
# ## The leak
#
# The lag of the router invites a shortcut: route a chunk by the mean of the chunk *itself*. The prototype does. At token
# $t$ the experts then depend on tokens after $t$, that is, on what the model is asked to predict. The library knows this
# pooling for study, and warns. We give it the demo's weights (the router's half that reads a token reads the mean now).

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    leaking = HydraForCausalLM(HydraConfig(**{**config.to_dict(), "moe_chunk_pooling": "mean"})).eval()
print(caught[0].category.__name__, "-", caught[0].message)
state = dict(model.state_dict())
for block in config.moe_layers:
    name = f"model.layers.{block}.moe."
    state[name + "router.weight"] = state[name + "router.weight"][:, : config.hidden_size]
    del state[name + "average_norm.weight"]
leaking.load_state_dict(state)
probe_ids = sample("code", 3)[None, : 2 * CHUNK]

# %% [markdown]
# ### Exercise 5.3: a test for leaks
#
# The **rule of causality**: logits at $t$ depend on tokens up to $t$ only. It needs no theory to test. Write
# `leak(model, input_ids, position)`: replace the token at `position` of `input_ids` `[1, L]` by another one, and return by
# how much the logits of each *earlier* token moved: `[position]`, the largest absolute change over the vocabulary.


# %% tags=["exercise"]
def leak(model, input_ids, position):
    """Largest change of a logit at each token before `position` when the token there is another one, [position]."""
    # BEGIN SOLUTION: run the model on both versions of the text and compare the logits before the position
    changed = input_ids.clone()
    changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
    with torch.no_grad():
        difference = model(input_ids).logits - model(changed).logits
    return difference[0, :position].abs().amax(dim=-1)
    # END SOLUTION


# %% tags=["check"]
kept_ids = probe_ids.clone()
last = 2 * CHUNK - 1
moved = {name: leak(each, probe_ids, last) for name, each in (("demo", model), ("leaking", leaking))}
check(moved["demo"] is not None, "Does the function return the changes?")
check(torch.equal(probe_ids, kept_ids), "Your test changed the text it was given: work on a clone.")
check(
    tuple(moved["demo"].shape) == (last,),
    f"One number per token before position {last}: shape [{last}]. The position itself may change, so it is left out.",
)
check(
    moved["demo"].max() < 1e-3,
    "The demo does not leak. Do you compare the same columns, and only those before the position?",
)
check(
    moved["leaking"][CHUNK:].max() > 1e-3,
    "The leaking model's logits did not move: is the new token another one than the old?",
)
check(
    moved["leaking"].shape == (last,) and moved["leaking"][:CHUNK].max() < 1e-3,
    "The chunk before must not move: compare each column with itself.",
)
first_end = leak(leaking, probe_ids, CHUNK - 1)
check(
    first_end.shape == (CHUNK - 1,) and first_end.max() > 1e-3,
    f"Use the argument `position`: replacing token {CHUNK - 1}, the last of chunk 0, moves that chunk.",
)
check(leak(leaking, probe_ids, CHUNK).max() < 1e-3, "At a chunk's first token nothing leaks back.")
passed("5.3")

# %% [markdown]
# Here is the whole test at once: every token replaced in turn (a row of the batch each), every logit watched. Causal is
# what stays on and above the diagonal.


# %%
def changes(tested: HydraForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Largest change of a logit at each token (column) when the token of the row is replaced, [L, L]."""
    length = ids.shape[1]
    variants = ids.repeat(length, 1)
    variants.diagonal().add_(1).remainder_(tested.config.vocab_size)
    with torch.no_grad():
        return (tested(variants).logits - tested(ids).logits).abs().amax(dim=-1)


figure = make_subplots(
    cols=2, subplot_titles=["routed by first token and earlier chunks", "routed by the chunk's own mean"]
)
for column, tested in enumerate((model, leaking)):
    moved_LL = changes(tested, probe_ids).numpy()
    seen_LL = np.where(moved_LL > 1e-4, np.log10(np.maximum(moved_LL, 1e-4)), np.nan)
    figure.add_heatmap(z=seen_LL, coloraxis="coloraxis", row=1, col=column + 1)
    past = np.tril(moved_LL, -1)
    print(f"{figure.layout.annotations[column].text}: largest change of an earlier logit {past.max():.1e}")
figure.update_xaxes(title_text="logits at token")
figure.update_yaxes(autorange="reversed", title_text="token replaced", col=1)
figure.update_yaxes(autorange="reversed", col=2)
figure.update_layout(
    coloraxis={"colorscale": "Viridis", "colorbar": {"title": "log10 of<br>change"}}, margin={"b": 60}
)
finish(
    figure,
    title="Below the diagonal lies the past: only the leaking router changes it",
    subtitle=f"largest change of a logit, one text of {2 * CHUNK} tokens (two chunks); blank: below 1e-4",
    theme="light",
    height=360,
)

# %% [markdown]
# It changes the past of its own chunk and no further: the next chunk's mean is not known to this one.
#
# Would the gradient of an output with respect to a later token not be the handier test? It misses half of it. With `top_k=1`
# the chosen expert's weight is 1, whatever the logits are, and a choice has no gradient:

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    top_1 = moe_path(0, moe_chunk_pooling="mean", moe_top_k=1)
inputs = torch.randn(1, 8, 32, requires_grad=True)
first_output = top_1(inputs, Span(8), None)[0][0, 0]
(gradient,) = torch.autograd.grad(first_output.sum(), inputs)
with torch.no_grad():
    others = inputs.repeat(20, 1, 1)
    others[:, 7] = torch.randn(20, 32) * 3
    moved = (top_1(others, Span(8), None)[0][:, 0] - first_output).abs().amax(dim=-1)
own, last = gradient[0, 0].norm(), gradient[0, 7].norm()
print(f"gradient of the first token's output: by its own input {own:.2f}, by the last token's {last:.2f}")
print(f"of 20 other last tokens, {int((moved > 1e-4).sum())} change that output, by up to {moved.max():.2f}")

# %% [markdown]
# ## What a leak is good for
#
# Cheating in training, and nothing else. Take a source that nobody can predict: each token one of four, independent,
# uniform. No honest model gets below $\ln 4$ nats per token. We train two tiny models on it, alike but for the pooling:
# one mixture of experts with chunks of two tokens, and no other path.

# %% tags=["predict"]
below_entropy = predict(
    "Trained on independent uniform tokens, which model's loss falls below ln 4 on new ones?",
    [
        "neither: nothing can be learned",
        "the one routed by its chunk's mean",
        "both: experts memorize",
    ],
)

# %%
SOURCE, STEPS = 4, 150 if quick() else 400


def trained(pooling: str) -> HydraForCausalLM:
    """A tiny model of a mixture of experts alone, trained on random tokens."""
    torch.manual_seed(0)
    fields = {"vocab_size": SOURCE, "num_hidden_layers": 1, "attention_every": 0, "workspace_layers": [], "memory_layers": [],
              "moe_layers": [0], "moe_num_experts": 8, "moe_chunk_size": 2, "moe_chunk_pooling": pooling}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it leaks is the point
        tiny = HydraForCausalLM(HydraConfig.from_preset("nano", **fields))
    tiny.set_path_scale("ssm", 0.0)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.02, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        ids = torch.randint(SOURCE, (16, 32), generator=generator)
        tiny(ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return tiny.eval()


def loss_token_by_token(tested: HydraForCausalLM, ids: torch.Tensor) -> float:
    """Loss when each token is predicted before it exists, as in generation."""
    cache, logits = None, []
    with torch.no_grad():
        for column in ids.split(1, dim=1):
            step = tested(column, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            logits.append(step.logits)
    return torch.nn.functional.cross_entropy(
        torch.cat(logits[:-1], dim=1).flatten(0, 1), ids[:, 1:].flatten()
    ).item()


fresh = torch.randint(SOURCE, (64, 32), generator=torch.Generator().manual_seed(2))
best = math.log(SOURCE)
whole, stepwise = {}, {}
for pooling in ("ema", "mean"):
    tiny = trained(pooling)
    with torch.no_grad():
        whole[pooling] = tiny(fresh, labels=fresh).language_loss.item()
    stepwise[pooling] = loss_token_by_token(tiny, fresh)
    print(
        f"{pooling:4s}: loss on new tokens, in one pass {whole[pooling]:.3f}, one by one {stepwise[pooling]:.3f}"
    )
below = [pooling for pooling in whole if whole[pooling] < best - 0.05]
below_entropy.reveal(
    below_entropy.options[2 if "ema" in below else 1 if "mean" in below else 0],
    f"ln 4 = {best:.3f}; routed by the mean: {whole['mean']:.3f}. The choice of experts tells a chunk's first token what the "
    f"second is. One by one, where the second does not exist yet, the same model's loss is {stepwise['mean']:.3f}.",
)

# %% [markdown]
# ## Where this breaks
#
# - **A router that pools its own chunk** leaks, as the prototype does. Its training loss is then not a likelihood, and what it
#   generates is not what it was trained for. A model whose loss in one pass differs from its loss one by one has a fault of this kind.
# - **A gradient does not find every leak.** A choice has none, so a router with `top_k=1` passes a gradient test and
#   leaks all the same. Replace tokens, several of them: a choice may happen to stay.
# - **The load-balance loss is no gauge of balance**, as measured above. Watch the load, and dead experts.
# - **An early decision lags.** Where texts turn, the demo pays for it; the tour's tidy routing maps show texts that do not.
# - **The lag has a cost here because block 0's path is used.** Block 2 routes just as prettily, and the costliest removal
#   of one of its experts costs 0.001 nats per token (`probes/expert_ablation`): a picture of a decision is no evidence of use.

# %% [markdown]
# ## Next
#
# - Lesson 6 takes the same trick, a decision per chunk and a recurrence over chunks, to a memory.
# - Lesson 11 asks whether experts specialize, against nulls; `hydra-lab probe expert-specialization demo` answers it.
# - `hydra_lab/ops/chunk_moe/README.md` says how the experts are computed on a CPU and on a GPU.

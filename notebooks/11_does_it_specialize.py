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
# # 11. Does this expert specialize?
#
# **Goal:** test whether an expert serves a domain, against the nulls and confounds that imitate it, and by removing it · **Minutes:** 45 · **Difficulty:** hard
#
# Assumed: lesson 5 (chunk experts) and what a p-value is.
#
# "Expert 3 is the code expert" is three claims in one. *Association*: the router sends code there. *Selectivity*:
# more than any router would that sees different words. *Function*: code suffers without it. A routing table shows the
# first alone, and even that only against chance. This lesson puts the three claims to the test, one after the other,
# on the shipped model. The Hydra paper ([arXiv 2508.15099](https://arxiv.org/abs/2508.15099)) names specialization as
# an open question; its prototype shows routing without a test.

# %%
import dataclasses

import numpy as np
import plotly.graph_objects as go
import torch
from IPython.display import display

import hydra_lab
from hydra_lab import figures, metrics
from hydra_lab.capture.path_use import batches, path_use_of_samples, sample_losses
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.data.samples import samples_from_texts
from hydra_lab.figures.theme import SYMBOLS, colours, finish
from hydra_lab.interventions import AblateExpert, intervened
from hydra_lab.loading import model_directory
from hydra_lab.probing.experts import cost_of_each_expert

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
config = model.config
BLOCKS, EXPERTS, CHUNK = config.moe_layers, config.moe_num_experts, config.moe_chunk_size
PER_DOMAIN, HELD_BACK, NUM_TOKENS = (6, 2, 128) if quick() else (9, 3, 192)

samples = samples_from_texts(
    read_sample_texts(model_directory("demo")), tokenizer, num_tokens=NUM_TOKENS, num_samples=PER_DOMAIN
)
assert (samples.length == NUM_TOKENS).all()  # so every sample has as many chunks
DOMAINS = tuple(dict.fromkeys(samples.domains))
domain = np.array([DOMAINS.index(name) for name in samples.domains])  # [N]
print(f"{len(samples)} held-out samples of {NUM_TOKENS} tokens: {PER_DOMAIN} each of {', '.join(DOMAINS)}")

# %% [markdown]
# ## The picture that everybody shows
#
# One pass records what the routers chose, and the residual stream that each block was given (needed further below).

# %%
recordings = [
    hydra_lab.record(model, ids, mask, taps="moe.routing", hidden=True)
    for _, ids, mask in batches(samples, 8)
]


def decided(block: int, field: str) -> torch.Tensor:
    """A field of the routing of all samples in one block."""
    return torch.cat([getattr(each[f"layers.{block}.moe.routing"], field) for each in recordings])


routing = metrics.RoutingRecord(
    layers=tuple(BLOCKS),
    experts=np.stack([decided(block, "experts").numpy() for block in BLOCKS]),  # [Y, N, C, K]
    num_experts=EXPERTS,
    chunk_size=CHUNK,
    length=samples.length,
    domains=samples.domains,
)
first = {block: routing.experts[y, :, :, 0] for y, block in enumerate(BLOCKS)}  # [N, C] first choices
use = path_use_of_samples(model, samples.first_of_each(1))
display(figures.expert_by_domain(metrics.expert_by_domain(routing), path_use=use))

# %% [markdown]
# Block 0 looks specialized, block 2 less so. How much is that in one number, and what would chance show?
#
# ## Association: mutual information
#
# For the expert $E$ of a chunk and the domain $Z$ of its text,
#
# $$I(E; Z) = \sum_{z, e} p(z, e) \ln \frac{p(z, e)}{p(z)\, p(e)} = H(E) + H(Z) - H(E, Z),$$
#
# the Kullback-Leibler divergence of the joint distribution from what independence would give (Cover and Thomas,
# *Elements of Information Theory*, Section 2.3), in nats. It is 0 exactly if the two are independent, and at most
# $\min(H(E), H(Z))$: with eight even domains $\ln 8 \approx 2.08$. In practice the $p$ are counts over their sum (the
# "plug-in" estimate). The library's reference uses the second form:

# %%
show_source(metrics.mutual_information)

# %% [markdown]
# ### Exercise 11.1: mutual information from counts
#
# Write `information(counts)`: `counts` is an array `[domains, experts]` that says how many chunks of each domain went
# to each expert. Return $I(E; Z)$ in nats, a float, from the *first* form above. An expert that a domain never uses
# contributes nothing ($0 \ln 0 = 0$).


# %% tags=["exercise"]
def information(counts):
    """Mutual information of row and column, nats, from joint counts [A, E]."""
    # BEGIN SOLUTION: joint and marginal probabilities, then the sum over the cells that have counts
    joint = counts / counts.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    some = joint > 0
    return float((joint[some] * np.log(joint[some] / independent[some])).sum())
    # END SOLUTION


# %% tags=["check"]
even = np.outer([10.0, 30.0], [1.0, 2.0, 5.0])
value = information(even)
check(value is not None, "Does the function return the sum?")
check_close(value, 0.0, "Rows in proportion to each other: independent, so 0. Are the p(z) p(e) right?")
value = information(np.diag([5.0, 5.0]))
check(not np.isnan(value), "0 ln 0 gave NaN: leave out the cells without counts.")
check(abs(value - 1) > 1e-6, "That is 1 bit; the unit asked for is the nat: np.log, not np.log2.")
check_close(
    value, np.log(2), "Two domains with an expert each: ln 2 nats. Are the counts made probabilities?"
)
table = np.random.default_rng(0).integers(0, 9, size=(3, 5)).astype(float)
check_close(information(table), metrics.mutual_information(table), "Another value than the library's.")
check_close(information(10 * table), information(table), "Ten times the counts, the same information.")
passed("11.1")

# %% [markdown]
# The estimate is never negative, so chance can only push it up. For $n$ *independent* chunks without any dependence,
# $2 n \hat I$ is the likelihood-ratio statistic of the table and follows $\chi^2$ with $(A - 1)(E - 1)$ degrees of
# freedom, whose mean is that number. Hence the bias of Miller (1955):
#
# $$\mathbb{E}[\hat I] \approx \frac{(A - 1)(E - 1)}{2 n}.$$
#
# But the chunks of one text are *not* independent. Their topic, words and routing average are the same, so six chunks
# of a text are not six observations. Taking them for that is **pseudo-replication** (Hurlbert 1984). How bad is it?
# Let a coin decide which texts belong to "heads" and which to "tails". These two domains mean nothing, so a test at
# the 5% level should find something in 5% of the tosses.


# %%
def test_of(
    chunks: np.ndarray, label: np.ndarray, unit: str, *, num_resamplings: int = 99
) -> metrics.InformationTest:
    """Permutation test of I(E; label).

    `chunks` [N, C] is the expert of each chunk (-1: none), `label` [N] that of each text, `unit` what is permuted.
    """
    counts = (chunks[..., None] == np.arange(EXPERTS)).astype(float)  # [N, C, E]
    if unit == "text":
        counts = counts.sum(axis=1)
    else:
        counts, label = counts.reshape(-1, EXPERTS), np.repeat(label, chunks.shape[1])
    return metrics.information_of_groups(counts, label, num_resamplings=num_resamplings)


NUM_TOSSES = 120 if quick() else 240
tosses = [np.random.default_rng(seed).permutation(len(samples)) % 2 for seed in range(NUM_TOSSES)]

# %% tags=["predict"]
false_alarms = predict(
    "In block 0, the labels of the chunks are shuffled to see what chance gives. How often is heads against tails "
    "significant at 5%?",
    ["in about 5% of the tosses", "in 10 to 50%", "in more than half of them"],
)

# %%
p_of_tosses = {
    unit: np.array([test_of(first[0], toss, unit).p_value for toss in tosses]) for unit in ("chunk", "text")
}
figure = go.Figure()
for index, (unit, p_values) in enumerate(p_of_tosses.items()):
    figure.add_scatter(
        x=np.sort(p_values), y=np.arange(1, NUM_TOSSES + 1) / NUM_TOSSES, name=f"{unit}s permuted",
        line={"color": colours(2)[index], "width": 3, "dash": ("solid", "dash")[index], "shape": "hv"},
    )  # fmt: skip
figure.add_scatter(x=[0, 1], y=[0, 1], name="a valid test", line={"color": "grey", "width": 1, "dash": "dot"})
figure.update_xaxes(title_text="p-value", range=[0, 1])
figure.update_yaxes(title_text="share of tosses with this p or less", range=[0, 1.02])
display(
    finish(
        figure, title="Shuffled chunks find domains in coin tosses, permuted texts do not",
        subtitle=f"block 0, {NUM_TOSSES} tosses over {len(samples)} texts; a valid test lies on the dotted line or below",
        theme="light", height=330,
    )
)  # fmt: skip
alarms = {unit: float((p_values <= 0.05).mean()) for unit, p_values in p_of_tosses.items()}
false_alarms.reveal(
    false_alarms.options[0 if alarms["chunk"] < 0.1 else 1 if alarms["chunk"] <= 0.5 else 2],
    f"Shuffled chunks: {alarms['chunk']:.0%}. Whole texts permuted: {alarms['text']:.0%}.",
)

# %% [markdown]
# Shuffling chunks destroys two things at once: the tie of text and label, which is the hypothesis, and the likeness
# of the chunks of a text, which is no part of it. A null must destroy the first and keep everything else.
#
# ### Exercise 11.2: a null that keeps texts whole
#
# Write `permutation_null(chunks, label, num_permutations, seed)`: `chunks` `[N, C]` is the expert of each chunk of
# each text, `label` `[N]` the domain of each text as an integer from 0. Return an array `[num_permutations]` with the
# mutual information under random permutations that keep the chunks of a text together. `metrics.mutual_information`
# is yours.


# %% tags=["exercise"]
def permutation_null(chunks, label, num_permutations, seed):
    """[num_permutations] information between expert and label, nats, with labels permuted over texts."""
    # BEGIN SOLUTION: count experts per text once; permute the labels over texts; sum the texts' counts by label
    rng = np.random.default_rng(seed)
    counts = (chunks[..., None] == np.arange(chunks.max() + 1)).sum(axis=1)  # [N, E]
    member = np.eye(label.max() + 1)[label]  # [N, Z]
    return np.array(
        [
            metrics.mutual_information(rng.permutation(member).T @ counts.astype(float))
            for _ in range(num_permutations)
        ]
    )
    # END SOLUTION


# %% tags=["check"]
pure, halves = np.repeat([[0], [0], [1], [1]], 6, axis=1), np.array([0, 0, 1, 1])
null = permutation_null(pure, halves, 200, 0)
check(null is not None and np.shape(null) == (200,), "Return one value per permutation: shape [200].")
check((halves == [0, 0, 1, 1]).all(), "The caller's labels were changed: permute a copy.")
check(np.ptp(null) > 0, "All values are equal: is a new permutation drawn each time?")
check(
    all(min(abs(value), abs(value - np.log(2))) < 1e-9 for value in null),
    "Four texts of one expert each, two per label: whole texts give 0 or ln 2 and nothing between. Either the chunks "
    "of a text were torn apart, or labels were drawn anew (then a label can get three texts) instead of permuted.",
)
check(
    0.2 < (null > 0.5).mean() < 0.5,
    "Of the six ways to label the four texts, two give ln 2: a third of the values.",
)
expected = test_of(first[0], domain, "text", num_resamplings=400).null.mean()
given = permutation_null(first[0], domain, 400, 1)
# 10%: two means over 400 permutations each, drawn apart.
check_close(given.mean(), expected, "On the model's texts the mean of the null is another one.", rtol=0.1)
passed("11.2")

# %% [markdown]
# Now the real domains. Three blocks are three tests, so the p-values are corrected (Holm 1979).

# %%
tests = [test_of(first[block], domain, "text", num_resamplings=499) for block in BLOCKS]
adjusted = metrics.holm(np.array([test.p_value for test in tests]))
miller = (len(DOMAINS) - 1) * (EXPERTS - 1) / (2 * first[0].size)
print(f"Miller's bias, were all {first[0].size} chunks independent: {miller:.3f} nats")
for block, test, p in zip(BLOCKS, tests, adjusted, strict=True):
    print(
        f"block {block}: I = {test.value:.2f} nats, by chance {test.null.mean():.2f}; above chance {test.corrected:.2f} "
        f"(95%: {test.interval[0]:.2f} to {test.interval[1]:.2f}), p = {p:.3f}"
    )

# %% [markdown]
# All three blocks pass, and the true chance level lies well above Miller's. So the router's choice depends on the
# domain, beyond the luck of these texts.
#
# ## Selectivity: what would any router do?
#
# Does the *training* of the router matter for that? A chunk's logits are linear in what the router sees,
#
# $$z_c = W_r u_c, \qquad u_c = [\,h_{\text{first}} \,;\, \mathrm{norm}(m_{c-1})\,], \qquad
# m_c = a\, m_{c-1} + (1 - a)\, \bar h_c,$$
#
# with $h$ the block's normalised input, $\bar h_c$ its mean over chunk $c$, and $m_{-1} = 0$. The expert is a
# function of $u_c$, so the data-processing inequality (Cover and Thomas, Section 2.8) says $I(E; Z) \le I(u; Z)$: a
# router can at most pass on what its input tells of the domain. It need not be trained to pass on some. In block 0
# the input is nothing but token *embeddings*; texts of different domains have different words; so any cut through
# that space separates them a little.
#
# First the equation, checked against the tap:


# %%
def router_inputs(block: int) -> torch.Tensor:
    """u of every chunk, [N, C, 2 D]."""
    layer = model.model.blocks[block]
    with torch.no_grad():
        if block == 0:
            residual = model.model.embed_tokens(torch.from_numpy(samples.tokens))
        else:
            residual = torch.cat([each.hidden[block - 1] for each in recordings])
        cells = layer.norm(residual).unflatten(1, (-1, CHUNK))  # [N, C, T, D]
        average, earlier = torch.zeros_like(cells[:, 0, 0]), []
        for mean in cells.mean(dim=2).unbind(dim=1):
            earlier.append(average)
            average = config.moe_ema_decay * average + (1 - config.moe_ema_decay) * mean
        return torch.cat([cells[:, :, 0], layer.moe.average_norm(torch.stack(earlier, dim=1))], dim=-1)


show_source(type(model.model.blocks[0].moe)._route)
router_weight = {block: model.model.blocks[block].moe.router.weight.detach() for block in BLOCKS}
for block in BLOCKS:
    error = (router_inputs(block) @ router_weight[block].T - decided(block, "logits")).abs().max()
    print(f"block {block}: largest difference between W u and the router's logits {error:.0e}")
    assert error < 1e-4

# %% [markdown]
# So another router costs one matrix product: the same inputs, random numbers for $W_r$ with the trained one's spread.

# %% tags=["predict"]
random_router = predict(
    "The router of block 0 is replaced by random numbers, many times. How many of these random routers pass the test that "
    "the trained one passed (information about the domain, texts permuted, p at most 0.05)?",
    ["about 5%, as chance would have it", "some, but fewer than half", "more than half"],
)


# %%
def tests_of_random_routers(block: int, count: int) -> list[metrics.InformationTest]:
    """The test above for routers that nobody trained."""
    generator = torch.Generator().manual_seed(block)
    trained, seen = router_weight[block], router_inputs(block)
    drawn = [torch.randn(trained.shape, generator=generator) * trained.std() for _ in range(count)]
    return [test_of((seen @ weight.T).argmax(dim=-1).numpy(), domain, "text") for weight in drawn]


NUM_ROUTERS = 40 if quick() else 100
random_tests = {block: tests_of_random_routers(block, NUM_ROUTERS) for block in BLOCKS}
rows = [f"block {block}" for block in BLOCKS]
boxes = {
    "domains permuted": [test.null - test.null.mean() for test in tests],
    "random routers": [np.array([each.corrected for each in random_tests[block]]) for block in BLOCKS],
}
figure = go.Figure()
for index, (name, values) in enumerate(boxes.items()):
    figure.add_box(
        x=np.concatenate(values), y=np.repeat(rows, [len(each) for each in values]), name=name, orientation="h",
        marker={"color": colours(3)[index], "symbol": SYMBOLS[index]}, boxpoints="outliers",
    )  # fmt: skip
figure.add_scatter(
    x=[test.corrected for test in tests], y=rows, name="the trained router (95%)", mode="markers",
    error_x={"array": [test.interval[1] - test.corrected for test in tests],
             "arrayminus": [test.corrected - test.interval[0] for test in tests]},
    marker={"color": colours(3)[2], "symbol": "diamond", "size": 13, "line": {"width": 1, "color": "black"}},
)  # fmt: skip
figure.update_layout(boxmode="group")
figure.update_xaxes(title_text="information of first expert about the domain, beyond chance (nats)")
figure.update_yaxes(autorange="reversed")
display(
    finish(
        figure, title="Random routers separate the domains too",
        subtitle=f"mutual information less the mean of its null; {len(samples)} texts of {len(DOMAINS)} domains, "
        f"{NUM_ROUTERS} random routers per block",
        theme="light", height=330,
    )
)  # fmt: skip
passing = {block: np.mean([each.p_value <= 0.05 for each in random_tests[block]]) for block in BLOCKS}
for block, test in zip(BLOCKS, tests, strict=True):
    best = max(each.corrected for each in random_tests[block])
    print(
        f"block {block}: {passing[block]:.0%} of the random routers pass; the best holds {best:.2f} nats beyond chance, "
        f"the trained one {test.corrected:.2f}"
    )
random_router.reveal(
    random_router.options[0 if passing[0] < 0.1 else 1 if passing[0] < 0.5 else 2],
    f"{passing[0]:.0%} of {NUM_ROUTERS} pass.",
)

# %% [markdown]
# With the permutation null alone, *random* routers would pass for specialists. Each null answers one question:
# permuted domains, "is it the luck of these texts?"; random routers, "is it the texts' words, whoever routes them?"
# Only what goes beyond both can be called selective, and in block 2 that is little or nothing.
#
# ## A confound: where in the text
#
# Not everything that varies with the domain is the domain. At a text's first chunk there is no earlier chunk, so
# $m_{-1} = 0$ and the router decides on one token. Whoever compares short documents with long ones compares first
# chunks with later ones.

# %%
display(figures.expert_by_chunk(metrics.expert_by_chunk(routing), path_use=use))

# %% [markdown]
# The coin again, so that there is nothing to find: it splits the texts of every domain into two sources. But source B
# gives short documents, the first 32 tokens. The statistic is $I(E; \text{source} \mid Z)$, the mean of the domains'
# own information; its null exchanges whole texts within a domain.


# %%
def test_of_source(chunks: np.ndarray, source: np.ndarray) -> metrics.InformationTest:
    """Does the choice [N, C] (-1: no such chunk) depend on the source [N] of the text, given the domain?"""
    return metrics.information_of_labels(
        chunks, np.broadcast_to(source[:, None], chunks.shape), domain,
        num_decisions=EXPERTS, num_labels=2, num_resamplings=59,
    )  # fmt: skip


p_of_sources: dict[str, list[float]] = {"B is short": [], "all are cut to the length of B": []}
for seed in range(NUM_TOSSES // 6):
    rng = np.random.default_rng(seed)
    source = np.concatenate([rng.permutation(PER_DOMAIN) % 2 for _ in DOMAINS])
    chunks = first[0].copy()
    chunks[source == 1, 1:] = -1
    p_of_sources["B is short"].append(test_of_source(chunks, source).p_value)
    p_of_sources["all are cut to the length of B"].append(test_of_source(chunks[:, :1], source).p_value)
for name, p_values in p_of_sources.items():
    print(f"{name}: significant at 5% in {np.mean(np.array(p_values) <= 0.05):.0%} of {len(p_values)} tosses")

# %% [markdown]
# The test is not wrong: the choice does depend on the label. The label's *name* is wrong, for what differs is the
# position. No p-value tells the two apart. Equal lengths do, or a comparison within positions (lesson 14). All
# samples above have equal length for this reason.
#
# ## Function: remove it
#
# Does a domain *need* the experts that it is sent to? Take an expert's weight to zero at the routing tap, leave the
# others theirs, and see by how much the loss rises, domain by domain. Preference and cost come from different texts:
# on the same ones, a text that happens to be odd would be odd in both.

# %%
is_held_back = np.arange(len(samples)) % PER_DOMAIN >= PER_DOMAIN - HELD_BACK
held_back = samples.take(np.flatnonzero(is_held_back))
print(f"preference from {int((~is_held_back).sum())} texts, cost from {len(held_back)} others")

# %% [markdown]
# ### Exercise 11.3: what an expert is worth to each domain
#
# Write `cost_by_domain(samples, block, expert)`: an array `[8]`, for each of `DOMAINS` the mean over its samples of
# the loss without the expert less the loss with it, in nats per token. The removed expert's weight is lost, not
# handed to the others: `AblateExpert(block=..., expert=..., renormalize=False)`, inside
# `with intervened(model, ...)`. `sample_losses(model, samples)` gives the loss of each sample, `[N]`;
# `samples.domains` names their domains.


# %% tags=["exercise"]
def cost_by_domain(samples, block, expert):
    """[Z] mean rise of the loss without the expert, by domain, nats per token."""
    # BEGIN SOLUTION: the losses with and without the expert, their difference averaged within each domain
    whole = sample_losses(model, samples)
    with intervened(model, AblateExpert(block=block, expert=expert, renormalize=False)):
        without = sample_losses(model, samples)
    names = np.array(samples.domains)
    return np.array([(without - whole)[names == each].mean() for each in DOMAINS])
    # END SOLUTION


# %% tags=["check"]
few = held_back.first_of_each(1)
down = model.model.blocks[0].moe.down_proj  # the same removal by another road: an expert whose output is zero
kept = down[5].detach().clone()
before = sample_losses(model, few)
with torch.no_grad():
    down[5] = 0.0
    expected = sample_losses(model, few) - before
    down[5] = kept
cost = cost_by_domain(few, 0, 5)
check(cost is not None and np.shape(cost) == (len(DOMAINS),), "Return one number per domain: shape [8].")
check(np.abs(cost).max() > 0, "Nothing was removed: take the losses inside `with intervened(model, ...)`.")
check(np.abs(cost + expected).max() > 1e-3, "The sign is turned: the loss without, less the loss with.")
with intervened(model, AblateExpert(block=0, expert=5)):
    handed_over = sample_losses(model, few) - before
check(
    np.abs(cost - handed_over).max() > 1e-4,
    "The other expert of the chunk took its weight over: pass renormalize=False.",
)
check_close(cost, expected, "Another cost: the mean within each domain, in the order of DOMAINS.", atol=1e-4)
passed("11.3")

# %%
favourite = int(metrics.expert_by_domain(routing).share[0, DOMAINS.index("facts")].argmax())
in_facts = (first[0][np.array(samples.domains) == "facts"] == favourite).mean()
print(f"Expert {favourite} of block 0 is the first choice of {in_facts:.0%} of the chunks of facts.")

# %% tags=["predict"]
best_friend = predict(
    "The facts of these texts are asked in phrasings that training never used. What happens to the loss on them when "
    "block 0 loses the expert that they prefer?",
    ["it rises by more than 0.02 nats per token", "it hardly moves", "it falls by more than 0.02"],
)

# %%
of_cost = dataclasses.replace(
    routing,
    experts=routing.experts[:, is_held_back],
    length=held_back.length,
    domains=held_back.domains,
)
costs: dict[int, np.ndarray] = {}  # block -> [E, N]
for block in (0, 2):
    y = BLOCKS.index(block)
    one_block = dataclasses.replace(of_cost, layers=(block,), experts=of_cost.experts[y : y + 1])
    costs[block] = cost_of_each_expert(model, held_back, one_block, batch_size=8, progress=lambda _: None)[0]
cost_table = metrics.expert_cost(np.stack(list(costs.values())), tuple(costs), held_back.domains)
figure = figures.expert_cost(cost_table, path_use=use)
figure.for_each_trace(lambda trace: trace.update(text=np.round(trace.z, 2) + 0.0, texttemplate="%{text}"))
display(figure)
change = cost_table.cost[0, DOMAINS.index("facts"), favourite]
best_friend.reveal(
    best_friend.options[0 if change > 0.02 else 1 if change >= -0.02 else 2],
    f"It changes by {change:+.3f} nats per token ({cost_table.num_samples[0]} texts). The expert that facts prefer most "
    "clearly is not one that these facts need.",
)

# %% [markdown]
# Over all experts and domains: does it cost more to remove an expert *where it is preferred*? Let $\pi_{ez}$ be the
# share of the chunks of domain $z$ whose first choice is $e$, less its mean over domains, and $c_{ez}$ the cost. In
# $c_{ez} = \alpha_e + \beta\, \pi_{ez} + \varepsilon_{ez}$ each expert has its own level $\alpha_e$ (a useful expert
# may be dear everywhere), and least squares gives
#
# $$\hat\beta = \frac{\sum_{e,z} \pi_{ez}\, c_{ez}}{\sum_{e,z} \pi_{ez}^2},$$
#
# because $\pi$ sums to zero over $z$, so that $\alpha_e$ drops out. $\hat\beta$ has a unit: nats per token for a
# preference of 100 points. Its null permutes the domains over the *texts* of the cost; that is what the library's
# probe does.


# %%
def slope(preference: np.ndarray, cost: np.ndarray, label: np.ndarray) -> float:
    """Extra cost where preferred: `preference` [E, Z], `cost` [E, N] of texts with the domains `label` [N]."""
    by_domain = np.stack([cost[:, label == z].mean(axis=1) for z in range(len(DOMAINS))], axis=1)
    return float((preference * by_domain).sum() / (preference**2).sum())


label = domain[is_held_back]
slopes, preferences = {}, {}
for block in costs:
    of_preference = first[block][~is_held_back]
    shares = np.stack(
        [(of_preference[domain[~is_held_back] == z, :, None] == np.arange(EXPERTS)).mean(axis=(0, 1))
         for z in range(len(DOMAINS))], axis=1,
    )  # fmt: skip
    preferences[block] = shares - shares.mean(axis=1, keepdims=True)
    slopes[block] = slope(preferences[block], costs[block], label)
    rng = np.random.default_rng(0)
    null = np.array([slope(preferences[block], costs[block], rng.permutation(label)) for _ in range(999)])
    p = (1 + (null >= slopes[block] - 1e-12).sum()) / 1000
    print(f"block {block}: {slopes[block]:+.4f} nats per token for 100 points of preference, p = {p:.3f}")

figure = go.Figure()
for index, block in enumerate(costs):
    by_domain = cost_table.cost[index].T  # [E, Z]
    cells = [f"expert {e}, {name}" for e in range(EXPERTS) for name in DOMAINS]
    figure.add_scatter(
        x=100 * preferences[block].ravel(), y=by_domain.ravel(), mode="markers", name=f"block {block}", text=cells,
        marker={"color": colours(2)[index], "symbol": SYMBOLS[index], "size": 8, "opacity": 0.75},
        hovertemplate="%{text}: preferred by %{x:.0f} points, costs %{y:.3f} nats per token<extra></extra>",
    )  # fmt: skip
figure.update_xaxes(title_text="preference of the domain for the expert (points above its mean share)")
figure.update_yaxes(title_text="cost of removing it there (nats per token)")
display(
    finish(
        figure, title="Preferred experts are costly to lose in block 0, hardly in block 2",
        subtitle=f"{EXPERTS} experts x {len(DOMAINS)} domains in each block; preference from {int((~is_held_back).sum())} texts, "
        f"cost from {len(held_back)} others",
        theme="light", height=380,
    )
)  # fmt: skip

# %% [markdown]
# The p-values of association were alike in blocks 0 and 2. The slopes are not. A p-value says whether there is
# something, not how much, and association does not say what the model does with it. In block 0 a few cells carry the
# effect, and of the experts that are clearly favoured (the dots on the right) some cost a lot and some less than
# nothing.
#
# ## Where this breaks
#
# - **A preferred expert can harm.** Without the expert that they prefer, held-out facts get *easier* (above). Why it
#   misleads there was not tested. "Preferred" and "useful" are two measurements.
# - **A domain is a label, not a cause.** Block 0 sees embeddings only, so its "domain experts" are experts for words.
#   Given the domain, the kind of token adds 0.01 to 0.02 nats (`hydra-lab probe expert-specialization demo`), so
#   inside a domain they hardly follow it.
# - **Removal is not the natural alternative.** The router cannot choose another expert, and later blocks get an input
#   that they never saw. So the cost is not what the model would lose had it been trained without the expert.
# - **Few texts.** The probe uses 96 and finds a small slope in block 2 too (0.006 nats, p 0.002): significant, and
#   negligible. Here the cost rests on a few texts per domain, single cells on even fewer. For stars in a table of 64
#   cells use `metrics.benjamini_hochberg`.
# - **First choices only.** Every chunk has a second expert, which the tests above leave out (the first figure counts
#   both).
# - **The prototype's router saw the future**: it pooled the mean of the chunk itself. Its routing tables say what a
#   chunk turned out to be, not what could be known when it was routed.

# %% [markdown]
# ## Next
#
# - Lesson 14: models planted so that a naive reading fails, and the control that catches each.
# - `hydra-lab probe expert-specialization demo` runs all of this at full size, and
#   `hydra-lab probe calibrate expert-specialization` on models where the truth is known; `probes/expert_ablation`
#   asks whether experts stand in for each other.

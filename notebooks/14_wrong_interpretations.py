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
# # 14. When an interpretation is wrong
#
# **Goal:** recognize five pictures that look like findings and are not, and run the control that catches each · **Minutes:** 45 · **Difficulty:** hard
#
# Assumed: lessons 10 (interventions) and 11 (nulls).
#
# How would you know that a method of interpretation works? Try it where the truth is known. Here it is known because
# we write it into the weights: small models of the library's own class, with a mechanism *planted* by hand. For each
# of five popular readings there are two of them, **A with the mechanism that the reading claims and B without**, and
# the reading cannot tell them apart. Then it is no evidence. By Bayes' rule a measurement $x$ changes the odds of A
# against B by its likelihood ratio,
#
# $$\frac{P(A \mid x)}{P(B \mid x)} = \frac{p(x \mid A)}{p(x \mid B)} \cdot \frac{P(A)}{P(B)},$$
#
# and where both models give the same $x$ the ratio is 1, however small the p-value against *no* structure at all. A
# control is a measurement whose ratio is not 1. So it must say no on B **and yes on A**: a control that always says
# no is worth as little.

# %%
import copy

import numpy as np
import torch
from IPython.display import display
from plotly.subplots import make_subplots

import hydra_lab
from hydra_lab import figures, metrics
from hydra_lab.capture.path_use import path_use_of_samples, sample_losses
from hydra_lab.course import check, check_close, passed, predict, show_source
from hydra_lab.data.samples import Samples
from hydra_lab.figures.theme import SYMBOLS, colours, finish
from hydra_lab.interventions import AblateExpert, intervened
from hydra_lab.probing import planted
from hydra_lab.probing.experts import observe_routing

torch.set_num_threads(1)
LETTERS, DIGITS = planted.LETTERS, planted.DIGITS
texts = planted.letters_and_digits(np.random.default_rng(0), num_samples=24, num_chunks=6, purity=0.9)
is_digits = np.array([name == "digits" for name in texts.domains]).astype(int)  # [N]
for row in (0, 1):
    decoded = planted.byte_tokenizer().decode(texts.tokens[row])
    print(f"{texts.domains[row]:8s} {decoded}")

# %% [markdown]
# Two domains: in "letters" most chunks of 8 tokens are letters, in "digits" most are digits. The models have one
# block, and channel 0 of their embedding tells the two apart ($+$ for letters, $-$ for digits). The experts are
# written so:

# %%
show_source(planted.tie_experts)

# %% [markdown]
# ## 1. A handsome routing table
#
# In model A expert 2 takes the chunks that begin with a letter and makes letters likelier, expert 0 does it for
# digits. Model B is A with the gate of the experts at zero,
# $y = x + g_{\mathrm{ssm}}\, \mathrm{ssm}(\cdot) + 0 \cdot \mathrm{moe}(\cdot)$. That is what befell a prototype of
# this project in training: random experts are noise at first, so the gate shrinks, and then nothing reaches the
# experts.

# %%
used = planted.one_block_model(0, feature=LETTERS, other=DIGITS)
planted.tie_experts(used, (2,), (0,))
idle = copy.deepcopy(used)
with torch.no_grad():
    idle.model.blocks[0].gates["moe"].zero_()

records = {
    name: observe_routing(each, texts, batch_size=24).record for name, each in (("A", used), ("B", idle))
}
told = {}
for name, record in records.items():
    counts = (record.experts[0, :, :, 0, None] == np.arange(4)).sum(axis=1).astype(float)
    test = metrics.information_of_groups(counts, is_digits, num_resamplings=499)
    told[name] = test.corrected
    print(f"model {name}: {told[name]:.2f} nats about the domain beyond chance, p = {test.p_value:.3f}")
assert np.array_equal(records["A"].experts, records["B"].experts)

# %% [markdown]
# Equal to the bit, and significant in both. The gate comes *after* the experts, so no picture of the router sees it.
#
# ### Exercise 14.1: is the path used?
#
# Write `path_report(model, samples, path)`: two numbers, `(share, cost)`. `share` is the mean over all tokens of the
# path's share of the update of block 0, which
# `hydra_lab.record(model, ids, taps=[], contributions=True).contributions["layers.0.moe"].share` gives (`[B, L]`;
# `ids` is `torch.from_numpy(samples.tokens)`). `cost` is by how many nats per token the mean loss rises when the path
# is cut: `sample_losses(model, samples)` is `[N]`, `with model.cut(path):` cuts.


# %% tags=["exercise"]
def path_report(model, samples, path):
    """(mean share of the update of block 0, rise of the mean loss without the path in nats per token)."""
    # BEGIN SOLUTION: the recorded share, averaged; the mean loss with the path cut less the mean loss as it is
    ids = torch.from_numpy(samples.tokens)
    recording = hydra_lab.record(model, ids, taps=[], contributions=True)
    share = recording.contributions[f"layers.0.{path}"].share.mean().item()
    whole = sample_losses(model, samples).mean()
    with model.cut(path):
        cut = sample_losses(model, samples).mean()
    return share, cut - whole
    # END SOLUTION


# %% tags=["check"]
report = path_report(used, texts, "moe")
check(report is not None and len(report) == 2, "Return two numbers: share, cost.")
check(report[1] != 0, "Nothing was cut: take the second loss inside `with model.cut(path):`.")
check(report[1] > 0, "A's experts help, so the loss rises without them: cut less whole.")
expected = path_use_of_samples(used, texts)
check_close(
    report[0], expected.share_of("moe", 0), "Another share in model A: the mean over all tokens.", rtol=1e-3
)
check_close(report[1], expected.loss_increase[1].mean(), "Another cost in model A.", rtol=1e-3)
check_close(
    path_report(idle, texts, "moe"), (0.0, 0.0), "In model B the experts add nothing: share 0 and cost 0."
)
disguised = copy.deepcopy(used)  # a gate of 0.001, and experts that write a thousand times as much
with torch.no_grad():
    disguised.model.blocks[0].gates["moe"].mul_(0.001)
    disguised.model.blocks[0].moe.down_proj.mul_(1000)
check_close(
    path_report(disguised, texts, "moe"), report,
    "A model with a gate of 0.001 whose experts write 1000 times as much is the same function as A. The gate alone says nothing.",
    rtol=1e-3,
)  # fmt: skip
passed("14.1")

# %% [markdown]
# In the library every figure of a path's decisions carries this line:

# %%
domains = metrics.expert_by_domain(records["B"])
display(figures.expert_by_domain(domains, path_use=path_use_of_samples(idle, texts)))

# %% [markdown]
# ## 2. A domain that is a position
#
# Now the domains are "notes", one chunk each, and "articles", six chunks. In model A the experts follow what is
# written, and notes are mostly letters, articles mostly digits. In model B the router looks at the running average
# $m$ of the earlier chunks (lesson 5), which is zero at the first chunk: expert 0 for the first chunk of *any* text,
# expert 1 for all others. B knows nothing of what a text says.

# %%
positional = planted.one_block_model(0, feature=LETTERS, other=DIGITS)
with torch.no_grad():
    # a channel that is there at every token
    positional.get_parameter("model.embed_tokens.weight")[:, 1] = 0.5
    router = positional.model.blocks[0].moe.router.weight  # [E, first token's D channels, then the average's]
    router.zero_()
    router[0, 1] = 1.0
    router[1, positional.config.hidden_size + 1] = 10.0

is_article = is_digits  # the letter texts are cut to their first chunk
length = np.where(is_article == 1, texts.tokens.shape[1], planted.CHUNK_SIZE)
inside = np.arange(texts.tokens.shape[1]) < length[:, None]
mixed = Samples(texts.tokens, inside, length, tuple(np.where(is_article, "articles", "notes")))


def first_choices(model, samples: Samples) -> np.ndarray:
    """[N, C] first expert of every chunk; -1 past a sample's end."""
    record = observe_routing(model, samples, batch_size=24).record
    return np.where(record.chunk_mask, record.experts[0, :, :, 0], -1)


def count(chunks: np.ndarray) -> np.ndarray:
    """[N, E] chunks of each text at each expert."""
    return (chunks[..., None] == np.arange(4)).sum(axis=1).astype(float)


by_content, by_position = (first_choices(model, mixed) for model in (used, positional))
for name, chunks in (("A, by content", by_content), ("B, by position", by_position)):
    test = metrics.information_of_groups(count(chunks), is_article, num_resamplings=499)
    print(
        f"{name}: {test.corrected:.2f} nats beyond chance, p = {test.p_value:.3f}; an article: {chunks[1].tolist()}"
    )

# %% [markdown]
# Both pass the test of lesson 11 that permutes whole texts. The permutation asks whether the label and the choice are
# dependent. They are; but length goes with the label, and position with length. Hold the position fixed: with $C$ the
# chunk's place in its text, the information that is left is
#
# $$I(E; Z \mid C) = \sum_c p(c)\, I(E; Z \mid C = c), \qquad p(c) = \text{share of all chunks that stand at place } c.$$
#
# ### Exercise 14.2: information at equal positions
#
# Write `information_at_equal_positions(chunks, domain)`: `chunks` `[N, C]` holds the expert of each chunk and -1
# where a text has none, `domain` `[N]` is 0 or 1. Return $I(E; Z \mid C)$ in nats. `metrics.mutual_information` takes
# a table of counts `[domains, experts]`.


# %% tags=["exercise"]
def information_at_equal_positions(chunks, domain):
    """I(expert; domain | place of the chunk), nats."""
    # BEGIN SOLUTION: for each place a table of counts over the texts that have a chunk there; weigh by its chunks
    total = 0.0
    for at_place in chunks.T:
        there = at_place >= 0
        table = np.zeros((2, chunks.max() + 1))
        np.add.at(table, (domain[there], at_place[there]), 1)
        total += there.sum() * float(metrics.mutual_information(table))
    return total / (chunks >= 0).sum()
    # END SOLUTION


# %% tags=["check"]
value = information_at_equal_positions(by_position, is_article)
check(value is not None, "Does the function return the sum?")
check(
    value < 0.05,
    "Model B chooses by position alone, so at equal positions nothing is left. Two usual slips: -1 (no chunk) counted as an "
    "expert, or one table over all positions.",
)
check_close(value, 0.0, "Model B: exactly 0 at every place.")
toy = np.array([[0, 1], [0, 1], [0, 0], [1, 0]])
label = np.array([0, 0, 1, 1])
expected = (metrics.mutual_information(np.array([[2.0, 0], [1, 1]])) + np.log(2)) / 2
check_close(information_at_equal_positions(toy, label), expected, "Four texts of two chunks: another value.")
toy[:2, 1] = -1
expected = metrics.mutual_information(np.array([[2.0, 0], [1, 1]])) * 4 / 6
check_close(
    information_at_equal_positions(toy, label), expected,
    "Two of four texts end after one chunk: weigh each place by the chunks that stand there (4 and 2), not evenly.",
)  # fmt: skip
value = information_at_equal_positions(by_content, is_article)
check(value > 0.05, "Model A chooses by content: something must be left.")
passed("14.2")

# %% [markdown]
# Only the first place has chunks of both domains, so only it can speak. That is no flaw of the method but the price
# of such data: where the domains do not overlap, content and position cannot be told apart.
#
# ## 3. A gate that knows how long the prompt is
#
# The paper hopes that the memory's gate $\beta$ is high when the context lacks the answer ("closed book") and low
# when it holds it ("open book"). The prototype's benchmark reports 0.8 and 0.1. But it *set* the gate by the length
# of the prompt (and drew its predictions at random). We plant both: gate A falls where the subject of the question
# was named before, gate B falls with the position. Facts are a letter and its digit; `c1;d8;a3;?a` asks for `a` after
# three notes.

# %%
FACTS = dict(zip(LETTERS, "35182746", strict=True))  # subject -> value


def prompt(notes: list[tuple[str, str]], subject: str) -> str:
    """Notes, then the question."""
    return "".join(f"{name}{value};" for name, value in notes) + f"?{subject}"


def gated_model(gate_of_ids):
    """A model with a memory whose beta is `gate_of_ids` of the token ids [1, L], written at the tap."""
    model = planted.one_block_model(0, feature=LETTERS, other=DIGITS, moe_layers=[], memory_layers=[0])
    seen = {}
    model.get_submodule("model.embed_tokens").register_forward_hook(
        lambda _, inputs, __: seen.update(ids=inputs[0])
    )
    model.get_submodule("model.layers.0.memory.lookup").register_forward_hook(
        lambda _, __, lookup: lookup._replace(gate=gate_of_ids(seen["ids"])[..., None])
    )
    return model


def by_answer(ids):
    """0.8, or 0.1 at a token that was there before."""
    named = (ids[:, :, None] == ids[:, None, :]).tril(diagonal=-1).any(dim=-1)
    return torch.where(named, 0.1, 0.8)


def by_length(ids):
    """Falls with the position: about 0.8 after a question alone, about 0.1 after three notes and the question."""
    return torch.sigmoid(1.8 - 0.4 * torch.arange(ids.shape[1])).expand(ids.shape)


def beta(model, text: str) -> float:
    """The memory's gate at the last token."""
    ids = torch.from_numpy(planted.token_ids(text))[None]
    return hydra_lab.record(model, ids, taps="memory.lookup")["layers.0.memory.lookup"].gate[0, -1, 0].item()


gates = {"A, by the answer": gated_model(by_answer), "B, by the length": gated_model(by_length)}
for name, model in gates.items():
    closed = np.array([beta(model, prompt([], subject)) for subject in FACTS])
    opened = []
    for index, subject in enumerate(FACTS):
        others = [list(FACTS.items())[(index + step) % 8] for step in (1, 2)]
        opened.append(beta(model, prompt([*others, (subject, FACTS[subject])], subject)))
    p = metrics.sign_flip_p_value(closed - np.array(opened), num_resamplings=999)
    print(
        f"{name}: beta {closed.mean():.2f} closed book, {np.mean(opened):.2f} open book, p = {p:.3f} (n = {len(FACTS)})"
    )

# %% [markdown]
# The table is the same. Closed and open book differ in the answer, but also in length, and in every word of the
# notes. What is wanted is a **minimal pair**: two prompts that differ in nothing but the thing claimed.
#
# ### Exercise 14.3: a minimal pair
#
# Write `minimal_pair(subject, facts)`: two lists `(lacking, holding)` of three notes each, a note being a tuple
# `(subject, value)` taken from the dict `facts`. `holding` contains the fact that is asked for; `lacking` holds
# another fact *in its place* and is otherwise the same. No note of `lacking` may be about `subject`, and no fact may
# be noted twice in a list.


# %% tags=["exercise"]
def minimal_pair(subject, facts):
    """(notes that lack the fact, notes that hold it), three notes each, equal but for one."""
    # BEGIN SOLUTION: three notes about others; then the same with one of them replaced by the fact
    others = [(name, value) for name, value in facts.items() if name != subject]
    lacking = others[:3]
    holding = [*lacking[:2], (subject, facts[subject])]
    return lacking, holding
    # END SOLUTION


# %% tags=["check"]
betas = {name: [] for name in gates}
for subject, value in FACTS.items():
    pair = minimal_pair(subject, FACTS)
    check(pair is not None and len(pair) == 2, "Return two lists: lacking, holding.")
    lacking, holding = pair
    check(
        len(lacking) == 3 and len(holding) == 3,
        "Three notes in each: at unequal length model B passes again.",
    )
    check((subject, value) in holding, "`holding` must contain the fact that is asked for.")
    check(
        subject not in dict(lacking),
        "`lacking` must not name the subject: model A would take it for the answer.",
    )
    check(
        all(FACTS.get(name) == noted for name, noted in (*lacking, *holding))
        and len(set(lacking)) == len(set(holding)) == 3,
        "Every note is a fact of `facts`, each at most once in a list.",
    )
    check(
        sum(first != second for first, second in zip(lacking, holding, strict=True)) == 1,
        "The two lists differ in more than one place; the other notes stay where they are.",
    )
    for name, model in gates.items():
        betas[name].append(beta(model, prompt(lacking, subject)) - beta(model, prompt(holding, subject)))
for name, differences in betas.items():
    print(f"{name}: beta without less beta with the answer {np.mean(differences):.2f}")
passed("14.3")

# %% [markdown]
# Now the shipped model. Does its gate know that the answer is there? Here the minimal pair is a note about the country
# asked for and a note about another one.

# %% tags=["predict"]
real_gate = predict(
    "Demo model: beta over the question after a note with the answer, less beta after an equally long note about another country. "
    "How much of the difference between closed and open book is left?",
    ["more than half of it", "10 to 50%", "less than 10%"],
)

# %%
demo, tokenizer = hydra_lab.load("demo")
CAPITALS = dict(
    Peru="Lima", France="Paris", Japan="Tokyo", Cuba="Havana", Egypt="Cairo", Norway="Oslo", Kenya="Nairobi",
    Iraq="Baghdad", Spain="Madrid", Italy="Rome", Chile="Santiago", Ghana="Accra",
)  # fmt: skip


def demo_beta(note: str, country: str) -> float:
    """Mean beta over the tokens of the question."""
    question = tokenizer(f"Q: capital of {country}? A:")["input_ids"]
    ids = torch.tensor([tokenizer(note)["input_ids"] + question])
    lookup = hydra_lab.record(demo, ids, taps="memory.lookup")[
        f"layers.{demo.config.memory_layers[0]}.memory.lookup"
    ]
    return lookup.gate[0, -len(question) :].mean().item()


names = list(CAPITALS)
own = [f"Note: the capital of {name} is {CAPITALS[name]}.\n" for name in names]
closed, lacking, holding = (
    np.array([demo_beta(note, name) for name, note in zip(names, notes, strict=True)])
    for notes in ([""] * len(names), [*own[1:], own[0]], own)
)
print(
    f"beta over the question: closed book {closed.mean():.3f}, after a note without the answer {lacking.mean():.3f}, "
    f"with it {holding.mean():.3f} (n = {len(names)})"
)
left = (lacking - holding).mean() / (closed - holding).mean()
p = metrics.sign_flip_p_value(lacking - holding, two_sided=True)
real_gate.reveal(
    real_gate.options[0 if left > 0.5 else 1 if left >= 0.1 else 2],
    f"{left:.0%} of it is left ({(lacking - holding).mean():+.4f}, p = {p:.2f}). The gate follows that there are notes, hardly what they say.",
)

# %% [markdown]
# ## 4. Removed, and nothing happened
#
# The converse mistake: "without expert 2 the loss is the same, so expert 2 does nothing." In model A each job has
# *two* equal experts, 2 and 3 for letters, 0 and 1 for digits, and a chunk uses both; in model B the gate is shut as
# above. Removing an expert hands its weight to its partner (`renormalize=True`, the default).

# %%
doubled = planted.one_block_model(0, feature=LETTERS, other=DIGITS, moe_top_k=2)
planted.tie_experts(doubled, (2, 3), (0, 1))
doubled_idle = copy.deepcopy(doubled)
with torch.no_grad():
    doubled_idle.model.blocks[0].gates["moe"].zero_()


def loss_without(model, *experts: int) -> float:
    """Mean loss over the texts without these experts, nats per token."""
    with intervened(model, *(AblateExpert(block=0, expert=expert) for expert in experts)):
        return float(sample_losses(model, texts).mean())


for name, model in (("A, doubled", doubled), ("B, idle", doubled_idle)):
    single = [loss_without(model, expert) - loss_without(model) for expert in range(4)]
    print(
        f"{name}: without expert 0, 1, 2, 3 the loss rises by",
        ", ".join(f"{each:.3f}" for each in single),
        "nats per token",
    )

# %% tags=["predict"]
free = predict(
    "In model A every expert can be removed for nothing. How many of the four can be removed together for nothing?",
    ["one", "two", "all four"],
)

# %%
subsets = [[expert for expert in range(4) if code >> expert & 1] for code in range(16)]
removable = [each for each in subsets if loss_without(doubled, *each) - loss_without(doubled) < 1e-4]
most = max(map(len, removable))
free.reveal(
    {1: "one", 2: "two", 4: "all four"}[most],
    f"The largest sets are {[each for each in removable if len(each) == most]}: one of each pair.",
)

# %% [markdown]
# Effects of removals do not add up. How far they do not is the interaction, a second difference of the loss
# $\mathcal L$:
#
# $$\Delta_{ij} = (\mathcal L_{-ij} - \mathcal L) - (\mathcal L_{-i} - \mathcal L) - (\mathcal L_{-j} - \mathcal L)
# = \mathcal L_{-ij} - \mathcal L_{-i} - \mathcal L_{-j} + \mathcal L.$$
#
# It is 0 where two parts work independently and positive where each covers for the other. In trained transformers,
# later layers were seen to make up for removed attention (McGrath et al.,
# [arXiv 2307.15771](https://arxiv.org/abs/2307.15771), who call it the "Hydra effect"; the name is a coincidence).
#
# ### Exercise 14.4: who covers for whom?
#
# Write `interactions(loss_without)`: `loss_without(*experts)` gives the mean loss without any number of the experts
# 0..3 (without arguments: of the whole model). Return $\Delta$ as an array `[4, 4]`, symmetric, 0 on the diagonal.


# %% tags=["exercise"]
def interactions(loss_without):
    """[4, 4] cost of removing two experts together, beyond the sum of the costs of each, nats per token."""
    # BEGIN SOLUTION: the second difference for each pair of different experts
    whole, single = loss_without(), [loss_without(expert) for expert in range(4)]
    table = np.zeros((4, 4))
    for i in range(4):
        for j in range(i):
            table[i, j] = table[j, i] = loss_without(i, j) - single[i] - single[j] + whole
    return table
    # END SOLUTION


# %% tags=["check"]
pairs = interactions(lambda *experts: sum(set(experts)) + 7.0)
check(pairs is not None and np.shape(pairs) == (4, 4), "Return a 4 x 4 array.")
check_close(
    pairs, np.zeros((4, 4)),
    "Costs that add up (expert e costs e, the whole model has a loss of 7): the interaction is 0, on the diagonal too. Is the "
    "loss of the whole model added once?",
)  # fmt: skip
pairs = interactions(lambda *experts: float({2, 3} <= set(experts)))
expected = np.zeros((4, 4))
expected[2, 3] = expected[3, 2] = 1.0
check_close(pairs, expected, "Only 2 and 3 cover for each other here: 1 there, both ways, and 0 elsewhere.")
of_doubled = interactions(lambda *experts: loss_without(doubled, *experts))
check(of_doubled[2, 3] > 0.1 and of_doubled[0, 1] > 0.1, "In model A the partners cover for each other.")
check(
    np.abs(interactions(lambda *experts: loss_without(doubled_idle, *experts))).max() < 1e-6,
    "B's experts: 0.",
)
passed("14.4")

# %% [markdown]
# ## 5. What can be read need not be used
#
# A linear probe reads the domain off the residual stream. In model A the output layer uses channel 0; in model B that
# column of the output layer is zero, so nothing that the model says depends on it. The probe is fitted on half of the
# texts and scored on the other half, against permuted labels. The texts here are pure, all letters or all digits.

# %%
pure = planted.letters_and_digits(np.random.default_rng(1), num_samples=48, num_chunks=6, purity=1.0)
sign = np.array([1.0 if name == "letters" else -1.0 for name in pure.domains])  # [N]


def readable_model(*, read: bool):
    """A model that holds the domain in channel 0, and whose output layer reads that channel or does not."""
    model = planted.one_block_model(
        0, feature=LETTERS, other=DIGITS, moe_layers=[], tie_word_embeddings=False
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.model.blocks[0].ssm.in_proj.weight[:, 0] = 0.0  # the ssm neither reads channel 0
        model.model.blocks[0].ssm.out_proj.weight[0] = 0.0  # nor writes it
        if not read:
            model.lm_head.weight[:, 0] = 0.0
    return model


def probe(hidden: np.ndarray, sign: np.ndarray) -> tuple[float, np.ndarray]:
    """Least squares on the first half of the texts: accuracy on the other half, and the unit direction it reads."""
    size, half = hidden.shape[-1], len(sign) // 2
    target = np.repeat(sign, hidden.shape[1])[: half * hidden.shape[1]]
    direction = np.linalg.lstsq(hidden[:half].reshape(-1, size), target, rcond=None)[0]
    is_right = np.sign(hidden[half:] @ direction) == sign[half:, None]
    return float(is_right.mean()), direction / np.linalg.norm(direction)


directions, accuracies = {}, {}
readable = {"A, read": readable_model(read=True), "B, not read": readable_model(read=False)}
for name, model in readable.items():
    recording = hydra_lab.record(model, torch.from_numpy(pure.tokens), taps=[], hidden=True)
    ends_of_chunks = slice(planted.CHUNK_SIZE - 1, None, planted.CHUNK_SIZE)
    hidden = recording.hidden[0][:, ends_of_chunks].double().numpy()
    accuracies[name], directions[name] = probe(hidden, sign)
    rng = np.random.default_rng(0)
    null = [probe(hidden, rng.permutation(sign))[0] for _ in range(99)]
    p = (1 + sum(each >= accuracies[name] for each in null)) / 100
    print(
        f"{name}: accuracy {accuracies[name]:.0%} on held-out texts, {np.mean(null):.0%} with permuted labels, p = {p:.2f}"
    )

# %% [markdown]
# Held-out texts and permuted labels do not help: the information *is* there (Ravichander et al.,
# [arXiv 2005.00719](https://arxiv.org/abs/2005.00719)). Whether it is used is a question about the model's output, so
# the residual stream must be changed (Elazar et al., [arXiv 2006.00995](https://arxiv.org/abs/2006.00995)). We turn
# the probe's direction $w$, $\lVert w \rVert = 1$, round:
#
# $$r' = (I - 2 w w^\top)\, r, \qquad \lVert r' \rVert = \lVert r \rVert.$$
#
# A reflection keeps every length, so the final RMSNorm divides by what it did before. Setting the direction to zero
# would not: then even an unread direction moves all logits, through the norm.

# %% tags=["predict"]
turned = predict(
    "The direction that the probe reads is turned round at every token, in both models. In which does the loss move by more than 0.001 nats per token?",
    [
        "in both: the direction carries the domain",
        "in A only",
        "in neither: other channels tell the domain too",
    ],
)


# %%
def reflected_loss(model, direction: np.ndarray) -> float:
    """Rise of the mean loss when the residual stream is reflected along `direction` before the final norm."""
    w = torch.from_numpy(direction).float()
    whole = sample_losses(model, pure).mean()
    handle = model.model.norm.register_forward_pre_hook(
        lambda _, inputs: (inputs[0] - 2 * (inputs[0] @ w)[..., None] * w,)
    )
    try:
        return float(sample_losses(model, pure).mean() - whole)
    finally:
        handle.remove()


moved = {name: reflected_loss(model, directions[name]) for name, model in readable.items()}
moves = [abs(each) > 1e-3 for each in moved.values()]
turned.reveal(
    turned.options[0 if all(moves) else 1 if moves[0] else 2],
    "; ".join(f"{name}: {each:+.5f} nats per token" for name, each in moved.items()) + ".",
)

# %% [markdown]
# ## Five readings, five controls
#
# Each row has two models, each panel one measurement, in units of the larger of the two values. A reading is worth
# something where the two marks are apart.


# %%
def information(chunks: np.ndarray) -> float:
    """Information of expert and domain, nats."""
    return metrics.information_of_groups(count(chunks), is_article, num_resamplings=99).corrected


def rise_without_experts(model) -> float:
    """Cost of cutting the experts, nats per token."""
    return float(path_use_of_samples(model, texts).loss_increase[1].mean())


others = [("b", "5"), ("c", "1")]  # and, in their company, a note about d or about the subject a
beta_pairs = [
    [beta(model, prompt([*others, last], "a")) for last in (("d", "8"), ("a", "3"))]
    for model in gates.values()
]
rows = {  # reading and control, each for A and B
    "routing table -> cost of cutting": (
        list(told.values()),
        [rise_without_experts(used), rise_without_experts(idle)],
    ),
    "information -> at equal positions": (
        [information(by_content), information(by_position)],
        [information(by_content[:, :1]), information(by_position[:, :1])],
    ),
    "beta, closed less open -> minimal pair": (
        [beta(model, "?a") - pair[1] for model, pair in zip(gates.values(), beta_pairs, strict=True)],
        [pair[0] - pair[1] for pair in beta_pairs],
    ),
    "one expert removed -> its partner too": (
        [loss_without(model, 2) - loss_without(model) for model in (doubled, doubled_idle)],
        [loss_without(model, 2, 3) - loss_without(model) for model in (doubled, doubled_idle)],
    ),
    "probe's accuracy -> direction turned": (list(accuracies.values()), list(moved.values())),
}
figure = make_subplots(
    cols=2, shared_yaxes=True, subplot_titles=["the reading", "the control"], horizontal_spacing=0.06
)
for column in (0, 1):
    for index, name in enumerate(("A: the mechanism is there", "B: it is not")):
        scale = [max(max(map(abs, values[column])), 1e-9) for values in rows.values()]
        figure.add_scatter(
            x=[values[column][index] / each for values, each in zip(rows.values(), scale, strict=True)],
            y=np.arange(len(rows)) + (0.12, -0.12)[index], mode="markers", name=name, showlegend=column == 0,
            marker={"color": colours(2)[index], "symbol": SYMBOLS[index], "size": 13}, row=1, col=column + 1,
        )  # fmt: skip
figure.update_xaxes(title_text="share of the larger value", range=[-0.1, 1.15])
figure.update_yaxes(tickvals=np.arange(len(rows)), ticktext=list(rows), range=[len(rows) - 0.5, -0.5], col=1)
figure.update_layout(legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0})
display(
    finish(
        figure, title="The readings cannot tell the models apart, the controls can",
        subtitle=f"planted models of one block; rows 1, 2 and 4: {len(texts)} texts, row 3: one question, row 5: {len(pure)} texts",
        theme="light", height=380,
    )
)  # fmt: skip

# %% [markdown]
# ## Where this breaks
#
# - **A control catches what it was made for.** Each model B here was built with its control in mind. A trained model
#   can be wrong in a sixth way. That is why the library's probes are calibrated on planted *and* structureless
#   models: `hydra-lab probe calibrate` counts how often each finds what is there and claims what is not.
# - **An intervention can mislead too.** A cut path gives later blocks an input that they never saw, and the model can
#   break in ways that have nothing to do with the claim (lesson 10). Turning a direction round is as unusual an input
#   as any.
# - **"Not used" is relative to texts.** A path that costs nothing on these texts may be needed on others: cutting the
#   demo's memory costs 0.05 nats at most, on facts (README).
# - **Covering is a matter of degree.** In the demo the experts hardly stand in for each other (0.002 nats in block 0,
#   `probes/expert_ablation`); the doubled experts are the extreme.
# - **A finer impostor is always possible.** Even gate A follows the *name* of the subject, not the answer. A note that
#   names the subject and lacks the answer would be the next minimal pair.
# - **None of this is invented.** The prototype of the Hydra paper (arXiv 2508.15099) sets $\beta$ by prompt length,
#   and its logic task always uses A, B, C, ... in order, so that the answer follows from the *number* of steps; a
#   prototype of this project lost its gates while its routing still looked specialized.

# %% [markdown]
# ## Next
#
# - `hydra-lab probe all demo`: eight studies, each with claim, null, control and calibration; read one README in
#   `probes/` and look for the models A and B in it.
# - Plant your own: `hydra_lab.probing.planted` is a page of code. If your method cannot find what you wrote into the
#   weights yourself, it will not find what training did.

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
# # 7. Product keys: a million facts for the price of a thousand
#
# **Goal:** search a memory of n² rows by looking at 2n half-keys, say which rows a prompt reads, and write a new fact
# into them · **Minutes:** 40 · **Difficulty:** medium
#
# You should know what a softmax over scores does in attention, and what a tap is (lesson 0).
#
# A feed-forward layer $\sum_j \sigma(q \cdot k_j)\, v_j$ can be read as a memory: rows of the first matrix are keys,
# rows of the second are values ([arXiv 2012.14913](https://arxiv.org/abs/2012.14913)). A memory of a million rows would
# hold a lot, but comparing every token with a million keys costs too much. **Product keys** (Lample et al.,
# [arXiv 1907.05242](https://arxiv.org/abs/1907.05242), section 3) take the cost away without an approximation: the keys
# are all *pairs* of two small sets of half-keys, and the best pairs can be found from the halves.
#
# Because a token reads only a few rows, one can also point at the rows that hold a fact, and change them. The last
# part of the lesson does that, and measures what else moved.

# %%
import re

import numpy as np
import plotly.graph_objects as go
import torch
from IPython.display import display
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import hydra_lab
from hydra_lab import figures, metrics
from hydra_lab.accounting import parameter_table
from hydra_lab.attribution import edit_fact
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.config import HydraConfig
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.figures.theme import SYMBOLS, colours, finish
from hydra_lab.interventions import EditValue, intervened
from hydra_lab.loading import model_directory
from hydra_lab.nn.memory import MemoryPath
from hydra_lab.ops.product_key import product_key_topk, reference
from hydra_lab.ops.product_key import torch as by_halves
from hydra_lab.path_use import read_path_use
from hydra_lab.taps import Lookup
from hydra_lab.widgets import TokenStrip

torch.set_num_threads(1)
torch.manual_seed(0)
model, tokenizer = hydra_lab.load("demo")
BLOCK = model.config.memory_layers[0]
memory = model.model.blocks[BLOCK].memory
N1, N2 = model.config.memory_num_keys
HEADS, TOP_K, HALF = memory.num_heads, memory.top_k, memory.key_size
VALUE_SIZE = memory.values.shape[1]
print(
    f"block {BLOCK}: {N1 * N2:,} rows of {VALUE_SIZE} numbers; {HEADS} heads, each with {N1} + {N2} half-keys"
)
print(f"a token reads {TOP_K} rows per head")

# %% [markdown]
# ## From a hidden state to a score for every row
#
# Let $h \in \mathbb{R}^D$ be the token's normalised residual, the input of the path. Each head makes a query from two
# halves, each scaled to root mean square 1:
#
# $$[q^{(1)} ; q^{(2)}] = W_q h, \qquad q^{(s)} \leftarrow q^{(s)} / \mathrm{rms}(q^{(s)}).$$
#
# The key of row $a = i_1 n_2 + i_2$ is the pair $[k^{(1)}_{i_1} ; k^{(2)}_{i_2}]$, so its score falls apart into two:
#
# $$s_a = q \cdot [k^{(1)}_{i_1} ; k^{(2)}_{i_2}] = q^{(1)} \cdot k^{(1)}_{i_1} + q^{(2)} \cdot k^{(2)}_{i_2}
#   = s^{(1)}_{i_1} + s^{(2)}_{i_2}.$$
#
# The library's oracle spends the memory and writes all keys out:

# %%
show_source(reference.product_key_topk)

# %%
samples = read_sample_texts(model_directory("demo"))


def encode(text: str) -> torch.Tensor:
    """Token ids, [1, L]."""
    return tokenizer(text, return_tensors="pt")["input_ids"]


@torch.no_grad()
def memory_input(ids: torch.Tensor) -> torch.Tensor:
    """[B, L, D] what the memory path is given: the residual before its block, normalised."""
    residual = hydra_lab.record(model, ids, taps="memory.lookup", hidden=True).hidden[BLOCK - 1]
    return model.model.blocks[BLOCK].norm(residual)


@torch.no_grad()
def half_scores(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the first and of the second half-keys, [B, L, heads, n1] and [B, L, heads, n2]."""
    query = memory.query_proj(hidden).unflatten(-1, (HEADS, 2, HALF))
    query = query / (query.square().mean(-1, keepdim=True) + memory.norm_eps).sqrt()
    first, second = query.unbind(-2)
    return (
        torch.einsum("blhd,hnd->blhn", first, memory.keys1),
        torch.einsum("blhd,hnd->blhn", second, memory.keys2),
    )


ids = torch.cat([encode(samples[domain][0])[:, :128] for domain in ("facts", "code", "prose", "recall")])
hidden = memory_input(ids)
scores1, scores2 = half_scores(hidden)
all_scores = (scores1[..., :, None] + scores2[..., None, :]).flatten(-2)  # [B, L, heads, n1 n2]
best = all_scores.topk(TOP_K, dim=-1)
looked_up = hydra_lab.record(model, ids)["memory.lookup"]
print(f"searches (a token and a head each): {best.values[..., 0].numel():,}")
print("the rows that the model read are the best of all:", torch.equal(best.indices, looked_up.addresses))
weights = best.values.softmax(-1)
print(f"largest difference of the weights: {(weights - looked_up.weights).abs().max():.1e}")

# %% [markdown]
# ## Why the halves are enough
#
# The model found those rows without ever making `all_scores`. **Claim:** the $k$ best pairs consist of halves that are
# each among the $k$ best of their own side.
#
# *Proof.* Take a pair $(i, j)$ where $i$ is not among the $k$ best of side 1. Then there are $k$ halves $i'$ with
# $s^{(1)}_{i'} \ge s^{(1)}_i$, and each pair $(i', j)$ scores at least as much as $(i, j)$. So $k$ pairs are at least as
# good, and $(i, j)$ is not needed. The same for side 2. $\square$
#
# So two short lists of $k$ and the $k^2$ sums of their members suffice. The argument gives more: if $i$ has rank $a$ and
# $j$ rank $b$ (from 1), all pairs of ranks up to $a$ and $b$ are at least as good, and there are $ab$ of them with $(i, j)$
# itself. Only pairs with $ab \le k$ can win, about $k \ln k$ of them:

# %%
for k in (8, 32):
    can_win = sum(k // rank for rank in range(1, k + 1))
    print(f"k = {k}: {k * k} pairs of two lists, of which {can_win} can win")

# %% [markdown]
# Could the lists be shorter still? With the 4 best halves of each side there are 16 pairs, twice as many as
# we want to find.

# %% tags=["predict"]
short_lists = predict(
    f"With only the 4 best half-keys of each side: how often are the {TOP_K} best rows all found?",
    ["nearly always (over 90%)", "mostly (50 to 90%)", "sometimes (10 to 50%)", "hardly ever (under 10%)"],
)

# %%
rank1 = scores1.argsort(-1, descending=True).argsort(-1).gather(-1, best.indices // N2)
rank2 = scores2.argsort(-1, descending=True).argsort(-1).gather(-1, best.indices % N2)
deepest = torch.maximum(rank1, rank2) + 1  # [B, L, heads, K] list length that a winning row needs
lengths = list(range(1, TOP_K + 3))
whole = [100 * (deepest <= length).all(-1).float().mean().item() for length in lengths]
single = [100 * (deepest <= length).float().mean().item() for length in lengths]
figure = go.Figure()
figure.add_scatter(
    x=lengths, y=single, name="a winning row is found", line_dash="dash", marker_symbol="square"
)
figure.add_scatter(x=lengths, y=whole, name=f"all {TOP_K} are found", marker_symbol="circle")
figure.add_vline(x=TOP_K, line_dash="dot")
figure.add_annotation(x=TOP_K, y=30, text="proved from here on", xanchor="left", showarrow=False)
figure.update_xaxes(title_text="half-keys kept on each side", dtick=1)
figure.update_yaxes(title_text="share (%)", range=[0, 104])
display(
    finish(
        figure, title=f"The search is exact from {TOP_K} half-keys on, not before",
        subtitle=f"demo, block {BLOCK}; {deepest[..., 0].numel():,} searches on facts, code, prose and recall",
        theme="light", height=330,
    )
)  # fmt: skip
exact = whole[lengths.index(4)]
short_lists.reveal(
    short_lists.options[0 if exact > 90 else 1 if exact > 50 else 2 if exact > 10 else 3],
    f"In {exact:.0f}% of the searches. The {TOP_K} best pairs are often one good half with many partners.",
)

# %% [markdown]
# ### Exercise 7.1: the best pairs, from the halves
#
# Write `best_pairs(scores1, scores2, k)` for half scores `[..., n1]` and `[..., n2]`: the pair `(addresses, scores)`, both
# `[..., k]`, best first, with `address = i1 * n2 + i2`. You may assume $k \le \min(n_1, n_2)$. Never build anything of
# size $n_1 n_2$: the check looks at the largest tensor that you make.


# %%
class LargestTensor(TorchDispatchMode):
    """Within the context, remembers how many numbers the largest tensor has that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.size = max([self.size, *(tensor.numel() for tensor in tensors)])
        return result


# %% tags=["exercise"]
def best_pairs(scores1, scores2, k):
    """Addresses and scores of the k best pairs, [..., k] each, best first."""
    # BEGIN SOLUTION: the k best of each side, the k best of their k x k sums, and back to the indices of the halves
    top1, top2 = scores1.topk(k, dim=-1), scores2.topk(k, dim=-1)
    sums = (top1.values[..., :, None] + top2.values[..., None, :]).flatten(-2)
    scores, pair = sums.topk(k, dim=-1)
    index1 = top1.indices.gather(-1, pair // k)
    index2 = top2.indices.gather(-1, pair % k)
    return index1 * scores2.shape[-1] + index2, scores
    # END SOLUTION


# %% tags=["check"]
left, right = torch.randn(2, 5, 300), torch.randn(2, 5, 200)
with LargestTensor() as made:
    pairs = best_pairs(left, right, 8)
check(isinstance(pairs, tuple) and len(pairs) == 2, "Return two tensors: addresses and scores.")
check(
    made.size < 300 * 200,
    f"Something you make has {made.size:,} numbers: cut each side to its k best before you add.",
)
wanted = (left[..., :, None] + right[..., None, :]).flatten(-2).topk(8)
check_close(
    pairs[1].sort(-1).values, wanted.values.sort(-1).values,
    "These are not the best scores. The second-best pair need not be two second-best halves: look at all k x k sums.",
)  # fmt: skip
check_close(pairs[1], wanted.values, "The right scores, but they should come best first.")
check(
    not torch.equal(pairs[0], wanted.indices // 200 * 300 + wanted.indices % 200),
    "An address is i1 * n2 + i2: the stride is the length of the second side.",
)
check(pairs[0].max() >= 64, "These are places in the k x k table; look up which half-keys stand there.")
check_close(pairs[0], wanted.indices, "The scores are right, the addresses are not: which half is which?")
steep, flat = torch.arange(20.0).neg() * 100, torch.arange(20.0).neg()
check_close(
    best_pairs(steep, flat, 6)[0], torch.arange(6),
    "Where one side is steep, all winners share its best half: keep k of the other side, not fewer.",
)  # fmt: skip
check_close(best_pairs(scores1, scores2, TOP_K)[1], best.values, "Wrong on the demo's own scores.", rtol=1e-4)
passed("7.1")

# %% [markdown]
# The library does the same, and adds only the pairs with $ab \le k$:

# %%
show_source(by_halves._best_pairs)

# %% [markdown]
# ## What it costs
#
# Comparing a query of $2d$ numbers with all $n^2$ keys takes $2 n^2 d$ multiply-adds; the half scores take $2 n d$. That is
# what $n$ whole keys would cost: **with $n = 1024$ a million rows are searched for the price of a thousand.** PyTorch's
# counter sees the same (it counts two FLOPs per multiply-add), and the largest tensor shrinks too:

# %%
query = torch.randn(1, 4, HEADS, 2 * HALF)
for backend in ("reference", "torch"):
    with FlopCounterMode(display=False) as counter, LargestTensor() as largest:
        product_key_topk(query, memory.keys1.detach(), memory.keys2.detach(), top_k=TOP_K, backend=backend)
    print(f"{backend:9s} {counter.get_total_flops():>13,} FLOPs, largest tensor {largest.size:>10,} numbers")
searches = 4 * HEADS
print(f"equations {2 * searches * 2 * N1 * N2 * HALF:>13,} and {2 * searches * (N1 + N2) * HALF:,}")

# %%
for preset in ("29m", "demo", "1.6b"):
    config = HydraConfig.from_preset(preset)
    (n1, n2), parameters = config.memory_num_keys, parameter_table(config).by_component()["memory"]
    print(f"{preset:5s} {n1 * n2:>8,} rows, a search costs {(n1 + n2) // 2} keys;", end=" ")
    print(f"{parameters[0]:>12,} parameters, {parameters[1]:>10,} of them active per token")

# %% [markdown]
# What does *not* get cheaper is storage: every row is a parameter. The memory buys parameters that are not computed
# with. What a token reads is the sum over heads of the few rows, through one gate (see the last two lines):
#
# $$\mathrm{memory}(h) = \beta\, W_o \sum_{\mathrm{heads}} \sum_{k} w_k v_{a_k}, \qquad
#   w = \mathrm{softmax}(s_{a_1}, \dots, s_{a_K}), \qquad \beta = \sigma(w_\beta \cdot h + b).$$

# %%
show_source(MemoryPath.forward)

# %%
with torch.no_grad():
    read = (weights[..., None] * memory.values[best.indices]).sum(dim=(2, 3))  # heads, entries
    beta = (memory.gate.weight[0] @ hidden[..., None] + memory.gate.bias).sigmoid()
    by_hand = beta * (read @ memory.out_proj.weight.T)
    by_library = memory(hidden)
print(f"largest difference of the two outputs: {(by_hand - by_library).abs().max():.1e}")

# %% [markdown]
# ## Which rows does a prompt read?
#
# $\beta$ first: where it is near 0, the rows do not matter. Each token is coloured by its gate.

# %%
strip = encode("Q: country of Osaka? A: Japan\ncountry of Lagos: Nigeria\nQ: capital of Peru? A: Lima\n")
gates = hydra_lab.record(model, strip)["memory.lookup"].gate[0, :, 0]
TokenStrip([tokenizer.decode(i) for i in strip[0]], gates.tolist(), label="gate beta", limits=(0.0, 1.0))

# %% [markdown]
# It opens inside names: at the first token or two that tell one name from another. So the amount in which a prompt reads
# row $r$ is $\sum_t \beta_t \sum_{\mathrm{heads}, k} w_{tk} [a_{tk} = r]$.
#
# ### Exercise 7.2: the rows of a prompt
#
# Write `rows_read(lookup)` for a `Lookup` of one prompt (fields `addresses` and `weights` `[1, L, H, K]`, `gate`
# `[1, L, 1]`): a pair `(rows, amounts)`, both `[R]`, of the different rows that were read and of the amount above, the most
# read row first.


# %% tags=["exercise"]
def rows_read(lookup):
    """Rows that a prompt reads [R] and how much of each [R], most read first."""
    # BEGIN SOLUTION: weight times gate of every read, summed over the reads of the same row, sorted
    amount = lookup.weights * lookup.gate[..., None]
    rows, which = lookup.addresses.flatten().unique(return_inverse=True)
    total = torch.zeros(len(rows)).index_add(0, which, amount.flatten())
    order = total.argsort(descending=True)
    return rows[order], total[order]
    # END SOLUTION


# %% tags=["check"]
tiny = Lookup(
    addresses=torch.tensor([[[[5, 9], [9, 2]], [[5, 2], [7, 9]]]]),
    weights=torch.tensor([[[[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.5], [0.9, 0.1]]]]),
    gate=torch.tensor([[[0.8], [0.4]]]),
)
found = rows_read(tiny)
check(isinstance(found, tuple) and len(found) == 2, "Return two tensors: rows and amounts.")
check(
    found[0].shape == (4,),
    "The prompt reads 4 different rows (2, 5, 7, 9); each should stand there once.",
)
check_close(
    found[1].sum(), 2.4,
    "All amounts together are the number of heads times the sum of the gates, 2 * (0.8 + 0.4). Is every read counted, each "
    "with its token's gate? The reads of a row add up (x[rows] += w keeps only one of them).",
)  # fmt: skip
check_close(
    found[1].sort(descending=True).values, [0.8, 0.64, 0.6, 0.36], "A row's amount is the sum over its reads."
)
check_close(found[1], [0.8, 0.64, 0.6, 0.36], "Most read first.")
check_close(found[0], [5, 9, 2, 7], "The rows must follow the order of their amounts.")
asked = hydra_lab.record(model, encode("Q: country of Osaka? A:"))["memory.lookup"]
total = rows_read(asked)[1].sum()
check_close(
    total, HEADS * asked.gate.sum(), "Wrong on a prompt of the demo: use every head and token.", rtol=1e-4
)
passed("7.2")

# %% [markdown]
# ## Is the whole memory used?
#
# Rows that nobody reads get no gradient, and half-keys that never win stay where they are: memories can die like
# experts. We read held-out text of all domains and count. Chance must be counted too: a small sample leaves rows unread
# even if reads fall evenly.

# %%
per_domain = 2 if quick() else 4
texts = [text for group in samples.values() for text in group[:per_domain]]
batch = tokenizer(
    texts, return_tensors="pt", padding=True, padding_side="right", truncation=True, max_length=256
)
num_reads = int(batch["attention_mask"].sum()) * HEADS * TOP_K
print(f"{num_reads:,} reads on {N1 * N2:,} rows: {num_reads / (N1 * N2):.1f} reads per row")
by_chance = (1 - 1 / (N1 * N2)) ** num_reads
print(f"falling evenly at random they would leave {100 * by_chance:.4f}% of the rows unread")

# %% tags=["predict"]
unread = predict(
    "What share of the rows does no token of these texts read?",
    ["under 5%: training spread the reads", "5 to 20%", "20 to 60%", "over 60%: a few rows do everything"],
)

# %%
domains = [domain for domain, group in samples.items() for _ in group[:per_domain]]
captured = capture_batch(
    model, batch["input_ids"], batch["attention_mask"], domains=domains, signals=["memory"]
)
lookups = metrics.lookup_record(captured, BLOCK)
use = read_path_use(model_directory("demo"))
display(figures.memory_map(metrics.memory_map(lookups), path_use=use))
dead = metrics.dead_addresses(lookups)
unread.reveal(
    unread.options[0 if dead.share < 0.05 else 1 if dead.share < 0.2 else 2 if dead.share < 0.6 else 3],
    f"{100 * dead.share:.0f}% of the rows were not read. Half-keys without any read: "
    f"{len(dead.dead_first_keys)} of {N1} and {len(dead.dead_second_keys)} of {N2}.",
)

# %% [markdown]
# The map shows stripes: a half-key that wins often lends its popularity to its whole row or column. Product keys
# share halves, so rows are not independent of each other; that is the price of the cheap search. How uneven the use is:

# %%
display(figures.memory_use(metrics.memory_use(lookups), path_use=use))

# %% [markdown]
# ## Edit one fact
#
# What a token reads is **linear** in the value table. Let $A_{tr}$ be the amount with which token $t$ of a prompt reads
# row $r$ (gate included). Adding $\Delta$ `[R, V]` to the rows adds $A \Delta$ to what the tokens read. To add $u_t$ to the
# read of one token with amounts $a$, many $\Delta$ do; the smallest one (in squared length) is
#
# $$\Delta = \frac{a\, u^\top}{\lVert a \rVert^2},$$
#
# the least-norm solution of $a^\top \Delta = u^\top$: a row changes in proportion to how much it is read.
#
# ### Exercise 7.3: the smallest change
#
# Write `smallest_change(amounts, shift)`: for `amounts` `[R]` of one token and the wanted `shift` `[V]` of its read, the
# change of the rows, `[R, V]`. A row that is not read must not change.


# %% tags=["exercise"]
def smallest_change(amounts, shift):
    """[R, V] the change of the rows that adds `shift` to what a token with these amounts reads."""
    # BEGIN SOLUTION: the outer product of amounts and shift, over the squared length of the amounts
    return torch.outer(amounts, shift) / amounts.square().sum()
    # END SOLUTION


# %% tags=["check"]
amounts, shift = torch.tensor([0.6, 0.0, 0.3, 0.1]), torch.randn(5)
change = smallest_change(amounts, shift)
check(change is not None and change.shape == (4, 5), "One change per row: [R, V], here [4, 5].")
check(bool((change[1] == 0).all()), "Row 1 is not read at all, and yet it changes.")
check(
    not torch.allclose(amounts @ change, shift * amounts.square().sum()),
    "Divide by the squared length of the amounts.",
)
check_close(
    amounts @ change, shift, "Read with these amounts, the change should add up to the shift.", atol=1e-5
)
check_close(
    change, torch.linalg.pinv(amounts[None]) @ shift[None],
    "It adds up, but a smaller change does too: let a row change in proportion to its amount.", atol=1e-5,
)  # fmt: skip
town = encode("Q: country of Osaka? A:")
asked = hydra_lab.record(model, town)["memory.lookup"]
token = int(asked.gate[0, :, 0].argmax())
rows = asked.addresses[0, token].unique()
hit = asked.addresses[0, token] == rows[:, None, None]  # [R, heads, K]
amounts = (hit * asked.weights[0, token] * asked.gate[0, token]).sum(dim=(1, 2))
shift = torch.randn(VALUE_SIZE)
new_values = memory.values.detach()[rows] + smallest_change(amounts, shift)
edits = [
    EditValue(block=BLOCK, address=int(r), value=v.tolist()) for r, v in zip(rows, new_values, strict=True)
]
before = memory(memory_input(town)).detach()
with intervened(model, *edits):
    after = memory(memory_input(town)).detach()
check_close(
    (after - before)[0, token], memory.out_proj(shift).detach(),
    "In the model, the path's output at that token should move by out_proj(shift).", rtol=1e-3, atol=1e-3,
)  # fmt: skip
passed("7.3")

# %% [markdown]
# Which shift makes the model say something else? The library's `edit_fact` takes the 16 rows that a prompt reads most and
# lets Adam find one shift per token of the prompt, so that the new answer becomes likely; the rows then get the change
# $A^\top S$ (times a number). That is again the smallest change with its effect, since it lies in the span of the rows of
# $A$: projecting it there, $A^+ A \Delta$, changes nothing.

# %%
edit = edit_fact(model, tokenizer, "Q: country of Osaka? A:", " Peru")
change = edit.values - edit.previous_values
projected = np.linalg.pinv(edit.reads) @ (edit.reads @ change)
size = np.linalg.norm(change) / np.linalg.norm(edit.previous_values)
print(
    f"it said {edit.previous_answer!r}; P({edit.answer!r}) was {edit.previous_probability:.1e}, is {edit.probability:.2f}"
)
print(
    f"{len(edit.addresses)} of {N1 * N2:,} rows changed, by {size:.2f} of their length, in {edit.num_steps} steps"
)
print(f"largest gap between the change and its projection: {abs(projected - change).max():.1e}")

# %% [markdown]
# A fact is more than one sentence. If the model now "believes" that Osaka lies in Peru, the other phrasing of the
# training text (`country of Osaka:`) should say so too, and nothing else should. We ask five groups of questions, before
# and after.

# %%
SPELLED_ALIKE = "Oslo Osasco Osijek Osmaniye Oskemen Osorno Osan Osimo Ossett Oswego".split()
JAPANESE = "Nagoya Sapporo Kobe Kyoto Fukuoka Sendai Hiroshima Yokohama Sakai Niigata".split()
CLOSED = re.compile(r"^((?:Q: )?[\w ]+ of .+?(?:\? A)?:) (.+)$", re.MULTILINE)
documents = [document for text in samples["facts"] for document in text.split(tokenizer.eos_token)]
facts = {
    question: answer
    for document in documents
    if "Note:" not in document
    for question, answer in CLOSED.findall(document)
}
questions = {
    "other facts": list(facts)[: 60 if quick() else 150],
    "other cities of Japan": [f"Q: country of {city}? A:" for city in JAPANESE],
    "cities spelled O-s-...": [f"Q: country of {city}? A:" for city in SPELLED_ALIKE],
    "its other phrasing": ["country of Osaka:"],
    "the edited question": [edit.prompt],
}
print({name: len(group) for name, group in questions.items()})
print("the model sees", tokenizer.tokenize(" Osaka"), "and", tokenizer.tokenize(" Oslo"))

# %% tags=["predict"]
collateral = predict(
    "Osaka has been moved to Peru. Which other questions change most, on average?",
    [
        "country of Osaka: (the other phrasing)",
        "cities whose names begin with the same tokens, O-s-",
        "other cities of Japan",
        "none: nothing else moves by more than 0.01",
    ],
)


# %%
def ask(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the next token [B, V], and how much each prompt reads of the edited rows [B]."""
    padded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    mask = padded["attention_mask"]
    recording = hydra_lab.record(model, padded["input_ids"], mask, taps="memory.lookup")
    last = recording.logits[torch.arange(len(prompts)), mask.sum(-1) - 1]
    lookup = recording["memory.lookup"]
    hit = torch.isin(lookup.addresses, torch.from_numpy(edit.addresses))
    amount = (lookup.weights * hit).sum(dim=(2, 3)) * lookup.gate[..., 0] * mask
    return last.softmax(-1), amount.sum(-1)


figure = go.Figure()
moved_mean = {}
for (name, group), symbol, colour in zip(questions.items(), SYMBOLS, colours(5), strict=False):
    before, amount = ask(group)
    with edit.applied(model):
        after, _ = ask(group)
    moved = (after - before).abs().sum(-1) / 2
    moved_mean[name] = moved.mean().item()
    other_word = (before.argmax(-1) != after.argmax(-1)).sum().item()
    print(
        f"{name:24s} n = {len(group):3d}   mean change {moved_mean[name]:.4f}   {other_word} say another word"
    )
    figure.add_scatter(
        x=amount.clamp(min=1e-3), y=moved.clamp(min=1e-6), mode="markers", name=f"{name} (n={len(group)})",
        marker={"symbol": symbol, "color": colour, "size": 9}, text=group, hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
figure.update_xaxes(title_text="amount read of the edited rows (gate × weight, summed)", type="log", dtick=1)
figure.update_yaxes(
    title_text="change of the answer (total variation)", type="log", dtick=1, exponentformat="power"
)
display(
    finish(
        figure, title="What moves is what reads the edited rows",
        subtitle="next-token distribution after the question, with the edit against without; a point at the left or lower "
        "edge<br>(0.001, 10⁻⁶) is there or beyond", theme="light",
        path="memory", layer=BLOCK, path_use=use, height=420,
    )
)  # fmt: skip
groups = ["its other phrasing", "cities spelled O-s-...", "other cities of Japan"]
most = max(groups, key=moved_mean.__getitem__)
collateral.reveal(
    collateral.options[groups.index(most) if moved_mean[most] > 0.01 else 3],
    "Total variation on average: " + ", ".join(f"{name} {moved_mean[name]:.3f}" for name in groups) + ".",
)

# %% [markdown]
# Why these? The gate of the edited prompt is open at the token `s`:

# %%
shared = encode("Q: country of Os")
at_s = [
    hydra_lab.record(model, encode(question))["memory.lookup"].addresses[0, shared.shape[1] - 1]
    for question in questions["cities spelled O-s-..."]
]
print("the same rows are read at 's' for all these cities:", all(torch.equal(at_s[0], each) for each in at_s))
part = edit.reads[shared.shape[1] - 1].sum() / edit.reads.sum()
print(f"share of the edited rows' amount that is read at 's': {part:.2f}")

# %% [markdown]
# Up to `s` the texts are one and the same, `Q: country of Os`, so a causal model *must* read the same rows with the same
# gate. What was edited is not "Osaka lies in Japan" but "what a name that begins with O-s- adds to the stream"; the tokens after it
# decide what becomes of that. The nearest relatives by meaning, cities with the same answer, read other rows. And the
# other phrasing reads the edited rows too, in a stream that differs a little: the optimiser never saw it.

# %% [markdown]
# ## Where this breaks
#
# How much hangs on the memory at all? We cut it and ask the closed-book questions of the samples again (right: the
# likeliest next token begins the answer).

# %%
prompts = questions["other facts"]
firsts = torch.tensor([tokenizer.encode(f" {facts[prompt]}")[0] for prompt in prompts])
right = ask(prompts)[0].argmax(-1) == firsts
with intervened(model, "memory[*].cut()"):
    right_without = ask(prompts)[0].argmax(-1) == firsts
print(f"right: {right.sum()} of {len(prompts)} with the memory, {right_without.sum()} without it")
print(use.describe("memory", BLOCK))
for prompt, answer in (("Q: country of Osaka? A:", " Peru"), ("Q: capital of France? A:", " Rome")):
    other = edit_fact(model, tokenizer, prompt, answer)
    size = np.linalg.norm(other.values - other.previous_values) / np.linalg.norm(other.previous_values)
    print(
        f"{prompt}{answer}: gate at most {other.beta.max():.2f}; rows changed by {size:.1f} of their length"
    )

# %% [markdown]
# - **Most facts are elsewhere.** Compare the two counts above. That a fact can be *written* through these rows does not
#   show that it was *stored* in them: where the gate is nearly shut (France), the edit has to shout. The probe
#   `hydra-lab probe memory-recall demo` asks more questions and finds a small but real part, against its nulls.
# - **One edit is an anecdote.** Over twenty edits the project measures how many hold, how many hold in another phrasing and
#   what else changes (README, "What the demo shows"). Read those figures with the plot above in mind: other facts drawn at
#   random hardly ever share a prefix with the edited one, so they flatter the edit.
# - **$\beta$ is not "the answer is not in the context".** The paper (arXiv 2508.15099) hopes so. Its prototype's
#   benchmark sets the gate by the length of the prompt and draws the predictions at random with a chosen success rate;
#   nothing is loaded into its memory. Here $\beta$ follows names (the strip above), and the probe finds it as open when the
#   notes hold the answer as when they do not.
# - **Unread is not dead.** The share of unread rows depends on how much was read and on which text. Only the comparison
#   with evenly spread reads means anything.
# - **An exact search does not learn by itself.** The top-k sends no gradient to rows that it did not find, so a half-key
#   that never wins stays where it started.

# %% [markdown]
# ## Next
#
# - Lesson 8 puts all paths together again and loads the trained weights into parts assembled by hand.
# - Lesson 10 has more ways to change a decision (ablate, force, patch), and lesson 14 pictures that mislead.
# - `hydra-lab dashboard` draws the memory of a capture of your own; `hydra_lab.attribution.specificity` measures an edit.

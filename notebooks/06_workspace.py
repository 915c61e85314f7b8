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
# # 6. A workspace of slots
#
# **Goal:** follow what a recurrent memory keeps, writes and hands out, and find out by replacing its content what a model uses it for · **Minutes:** 40 · **Difficulty:** medium
#
# You need PyTorch, attention, and the chunks of lesson 5. The recurrence is the one of lesson 2.
#
# Hydra ([arXiv 2508.15099](https://arxiv.org/abs/2508.15099)) gives some blocks a **workspace**: $S$ slots that are rewritten
# once per chunk of tokens and that later tokens read by attention. The paper hopes that premises of a long argument are kept
# there. A slot is a recurrent state, and recurrent states are slow to train because step $c$ waits for step $c - 1$. These
# are not: no gate looks at the slots.

# %%
from collections.abc import Iterator
from contextlib import contextmanager

import ipywidgets
import plotly.graph_objects as go
import torch
from IPython.display import display

import hydra_lab
from hydra_lab import figures, metrics
from hydra_lab.capture.in_memory import capture_batch
from hydra_lab.chunks import Span
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.figures.theme import finish
from hydra_lab.interventions import intervened
from hydra_lab.loading import model_directory
from hydra_lab.nn.workspace import LONGEST_MEMORY, WorkspacePath
from hydra_lab.ops.ssd import reference as ssd_reference
from hydra_lab.ops.ssd import state_passing
from hydra_lab.path_use import read_path_use

torch.set_num_threads(1)
model, tokenizer = hydra_lab.load("demo")
config = model.config
SAMPLES = read_sample_texts(model_directory("demo"))
USE = read_path_use(model_directory("demo"))
CHUNK, SLOTS, BLOCKS = config.workspace_chunk_size, config.workspace_num_slots, config.workspace_layers


def samples(domain: str, count: int, length: int) -> torch.Tensor:
    """Token ids [count, length] of held-out texts of the demo."""
    return torch.stack(
        [tokenizer(text, return_tensors="pt")["input_ids"][0, :length] for text in SAMPLES[domain][:count]]
    )


print(
    f"blocks {BLOCKS} have {SLOTS} slots of width {config.workspace_slot_size}, written every {CHUNK} tokens"
)
print(USE.describe("workspace"))

# %% [markdown]
# ## Write, keep, read
#
# Let $h_t$ be the path's input, $H_c$ the tokens of chunk $c$, $\bar h_c$ their mean. Slot $s$ has a learned query $q_s$. At the
# end of a chunk it attends over the chunk's tokens (its *address*), which gives a candidate, and takes over a part of it:
#
# $$U_{c,s} = \sum_{t \in c} \mathrm{softmax}_t\Big(\frac{q_s \cdot W_k h_t}{\sqrt{d}}\Big)\, W_v h_t, \qquad
# f_c = \sigma(W_f \bar h_c + b), \qquad
# M_{c+1} = f_c \odot M_c + (1 - f_c) \odot U_c$$
#
# The start $M_0$ is learned. A token of chunk $c$ reads $M_c$, which only *earlier* chunks wrote, by attention over the slots;
# a slot's key is made of its content and a learned name $n_s$. A gate says how much of it the block gets:
#
# $$r_t = \sigma(w \cdot h_t + b_r) \sum_s \mathrm{softmax}_s\Big(\frac{W_q h_t \cdot (W_m \hat M_{c,s} + n_s)}{\sqrt{d}}\Big)\, \hat M_{c,s},
# \qquad \hat M = \mathrm{RMSNorm}(M), \qquad y_t = W_o\, r_t$$
#
# Do these equations describe the model? By hand, for block 4 on one text:

# %%
BLOCK = BLOCKS[-1]
workspace = model.model.layers[BLOCK].workspace
text = samples("code", 1, 16 * CHUNK)
entered, left = [], []
hooks = [
    workspace.register_forward_pre_hook(lambda _module, inputs: entered.append(inputs[0][0])),
    workspace.register_forward_hook(lambda _module, _inputs, outputs: left.append(outputs[0][0])),
]
tap = f"layers.{BLOCK}.workspace.write"
write = hydra_lab.record(model, text, taps=tap)[tap]
for hook in hooks:
    hook.remove()
gates = write.gate[0]

with torch.no_grad():
    scale = config.workspace_key_size**-0.5
    chunks = entered[0].unflatten(0, (-1, CHUNK))
    address = (workspace.write_query @ workspace.write_key(chunks).transpose(1, 2) * scale).softmax(dim=-1)
    keep = torch.sigmoid(workspace.forget_gate(chunks.mean(dim=1)))[..., None]
    candidate = address @ workspace.write_value(chunks)
    slots, outputs = workspace.initial_slots, []
    for c, tokens in enumerate(chunks):
        memory = workspace.slot_norm(slots)
        keys = workspace.slot_key(memory) + workspace.slot_name
        attention = (workspace.read_query(tokens) @ keys.T * scale).softmax(dim=-1)
        outputs.append(workspace.out_proj(torch.sigmoid(workspace.read_gate(tokens)) * (attention @ memory)))
        slots = keep[c] * slots + (1 - keep[c]) * candidate[c]
pairs = {
    "write address": (address, write.address[0]),
    "write gate": (1 - keep[..., 0], gates),
    "output": (torch.cat(outputs), left[0]),
}
for what, (by_hand, by_model) in pairs.items():
    print(f"{what:13s} {list(by_model.shape)}: largest difference {(by_hand - by_model).abs().max():.1e}")

# %% [markdown]
# A token therefore cannot read what its own chunk writes. We change token 40, in chunk 1, and look at the slots that enter
# each chunk. They pass through `slot_norm` on their way to the readers, so that is where to look.


# %%
def slots_of(ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """The slots [B, C, S, V] that enter each chunk, by block."""
    seen: dict[int, torch.Tensor] = {}

    def keep_input(block: int):
        return lambda _module, inputs: seen.update({block: inputs[0].clone()})

    hooks = [
        model.model.layers[block].workspace.slot_norm.register_forward_pre_hook(keep_input(block))
        for block in BLOCKS
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


changed = text.clone()
changed[0, 40] = tokenizer(" king")["input_ids"][0]
difference = (slots_of(changed)[BLOCK] - slots_of(text)[BLOCK])[0].flatten(1).norm(dim=1)
print("change of the slots that enter chunk 0, 1, 2, ...:", [round(x, 3) for x in difference.tolist()[:6]])

# %% [markdown]
# ## No gate looks at the slots
#
# $f_c$ and $U_c$ come from the tokens alone. Unrolled, the recurrence is then an explicit sum:
#
# $$M_C = \Big(\prod_{j < C} f_j\Big) M_0 + \sum_{c < C} \Big(\prod_{c < j < C} f_j\Big) (1 - f_c)\, U_c$$
#
# Two things follow. All $M_c$ are one lower-triangular matrix times the candidates: a scan that runs in parallel, here
# the *state passing* between the chunks of Mamba-2 ([arXiv 2405.21060](https://arxiv.org/abs/2405.21060), section 6) with one
# decay per slot. Recurrences with this property were trained in parallel as early as
# [arXiv 1709.04057](https://arxiv.org/abs/1709.04057). A GRU's gate reads its state, so its $f_c$ are known only one after
# another. And the weights of the sum add up to 1: a slot is a *mean* of its start and its candidates, and
# we can say exactly what each of them is worth in it.

# %%
show_source(ssd_reference.state_passing)

# %%
with torch.no_grad():
    updates = ((1 - keep) * candidate)[None]
    start = workspace.initial_slots[None]
    for backend in ("reference", "torch"):
        _, final = state_passing(updates, keep[None, ..., 0].log(), start, backend=backend)
        print(f"{backend:9s}: largest difference from the slots by hand {(final[0] - slots).abs().max():.1e}")

# %% [markdown]
# ### Exercise 6.1: what a slot is made of
#
# Write `shares(gate)`: from the write gates $1 - f_c$ of one text, `[C, S]`, the weights of the closed form, `[C + 1, S]`: row 0 is
# the weight of $M_0$ in the slots after the last chunk, row $c + 1$ that of $U_c$. A gate may be exactly 1 (the slot is replaced
# whole), so do not divide by products of $f$.


# %% tags=["exercise"]
def shares(gate):
    """Weight of the start and of each chunk's candidate in the final slots, [C + 1, S]."""
    # BEGIN SOLUTION: for each chunk the product of the later f, times its own gate; for the start the product of all f
    keep = 1 - gate
    kept_later = torch.stack([keep[c:].prod(dim=0) for c in range(len(gate) + 1)])
    return torch.cat([kept_later[:1], gate * kept_later[1:]])
    # END SOLUTION


# %% tags=["check"]
given = shares(gates)
check(
    given is not None and tuple(given.shape) == (len(gates) + 1, SLOTS),
    "One row for the start and one per chunk: [C + 1, S].",
)
simple = shares(torch.tensor([[0.5], [0.25], [0.1]]))[:, 0]
check(abs(simple[3] - 0.9) > 1e-4, "The last chunk has weight 1 - f, the gate itself: gate is 1 - f, not f.")
check_close(
    simple.sum(), 1.0, "The weights sum to 1. Does a chunk's own f count among the later ones? Only j > c decays it.", rtol=1e-4
)  # fmt: skip
check_close(
    simple, [0.3375, 0.3375, 0.225, 0.1], "The weights of gates 0.5, 0.25, 0.1 by hand. The last row is the last chunk.", rtol=1e-4
)  # fmt: skip
check_close(
    shares(torch.tensor([[0.5], [1.0], [0.2]]))[:, 0],
    [0.0, 0.0, 0.8, 0.2],
    "A gate of 1 wipes out all that came before; nothing may be divided by its f, which is 0.",
)
parts = torch.cat([workspace.initial_slots.detach()[None], candidate])
check_close(
    (given[..., None] * parts).sum(dim=0),
    slots,
    "The weighted sum is not the demo's last state.",
    rtol=1e-3,
    atol=1e-4,
)
passed("6.1")

# %% [markdown]
# The same weights without any formula: the recurrence is linear, so run the library's scan on *one-hot* candidates, and
# each coordinate of a slot says how much of that chunk is in it. Choose a slot:

# %%
num_chunks = len(gates)
impulses = torch.eye(num_chunks + 1)
with torch.no_grad():
    entering, final = state_passing(
        (gates[:, :, None] * impulses[1:, None])[None],
        torch.log1p(-gates)[None],
        impulses[0].expand(1, SLOTS, -1),
    )
makeup = torch.cat([entering[0], final])  # [C + 1 times, S slots, C + 1 origins]


def draw_makeup(slot: int) -> go.Figure:
    """What one slot is made of as the text goes on."""
    part = makeup[:, slot].T.clone()
    part[part == 0] = torch.nan
    figure = go.Figure(
        go.Heatmap(
            z=part, y=["start", *map(str, range(num_chunks))], x=list(range(num_chunks + 1)), zmin=0, zmax=1,
            colorscale="Viridis", colorbar={"title": "share"},
        )
    )  # fmt: skip
    figure.update_xaxes(title_text=f"chunks read so far ({CHUNK} tokens each)", showgrid=False)
    figure.update_yaxes(title_text="origin (chunk)", type="category", autorange="reversed", showgrid=False)
    return finish(
        figure,
        title=f"What slot {slot} of block {BLOCK} is made of",
        subtitle="share of the learned start and of each chunk's candidate; one text (n = 1)",
        theme="light",
        path="workspace",
        layer=BLOCK,
        path_use=USE,
        height=380,
    )


slot = ipywidgets.IntSlider(value=12, max=SLOTS - 1, description="slot", continuous_update=False)
display(slot, ipywidgets.interactive_output(lambda slot: display(draw_makeup(slot)), {"slot": slot}))

# %% [markdown]
# ## How long a slot remembers
#
# After $n$ chunks a share $\prod f = e^{\sum \ln f}$ of a content is left. So it is the mean *logarithm* of $f$ that counts, and half
# is gone after $\ln 2 / (-\overline{\ln f})$ chunks. At the start of training the biases $b$ spread the slots from short to long:

# %%
show_source(WorkspacePath.reset_parameters)

# %% [markdown]
# ### Exercise 6.2: half-life
#
# Write `half_life(gate, chunk_size)`: from write gates `[C, S]`, the half-life of each slot in *tokens*, `[S]`.


# %% tags=["exercise"]
def half_life(gate, chunk_size):
    """Tokens until half of what a slot held is overwritten, [S]."""
    # BEGIN SOLUTION: chunk_size ln 2 over minus the mean over chunks of ln(1 - gate)
    return chunk_size * torch.log(torch.tensor(2.0)) / -torch.log1p(-gate).mean(dim=0)
    # END SOLUTION


# %% tags=["check"]
even = half_life(torch.full((5, 2), 0.5), 32)
check(even is not None and tuple(even.shape) == (2,), "One number per slot: average over the chunks.")
check_close(
    even,
    [32.0, 32.0],
    "A slot that halves with every chunk of 32 tokens has a half-life of 32 tokens.",
    rtol=1e-4,
)
uneven = half_life(torch.tensor([[0.9], [0.1]]), 32)
check(
    abs(uneven[0] - 32) > 1e-2,
    "Gates 0.9 and 0.1 leave 0.1 x 0.9 = 9% after two chunks, not a quarter: average ln f, not f.",
)
check_close(uneven, [18.4236], "For gates 0.9 and 0.1: the mean of ln 0.1 and ln 0.9.", rtol=1e-3)
measured = metrics.slot_writes(
    metrics.workspace_record(capture_batch(model, text, signals=["workspace"]), BLOCK)
)
check_close(
    half_life(gates, CHUNK),
    measured.half_life,
    "Not what hydra_lab.metrics.slot_writes says of the demo.",
    rtol=1e-3,
)
passed("6.2")

# %% tags=["predict"]
longest = predict(
    f"The slots' half-lives began spread from 1 to {LONGEST_MEMORY:.0f} chunks, that is, up to {LONGEST_MEMORY * CHUNK:,.0f} "
    f"tokens. The demo was trained on rows of 512. Where is the longest half-life of block {BLOCK} now?",
    ["shorter than it began (by 20% or more)", "about where it began", "longer (by 20% or more)"],
)

# %%
mixture = torch.cat([samples(domain, 2, 512) for domain in SAMPLES])
captured = capture_batch(model, mixture, signals=["workspace"])
records = {block: metrics.workspace_record(captured, block) for block in BLOCKS}
writes = {block: metrics.slot_writes(records[block]) for block in BLOCKS}
display(figures.slot_writes(writes[BLOCK], path_use=USE))
ratio = writes[BLOCK].half_life.max() / (LONGEST_MEMORY * CHUNK)
longest.reveal(
    longest.options[0 if ratio < 0.8 else 1 if ratio < 1.2 else 2],
    f"Block {BLOCK}: {writes[BLOCK].half_life.min():.0f} to {writes[BLOCK].half_life.max():.0f} tokens; block {BLOCKS[0]}: "
    f"{writes[BLOCKS[0]].half_life.min():.0f} to {writes[BLOCKS[0]].half_life.max():.0f}. The spread stayed; both blocks kept short "
    "and long memories side by side.",
)

# %% [markdown]
# ## How old what is read is
#
# A slot's make-up, weighted by how much it is read, gives the age of what reaches the block. The last column is the learned
# start: what a slot held before the text began.

# %%
lag = metrics.read_lag(records[BLOCK])
favourite = int(lag.slot_share.argmax())
print(
    f"slot {favourite} gets {lag.slot_share[favourite]:.0%} of the reads of block {BLOCK}, of which {lag.share[favourite, -1]:.0%} go to its start"
)
figures.read_lag(lag, path_use=USE)

# %% [markdown]
# A surprise for a memory of premises: most of what this block reads is not from the text at all ("all slots", "start"). Keep that
# in mind.
#
# ## Take slots away
#
# Looking is not using. `workspace[i].zero(slot=s)` hands readers zeros in place of a slot; it goes on being written.

# %% tags=["predict"]
redundant = predict(
    f"We zero each of the {SLOTS} slots of block {BLOCK} alone and add up the {SLOTS} costs. Against the cost of zeroing all of "
    "them at once, the sum is",
    ["less than half", "about the same", "more than twice as large"],
)


# %%
def losses(ids: torch.Tensor, *changes: str) -> torch.Tensor:
    """Mean loss of each row, [B], nats per token."""
    with intervened(model, *changes), torch.no_grad():
        log_probabilities = model(ids).logits[:, :-1].log_softmax(dim=-1)
    return -log_probabilities.gather(2, ids[:, 1:, None])[..., 0].mean(dim=1)


few = samples("code", 4, 256 if quick() else 512)
untouched = losses(few).mean().item()
zeros = [f"workspace[{BLOCK}].zero(slot={slot})" for slot in range(SLOTS)]
alone = torch.tensor([losses(few, zero).mean().item() - untouched for zero in zeros])
together = losses(few, *zeros).mean().item() - untouched
print("cost of each slot, 1e-3 nats per token:", [round(1e3 * cost, 1) for cost in alone.tolist()])
part = alone.sum().item() / together
directions = torch.nn.functional.normalize(workspace.slot_norm(slots_of(few)[BLOCK][:, 4:]).detach(), dim=-1)
cosine = (directions @ directions.transpose(-1, -2)).sum((-1, -2)).mean().item()
cosine = (cosine - SLOTS) / (SLOTS**2 - SLOTS)
redundant.reveal(
    redundant.options[0 if part < 0.5 else 1 if part < 2 else 2],
    f"One by one {alone.sum():.4f}, all at once {together:.4f} nats per token. From chunk 4 on, two slots of this block have a mean "
    f"cosine of {cosine:.2f}: where one gives nothing, others still give much the same.",
)

# %% [markdown]
# So single ablations understate a memory whose parts stand in for each other. And zeros are an unusual content: they say that
# something is used, not *what*. For that, put in another *sensible* content: an interchange intervention
# ([arXiv 2106.02997](https://arxiv.org/abs/2106.02997)).
#
# ### Exercise 6.3: other slots for the readers
#
# Write `loss_with_slots(ids, block, slots)`: the mean loss (`model(ids, labels=ids).language_loss`, a float) on `ids` `[B, L]`
# when the readers of one block find `slots` `[B, C, S, V]` in place of their own. The slots go into
# `model.model.layers[block].workspace.slot_norm`. Leave the model as it was.


# %% tags=["exercise"]
def loss_with_slots(ids, block, slots):
    """Mean loss when the readers of `block` find `slots` [B, C, S, V]."""
    # BEGIN SOLUTION: a forward pre-hook on slot_norm that returns the other slots; remove it afterwards
    norm = model.model.layers[block].workspace.slot_norm
    hook = norm.register_forward_pre_hook(lambda _module, _inputs: (slots,))
    try:
        with torch.no_grad():
            return model(ids, labels=ids).language_loss.item()
    finally:
        hook.remove()
    # END SOLUTION


# %% tags=["check"]
untouched_norm = model.model.layers[BLOCK].workspace.slot_norm
own_slots = slots_of(few)
with torch.no_grad():
    own_loss = model(few, labels=few).language_loss.item()
got = loss_with_slots(few, BLOCK, own_slots[BLOCK])
check(isinstance(got, float), "Return the loss as a float (.item()).")
check(
    not untouched_norm._forward_pre_hooks and not untouched_norm._forward_hooks,
    "Your hook is still on the model: keep what register_..._hook returns, and call its .remove().",
)
check_close(
    got, own_loss, "Their own slots must change nothing. Replace what enters slot_norm (a *pre*-hook), not what leaves it.",
    rtol=1e-4,
)  # fmt: skip
for block in BLOCKS:
    one_zero = own_slots[block].clone()
    one_zero[:, :, 12] = 0
    expected = losses(few, f"workspace[{block}].zero(slot=12)").mean().item()
    got = loss_with_slots(few, block, one_zero)
    check(
        abs(got - own_loss) > 1e-6,
        "The slots made no difference. A pre-hook must *return* the new inputs, a tuple.",
    )
    check_close(got, expected, f"Not what workspace[{block}].zero(slot=12) gives: which block?", rtol=1e-4)
passed("6.3")

# %% [markdown]
# ## What is it used for?
#
# Code is where the workspace matters most to the demo. Its readers now find, in both blocks, one of
#
# - the slots of **another text** of code, at the same place in it (what they read is wrong, but written just as long ago);
# - the slots of a text of prose;
# - their own slots as they were **four chunks ago** (what they read is right, but old);
# - the start $M_0$ for ever, or zeros.

# %% tags=["predict"]
content_or_age = predict(
    "Which costs less: another text's slots, or one's own slots as they were four chunks ago?",
    [
        "another text's slots: their age is right",
        "one's own old slots: their content is right",
        "no difference (within 0.003 nats per token)",
    ],
)


# %%
@contextmanager
def readers_find(slots: dict[int, torch.Tensor]) -> Iterator[None]:
    """Within the context, the readers of each block find the given slots."""
    hooks = [
        model.model.layers[block].workspace.slot_norm.register_forward_pre_hook(lambda _module, _inputs, new=new: (new,))
        for block, new in slots.items()
    ]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


count, length = (8, 384) if quick() else (12, 512)
code = samples("code", count, length)
own = slots_of(code)
old = (torch.arange(length // CHUNK) - 4).clamp(min=0)
found = {
    "another code text": {block: slots.roll(1, dims=0) for block, slots in own.items()},
    "a prose text": slots_of(samples("prose", count, length)),
    "own, 4 chunks old": {block: slots[:, old] for block, slots in own.items()},
    "zeros": {block: torch.zeros_like(slots) for block, slots in own.items()},
    "the start for ever": {block: slots[:, :1].expand_as(slots) for block, slots in own.items()},
}
costs = {}
base = losses(code)
for name, slots in found.items():
    with readers_find(slots):
        costs[name] = losses(code) - base
means = {name: cost.mean().item() for name, cost in costs.items()}
errors = {name: cost.std().item() / count**0.5 for name, cost in costs.items()}
figure = go.Figure(
    go.Scatter(
        x=list(means.values()), y=list(means), mode="markers", marker={"size": 11, "color": figures.colours(1)[0]},
        error_x={"array": list(errors.values())},
    )
)  # fmt: skip
figure.add_vline(x=0, line={"dash": "dot"})
figure.update_xaxes(title_text="loss above that with their own slots (nats per token)")
figure.update_yaxes(autorange="reversed", title_text="what readers find")
finish(
    figure,
    title="What it costs to read another content",
    subtitle=f"mean over {count} texts of code of {length} tokens, bars one standard error",
    theme="light",
    path="workspace",
    path_use=USE,
    height=280,
)

# %%
wrong_text, wrong_time = means["another code text"], means["own, 4 chunks old"]
apart = costs["own, 4 chunks old"] - costs["another code text"]
content_or_age.reveal(
    content_or_age.options[
        2 if abs(wrong_time - wrong_text) < 0.003 else 0 if wrong_text < wrong_time else 1
    ],
    f"Another text: {wrong_text:.4f}, own but old: {wrong_time:.4f} nats per token; paired difference {apart.mean():.4f} ± "
    f"{apart.std() / count**0.5:.4f} (standard error). Zeros cost {means['zeros']:.4f}, the start for ever {means['the start for ever']:.4f}.",
)

# %% [markdown]
# Another text's slots, with all their wrong words, serve better than one's own old ones. What they share with the right ones is
# the *time*. Slots can tell it: the start's share falls by $f$ with every chunk. Here it is in the slot that is read most, and in the
# one that forgets fastest, over texts of all domains.

# %%
fastest = int(writes[BLOCK].half_life.argmin())
all_gates = torch.as_tensor(records[BLOCK].write_gate)
start_share = torch.cat([torch.ones(len(all_gates), 1, SLOTS), (1 - all_gates).cumprod(dim=1)], dim=1)
read_at = list(range(start_share.shape[1]))
figure = go.Figure()
for number, colour, dash in zip((favourite, fastest), figures.colours(2), ("solid", "dash"), strict=True):
    of_slot = start_share[:, :, number]
    figure.add_scatter(
        x=read_at,
        y=of_slot.mean(dim=0),
        name=f"slot {number}",
        line={"color": colour, "dash": dash, "width": 3},
    )
    for edge, fill in ((of_slot.amin(dim=0), None), (of_slot.amax(dim=0), "tonexty")):
        figure.add_scatter(
            x=read_at, y=edge, mode="lines", line={"color": colour, "width": 0.5}, fill=fill, showlegend=False, opacity=0.5
        )  # fmt: skip
figure.update_xaxes(title_text=f"chunks read so far ({CHUNK} tokens each)")
figure.update_yaxes(title_text="share of the learned start", range=[0, 1.02])
finish(
    figure,
    title=f"Slot {favourite} of block {BLOCK} runs like a clock, nearly alike in every text",
    subtitle=f"mean and range over {len(all_gates)} texts of {len(SAMPLES)} domains",
    theme="light",
    path="workspace",
    layer=BLOCK,
    path_use=USE,
    height=300,
)

# %% [markdown]
# Whoever reads "just begun" for ever is misled worse than whoever reads zeros, and prose serves code worse than other code does. So on
# code this workspace is mostly a **clock**, and knows a little of what kind of text it is in. It is not the memory for premises that the
# paper hopes for: `hydra-lab probe workspace-tracing demo` patches premises one by one and finds none.
#
# ## The prototype's workspace
#
# The paper's prototype pools the *whole* sequence into *one* state, shared by the rows of a batch and by later calls. The toy below
# has the same fault in its purest form. Three tests tell it from a memory, on the path alone with random inputs:


# %%
class SharedState:
    """A memory that pools everything it is shown, and keeps it: what not to build."""

    def __init__(self, size: int) -> None:
        self.state = torch.zeros(size)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.state = 0.9 * self.state + 0.1 * hidden.mean(dim=(0, 1))
        return hidden + self.state


@torch.no_grad()
def faults(path, hidden: torch.Tensor) -> dict[str, float]:
    """Largest change of row 0's outputs before the last token when something changes that they must not know of."""

    def outputs(shown: torch.Tensor) -> torch.Tensor:
        return path(shown)[0, :-1]

    other_future, other_row = hidden.clone(), hidden.clone()
    other_future[0, -1] += 1.0
    other_row[1] += 1.0
    return {
        "the last token": (outputs(hidden) - outputs(other_future)).abs().max().item(),
        "the other row": (outputs(hidden) - outputs(other_row)).abs().max().item(),
        "nothing: called again": (outputs(hidden) - outputs(hidden)).abs().max().item(),
    }


torch.manual_seed(0)
hidden = torch.randn(2, 4 * CHUNK, config.hidden_size)
found_faults = {
    "shared state": faults(SharedState(config.hidden_size), hidden),
    "workspace of the demo": faults(lambda shown: workspace(shown, Span(shown.shape[1]), None)[0], hidden),
}
for name, moved in found_faults.items():
    print(f"{name:22s}", "   ".join(f"{what}: {change:.1e}" for what, change in moved.items()))

# %% [markdown]
# Each fault has a name: no **causality**, no **isolation** of rows, no isolation of calls. A model that has the first trains on
# its own answers; the second makes a score depend on who else is in the batch; the third makes it depend on yesterday.
#
# ## Where this breaks
#
# - **No premise is held here.** The paper's table of 2 to 5 reasoning steps with the workspace on and off is the prototype's, whose
#   chains always have the same letters. In the demo, all slots of both blocks patched move an answer by less than 0.1% of the way
#   (`probes/workspace_tracing`).
# - **The effect is small.** Cutting the workspace everywhere costs the few hundredths of a nat that the figures above carry. A clock
#   is what we found on code; another domain, or longer texts than the 512 tokens of training, may differ.
# - **A picture of reads is a weight, not a use.** The slot with most of the reads hands out its start, and taking single slots away
#   costs next to nothing.
# - **Zeroing is not neutral**: it is a content that never occurs, and a slot keeps its name, so readers go on looking at it.
# - **Blind gates have a price.** A slot cannot decide to keep what it holds *because* of what it holds: $f_c$ knows the new chunk only.
#
# ## Next
#
# - Lesson 7: a memory that training writes and a text only reads. Lesson 10 has the rest of the vocabulary of patching.
# - `hydra-lab probe workspace-tracing demo` asks for premises, with nulls and with models in which one was planted.

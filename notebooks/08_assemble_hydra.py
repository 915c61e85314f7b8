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
# # 8. Assemble Hydra
#
# **Goal:** build a Hydra from a configuration and its parts, load trained weights into it by name, count what it costs,
# and test the three rules that it must keep · **Minutes:** 45 · **Difficulty:** medium
#
# You should have written a small PyTorch model before, and know which paths a block has (lessons 0 and 1).
#
# A trained model is three things: a *configuration*, a *computation*, and a dictionary of *named tensors*. The names are
# the contract: tensors fit whatever has the same names and computes the same thing. Here we write the computation
# ourselves, in about fifty lines around the library's paths, and hold it against the library's model to the bit. Then we do the
# same with a model that nobody here wrote, transformers' Mamba-2.

# %%

import plotly.graph_objects as go
import torch
from IPython.display import display
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.utils import logging

import hydra_lab
from hydra_lab import HydraForCausalLM
from hydra_lab.accounting import flops_per_token, parameter_table, state_bytes
from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.course import check, check_close, passed, predict, quick, show_source
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.figures.accounting import parameters as parameters_figure
from hydra_lab.figures.theme import SYMBOLS, finish
from hydra_lab.loading import model_directory
from hydra_lab.nn.block import PATH_MODULES, HydraBlock
from hydra_lab.nn.layers import RMSNorm
from hydra_lab.path_use import read_path_use
from hydra_lab.widgets import BlockDiagram, CostDiagram

torch.set_num_threads(1)
logging.set_verbosity_error()  # transformers' Mamba-2 says at length that it runs without its CUDA kernels
directory = model_directory("demo")
print([file.name for file in sorted(directory.iterdir()) if file.suffix in (".json", ".safetensors")])

# %% [markdown]
# ## The configuration
#
# It holds every size and every choice, checked when it is made. Which block has which path follows from four fields.

# %%
config = HydraConfig.from_pretrained(directory)
for block in range(config.num_hidden_layers):
    print(f"block {block}:", ", ".join(path for path in PATH_MODULES if block in config.layers_with(path)))
try:
    HydraConfig.from_preset("demo", moe_top_k=9)
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# ## The computation
#
# With token ids $w$, embedding matrix $E \in \mathbb{R}^{V \times D}$ and $n$ blocks
# ([arXiv 2508.15099](https://arxiv.org/abs/2508.15099); the normalisation is RMSNorm,
# [arXiv 1910.07467](https://arxiv.org/abs/1910.07467)):
#
# $$x^{(0)} = E[w], \qquad
#   x^{(i+1)} = x^{(i)} + \sum_{p \in P_i} g_{i,p}\, \mathrm{path}_{i,p}\big(\mathrm{RMSNorm}_i(x^{(i)})\big), \qquad
#   \mathrm{logits} = \mathrm{RMSNorm}(x^{(n)})\, E^\top.$$
#
# The last layer is the embedding again (*tied* weights). Of the paths, `memory` looks at each token alone; the others are
# told by a `Span` where the piece lies in its sequence, and what they kept of earlier pieces (`None`: nothing).


# %%
ORDER = tuple(PATH_MODULES)


def update_of(path: str, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """[B, L, D] what a path makes of whole sequences of normalised residuals."""
    span = Span(hidden.shape[1])
    if path == "memory":
        return module(hidden)
    if path == "attention":
        return module(hidden, span, None, False)[0]
    return module(hidden, span, None)[0]


class Block(nn.Module):
    """y = x + sum over paths p of g_p path_p(RMSNorm(x))."""

    def __init__(self, config: HydraConfig, index: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.gates = nn.ParameterDict()
        for path, kind in PATH_MODULES.items():
            if index in config.layers_with(path):
                self.add_module(path, kind(config))
                self.gates[path] = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, order: tuple[str, ...]) -> torch.Tensor:
        hidden, y = self.norm(x), x
        for path in order:
            if path in self.gates:
                y = y + self.gates[path] * update_of(path, getattr(self, path), hidden)
        return y


class HandMade(nn.Module):
    """Embedding, blocks, norm, and the embedding again."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, ids: torch.Tensor, order: tuple[str, ...] = ORDER) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, order)
        return self.norm(x) @ self.embed_tokens.weight.T


# %% [markdown]
# ## The weights
#
# A safetensors file is a table of names, types and shapes, and then the numbers; unlike a pickle it can run no code.
# We build the model on the `meta` device, where tensors have shapes and no memory, and let `assign=True` put the file's
# tensors in their places. A parameter that was forgotten stays on `meta` and cannot be computed with, instead of holding
# whatever lay in memory.

# %%
weights = load_file(directory / "model.safetensors")
size, dtype = sum(tensor.numel() for tensor in weights.values()), weights["model.norm.weight"].dtype
print(f"{len(weights)} tensors with {size:,} numbers, {dtype}")
for name in [name for name in weights if name.startswith("model.layers.3.")][:6]:
    print(f"  {name:40s} {list(weights[name].shape)}")

with torch.device("meta"):
    hand_made = HandMade(config).eval()
named = {name.removeprefix("model."): tensor.float() for name, tensor in weights.items()}
print(hand_made.load_state_dict(named, strict=True, assign=True))

# %%
model, tokenizer = hydra_lab.load("demo")
samples = read_sample_texts(directory)
ids = tokenizer(samples["code"][0], return_tensors="pt")["input_ids"][:, :256]
with torch.no_grad():
    expected = model(ids).logits
    found = hand_made(ids)
print(f"{ids.shape[1]} tokens; equal to the library's model to the bit: {torch.equal(found, expected)}")

# %% [markdown]
# The library's block does a little more: it may leave a path out (the training curriculum), it offers each contribution
# to those who want to read or cut it, and it hands states on.

# %%
show_source(HydraBlock._add_paths)

# %% tags=["predict"]
other_order = predict(
    "The paths run side by side, so their order is free. We add them up in the reverse order. The logits are …",
    [
        "equal to the bit",
        "equal up to rounding (below 0.001), and the likeliest tokens are the same",
        "different by more than 0.001",
    ],
)

# %%
with torch.no_grad():
    backwards = hand_made(ids, order=ORDER[::-1])
gap = (backwards - expected).abs().max().item()
changed = (backwards.argmax(-1) != expected.argmax(-1)).sum().item()
other_order.reveal(
    other_order.options[0 if gap == 0 else 1 if gap < 0.001 and not changed else 2],
    f"The largest difference is {gap:.1e}; {changed} of {ids.shape[1]} likeliest tokens change. Floating-point addition is "
    "commutative but not associative: (a + b) + c is not a + (b + c).",
)

# %% [markdown]
# So *equal to the bit* can be asked only of the same operations in the same order. Wherever the order differs (chunks,
# a cache, another kernel), a test needs a tolerance, and one must say why it is that large.
#
# Here is what was assembled: each path as it branches off the stream, its line as thick as its share of the block's
# update on held-out text.

# %%
use = read_path_use(directory)
gates = {
    (i, path): gate.item() for i, layer in enumerate(hand_made.layers) for path, gate in layer.gates.items()
}
BlockDiagram.of_path_use(use, gates=gates)

# %% [markdown]
# ## Somebody else's weights
#
# A Hydra whose only path is `ssm`, with every gate at 1, *is* a Mamba-2 model
# ([arXiv 2405.21060](https://arxiv.org/abs/2405.21060)): $x + \mathrm{mixer}(\mathrm{RMSNorm}(x))$. The library names the
# mixer's parameters as Mamba-2 does. Below is a small Mamba-2 of transformers with random weights (no checkpoint
# is fetched) and the configuration of a Hydra of the same sizes.

# %%
torch.manual_seed(0)
mamba = Mamba2ForCausalLM(
    Mamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_heads=4, head_dim=16, state_size=16, n_groups=1,
        expand=2, conv_kernel=4, chunk_size=8, layer_norm_epsilon=1e-5, tie_word_embeddings=False,
    )
).eval()  # fmt: skip
same_sizes = HydraConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, ssm_head_dim=16, ssm_state_size=16, ssm_chunk_size=8,
    attention_every=0, moe_layers=[], tie_word_embeddings=False,
)  # fmt: skip
print(
    "theirs:",
    *[f"  {name}" for name in mamba.state_dict() if ".layers." not in name or ".layers.0." in name],
    sep="\n",
)
ours = HydraForCausalLM(same_sizes).state_dict()
print("ours:", *[f"  {name}" for name in ours if ".layers." not in name or ".layers.0." in name], sep="\n")

# %% [markdown]
# ### Exercise 8.1: a Mamba-2 in Hydra's names
#
# Write `to_hydra(state_dict, num_blocks)`: the dictionary that `HydraForCausalLM(same_sizes)` loads with `strict=True`, made
# of the state dict of a `Mamba2ForCausalLM`, so that both models compute the same. Compare the two lists: one kind of
# parameter has no counterpart.


# %% tags=["exercise"]
def to_hydra(state_dict, num_blocks):
    """Mamba-2's tensors under Hydra's names, and what else a Hydra needs."""
    # BEGIN SOLUTION: rename the embedding, the last norm, the blocks and their mixers; a gate of 1 per block
    names = {"backbone.embeddings": "model.embed_tokens", "backbone.norm_f": "model.norm"}
    names |= {"backbone.": "model.", ".mixer.": ".ssm."}
    renamed = {}
    for name, tensor in state_dict.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed | {f"model.layers.{block}.gates.ssm": torch.ones(()) for block in range(num_blocks)}
    # END SOLUTION


# %% tags=["check"]
converted = to_hydra(mamba.state_dict(), 3)
check(isinstance(converted, dict), "Return a dictionary of tensors by name.")
wanted = HydraForCausalLM(same_sizes).state_dict()
gates_missing = [name for name in wanted if ".gates." in name and name not in converted]
check(not gates_missing, f"A Mamba-2 has no gates, but a Hydra block has one per path: add {gates_missing}.")
check(not set(wanted) - set(converted), f"Missing: {sorted(set(wanted) - set(converted))[:3]} …")
check(not set(converted) - set(wanted), f"Hydra knows no {sorted(set(converted) - set(wanted))[:3]} …")
for name, tensor in wanted.items():
    check(converted[name].shape == tensor.shape, f"{name} should have the shape {list(tensor.shape)}.")
transplanted = HydraForCausalLM(same_sizes).eval()
transplanted.load_state_dict(converted, strict=True)
tokens = torch.randint(97, (2, 29))
with torch.no_grad():
    theirs, mine = mamba(tokens).logits, transplanted(tokens).logits
    check(
        not torch.allclose(
            mine, mamba.lm_head(mamba.backbone.norm_f(mamba.backbone.embeddings(tokens))), atol=1e-5
        ),
        "The blocks add nothing: what does a gate of 0 do?",
    )
check_close(
    mine, theirs,
    "All names fit, but the models differ: is every gate 1, and is every tensor under its own name "
    "(the embedding and the head, the block's norm and the mixer's)?", rtol=1e-4, atol=1e-4,
)  # fmt: skip
passed("8.1")

# %% [markdown]
# The same thought carries further: a trained Mamba-2 can be *grown* into a Hydra. The output projections of the optional
# paths start at zero, so that a path which joins changes nothing at first. Here a small Hydra with all paths is given the
# weights of one with `ssm` alone:

# %%
torch.manual_seed(0)
nano = HydraConfig.from_preset("nano")
lean = HydraForCausalLM(
    HydraConfig.from_preset("nano", attention_every=0, moe_layers=[], workspace_layers=[], memory_layers=[])
)
grown = HydraForCausalLM(nano)
missing = grown.load_state_dict(lean.state_dict(), strict=False).missing_keys
tokens = torch.randint(97, (1, 40))
with torch.no_grad():
    same = torch.equal(grown.eval()(tokens).logits, lean.eval()(tokens).logits)
print(f"{len(missing)} parameters are new, and the logits are equal to the bit: {same}")

# %% [markdown]
# ## What it costs
#
# Three prices differ: parameters that exist (memory), parameters that one token uses (compute), and state that
# decoding keeps. `hydra_lab.accounting` works them out from the configuration alone; we check each against the real
# thing.

# %% tags=["predict"]
largest_part = predict(
    "Which component holds the most parameters, and which the most that one token uses (the head not counted)?",
    ["moe and moe", "memory and memory", "memory and ssm", "embedding and ssm"],
)

# %%
table = parameter_table(config)
display(parameters_figure(table))
counted: dict[str, int] = {}
for name, parameter in hand_made.named_parameters():
    part = next((path for path in PATH_MODULES if f".{path}." in name and ".gates." not in name), "others")
    counted[part] = counted.get(part, 0) + parameter.numel()
by_component = table.by_component()
print("real counts equal to the table:", all(counted[path] == by_component[path][0] for path in PATH_MODULES))
parts = {name: sizes for name, sizes in by_component.items() if name != "head"}
stored = max(parts, key=lambda name: parts[name][0])
used = max(parts, key=lambda name: parts[name][1])
largest_part.reveal(
    f"{stored} and {used}",
    f"{stored} has {parts[stored][0]:,}, of which a token uses {parts[stored][1]:,}; {used} uses all of its {parts[used][1]:,}.",
)

# %% [markdown]
# Compute, counted by PyTorch while our model runs. Counter and table count matrix products, two FLOPs per multiply-add. An
# instrument can be blind: this counter knows `baddbmm`, but not its in-place form, which the attention path uses, so we
# teach it.


# %%
def in_place_baddbmm(_bias, left, right, *, out_shape=None) -> int:
    """FLOPs of [b, n, k] @ [b, k, m], from the shapes."""
    return 2 * left[0] * left[1] * left[2] * right[2]


taught = {torch.ops.aten.baddbmm_: in_place_baddbmm}
with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=taught) as counter:
    hand_made(ids)
flops = flops_per_token(config, ids.shape[1])
print("FLOPs per token   counted     by the table")
for path in PATH_MODULES:
    places = [each for place, each in counter.get_flop_counts().items() if place.endswith(f".{path}")]
    per_token = sum(sum(each.values()) for each in places) / ids.shape[1]
    print(f"{path:10s} {per_token:>14,.0f} {flops.by_component()[path][0]:>16,.0f}")
print(f"{'model':10s} {counter.get_total_flops() / ids.shape[1]:>14,.0f} {flops.prefill:>16,.0f}")
print(f"twice the active parameters: {2 * table.active:,}")

# %% [markdown]
# Attention computes the queries that select the same block together, in tiles whose empty places are multiplied too; how
# many there are depends on the text, so the table leaves them out. The rule of thumb, two FLOPs per active parameter,
# misses the products without weights: queries with keys, states with what reads them. Path by path the table says:

# %%
CostDiagram(flops)

# %% [markdown]
# ## One token at a time
#
# To generate, a model should not read the whole text again for each new token. Every path keeps what it needs of the
# past: `ssm` its states and the last inputs of its convolution, `moe` an average and the open chunk's decision,
# `workspace` its slots, `attention` all keys and values. `memory` needs nothing.

# %%
with torch.no_grad():
    cache = model(ids, use_cache=True).past_key_values
for block in (1, 2, 3):
    for path, state in cache.states[block].items():
        shapes = {
            name: list(field.shape)
            for name, field in state._asdict().items()
            if isinstance(field, torch.Tensor)
        }
        print(f"block {block} {path:10s}", shapes)
print(
    f"bytes after {ids.shape[1]} tokens: {cache.num_bytes():,} kept, {state_bytes(config, ids.shape[1]).num_bytes:,} by the table"
)

# %% tags=["predict"]
growth = predict(
    "From 1,024 to 65,536 tokens the context grows 64-fold. The decode state grows …",
    ["not at all", "less than 8-fold", "8- to 60-fold", "64-fold"],
)

# %%
contexts = [2**power for power in range(8, 18)]
tables = [state_bytes(config, length) for length in contexts]
figure = go.Figure()
for path, symbol in zip(tables[0].by_component(), SYMBOLS, strict=False):
    sizes = [each.by_component()[path] for each in tables]
    figure.add_scatter(x=contexts, y=sizes, name=path, mode="lines+markers", marker_symbol=symbol)
figure.update_xaxes(title_text="context (tokens)", type="log", dtick=1)
figure.update_yaxes(
    title_text="state of one sequence (bytes, fp32)", type="log", dtick=1, exponentformat="SI"
)
subtitle = "demo, all blocks together; worked out from the configuration"
title = "Only attention's state grows with the context"
display(finish(figure, title=title, subtitle=subtitle, theme="light", height=340))
short, long = (state_bytes(config, length).num_bytes for length in (1024, 65536))
ratio = long / short
growth.reveal(
    growth.options[0 if ratio == 1 else 1 if ratio < 8 else 2 if ratio < 60 else 3],
    f"{ratio:.0f}-fold, from {short / 1e6:.1f} to {long / 1e6:.1f} MB. Sparse attention *reads* few blocks, but which ones it will "
    "want is not known beforehand, so it keeps them all.",
)

# %% [markdown]
# ### Exercise 8.2: decode with the cache
#
# Write `greedy(model, ids, count)`: `ids` `[1, L]` with `count` likeliest tokens behind it, one after the other,
# `[1, L + count]`. Read the prompt once; after that give the model one token per call. `model(ids,
# past_key_values=cache, use_cache=True)` returns `logits` and `past_key_values`.


# %% tags=["exercise"]
def greedy(model, ids, count):
    """The ids with `count` greedy tokens behind them, [1, L + count]."""
    # BEGIN SOLUTION: read the prompt, then only the newest token with the cache, and append the likeliest each time
    out = model(ids, use_cache=True)
    for _ in range(count):
        newest = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, newest], dim=1)
        out = model(newest, past_key_values=out.past_key_values, use_cache=True)
    return ids
    # END SOLUTION


# %% tags=["check"]
prompt, steps = ids[:, :70], 12
sizes = []
handle = model.model.embed_tokens.register_forward_hook(
    lambda _module, args, _out: sizes.append(args[0].shape[1])
)
try:
    with torch.no_grad():
        written = greedy(model, prompt, steps)
finally:
    handle.remove()
check(
    written is not None and written.shape == (1, 70 + steps),
    f"Return [1, L + count], here [1, {70 + steps}].",
)
again = [size for size in sizes[1:] if size >= 70]
check(
    not again,
    f"The model read {again[:1]} tokens again after the prompt: give it the newest one, and the cache.",
)
check(sizes[0] == 70, f"Read the whole prompt in the first call: 70 tokens, not {sizes[0]}.")
check(set(sizes[1:]) == {1}, f"After the prompt, one token per call, not {sorted(set(sizes[1:]))}.")
expected = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=steps,
    min_new_tokens=steps,
    do_sample=False,
)
check_close(
    written, expected, "Not what `generate` writes: does each call continue the cache of the one before it?"
)
passed("8.2")

# %% [markdown]
# ## Three rules
#
# Weights that load prove that the *names* fit. That the computation is one for a language model is a matter of three rules:
#
# - **Causality**: logits at position $t$ depend on tokens $\le t$ only.
# - **Isolation**: a row's logits depend on no other row, no padding, no earlier call.
# - **Equivalence**: one pass, pieces, and single steps give the same logits (the exercise above).
#
# The paper's prototype breaks the first two (see the end of this lesson). Such faults raise no error, and the loss does not
# complain: a model that sees the future only gets better at it. They must be looked for. Below are some suspects: the
# demo, and models that are guilty on purpose.
# `routed by its mean` is a small Hydra with the prototype's router; its silent paths are given random weights, for a path
# that adds zero hides its leak.


# %%
def run(network):
    """A function (ids, mask) -> logits of a Hydra, without gradients or cache."""

    def logits_of(ids, mask=None):
        with torch.no_grad():
            return network(ids, attention_mask=mask, use_cache=False).logits

    return logits_of


honest = run(model)
text = ids[:, :100]
others = tokenizer(samples["prose"][0], return_tensors="pt")["input_ids"][:, :100]
torch.manual_seed(0)
by_mean = HydraForCausalLM(
    HydraConfig.from_preset("nano", vocab_size=config.vocab_size, moe_chunk_pooling="mean")
).eval()
with torch.no_grad():
    for parameter in by_mean.parameters():
        if not parameter.any():
            parameter.normal_(std=0.3)
routed_by_its_mean = run(by_mean)


def pools_the_sequence(ids, mask=None):
    """Adds a mean over the whole sequence, as the prototype's workspace does."""
    logits = honest(ids, mask)
    return logits + logits.mean(dim=1, keepdim=True)


def mixes_the_rows(ids, mask=None):
    """Gives every row but the first a little of the first, as a state shared by the batch does."""
    logits = honest(ids, mask)
    return torch.cat([logits[:1], logits[1:] + 0.1 * logits[:1].mean(dim=1, keepdim=True)])


def ignores_the_mask(ids, mask=None):
    """Reads padding like text."""
    return honest(ids)


def counts_everything(ids, mask=None):
    """One logit is the sum of all ids and of the number of rows; the other is zero."""
    total = (ids.sum() + len(ids)).float().expand(ids.shape)
    return torch.stack([total, torch.zeros_like(total)], dim=-1)


# %% [markdown]
# ### Exercise 8.3: a test of causality
#
# Write `causality_gap(logits_of, ids, others, position)`: the largest absolute change (a float) of the logits at positions
# *before* `position` when all tokens from `position` on are those of `others` instead. `ids` and `others` are `[1, L]`;
# `logits_of(ids)` is `[1, L, V]`.


# %% tags=["exercise"]
def causality_gap(logits_of, ids, others, position):
    """How much the logits before `position` depend on the tokens from there on."""
    # BEGIN SOLUTION: replace the tokens from the position on and compare the logits before it
    changed = torch.cat([ids[:, :position], others[:, position:]], dim=1)
    difference = logits_of(changed)[:, :position] - logits_of(ids)[:, :position]
    return difference.abs().max().item()
    # END SOLUTION


# %% tags=["check"]
positions = (1, 5, 32, 64, 99) if quick() else (1, 5, 31, 32, 33, 50, 64, 65, 99)
counted_calls = []


def spy(ids):
    """The demo, keeping what it was asked."""
    counted_calls.append(ids)
    return honest(ids)


gap = causality_gap(spy, text, others, 40)
check(isinstance(gap, float), "Return a float: the largest absolute difference, .item().")
check(len(counted_calls) >= 2, "Call logits_of twice: on the text and on the text with another end.")
check(
    any(
        torch.equal(call[:, :40], text[:, :40]) and torch.equal(call[:, 40:], others[:, 40:])
        for call in counted_calls
    ),
    "One of the two texts should be ids before the position and others from the position on.",
)
check(
    gap < 1,
    f"{gap:.2g} on the demo: logits AT the position may change, its own token did; look before it only.",
)
for position in positions:
    gap = causality_gap(honest, text, others, position)
    check(gap < 1e-3, f"The demo is causal, yet you find {gap:.2g} at {position}.")
check(
    causality_gap(pools_the_sequence, text, others, 60) > 0.01, "A mean over the whole sequence goes unseen."
)
exact = (text[:, 60:].sum() - others[:, 60:].sum()).abs()
for first, second in ((text, others), (others, text)):
    gap = causality_gap(counts_everything, first, second, 60)
    check_close(gap, exact, "Of a made-up model with a known gap: take the absolute value, then the maximum.")
gap = causality_gap(routed_by_its_mean, text, others, 5)
check(gap > 0.01, f"A router that pools its chunk sees the future, but you find {gap:.2g}.")
passed("8.3")

# %% [markdown]
# ### Exercise 8.4: a test of isolation
#
# Write `isolation_gap(logits_of, rows, left)` for a list of id tensors `[L_i]` of different lengths: run each row alone; run
# all as one batch, padded with token 1 on the left (`left=True`) or on the right, with a mask that is 1 at tokens and 0 at
# padding; return the largest absolute difference (a float) between a row's logits alone and in the batch, over all rows.
# `logits_of(ids, mask)` takes `[B, L]` each.


# %% tags=["exercise"]
def isolation_gap(logits_of, rows, left):
    """How much the rows' logits depend on padding and on the other rows of the batch."""
    # BEGIN SOLUTION: pad the rows and make the mask, run them together and alone, compare at the rows' own tokens
    width = max(len(row) for row in rows)
    ids = torch.ones(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    places = [slice(width - len(row), width) if left else slice(0, len(row)) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[index, place], mask[index, place] = row, 1
    together = logits_of(ids, mask)
    alone = [logits_of(row[None], torch.ones_like(row)[None])[0] for row in rows]
    gaps = [together[i, place] - alone[i] for i, place in enumerate(places)]
    return max(gap.abs().max().item() for gap in gaps)
    # END SOLUTION


# %% tags=["check"]
rows = [text[0, :40], others[0, :23], text[0, 30:67]]
asked = []


def spy_on_masks(ids, mask=None):
    """The demo, keeping the batch that it was given."""
    if len(ids) > 1:
        asked.append((ids, mask))
    return honest(ids, mask)


gap = isolation_gap(spy_on_masks, rows, True)
check(isinstance(gap, float), "Return a float: the largest absolute difference, .item().")
check(bool(asked), "Run all rows in one batch, too.")
batch, mask = asked[-1]
check(
    mask is not None and mask.sum() == 100,
    "Give the model the mask: 1 at the 40 + 23 + 37 tokens, 0 at padding.",
)
check(mask[1, 0] == 0 and mask[1, -1] == 1, "With left=True the padding comes first.")
check(bool((batch[mask == 0] == 1).all()), "Pad with token 1.")
for left in (True, False):
    gap = isolation_gap(honest, rows, left)
    check(
        gap < 1e-3,
        f"The demo isolates rows, yet you find {gap:.2g} (left={left}): compare at a row's own tokens only.",
    )
check(
    isolation_gap(mixes_the_rows, rows, True) > 0.01,
    "Rows that get something of row 0 go unseen: compare every row.",
)
check(isolation_gap(ignores_the_mask, rows, True) > 0.01, "A model that reads the padding goes unseen.")
equal_rows = [torch.full((5,), 3), torch.full((5,), 3), torch.full((5,), 3)]
check_close(
    isolation_gap(counts_everything, equal_rows, True), 32.0,
    "Of a made-up model with a known gap: take the absolute value, then the maximum.",
)  # fmt: skip
passed("8.4")

# %% [markdown]
# The library's own tests ask the same over random configurations, chunk sizes and ragged pieces
# (`tests/test_properties.py`).
#
# ## Where this breaks
#
# Three ways to assemble a wrong model without an error:


# %%
def loss_of(network) -> float:
    """Mean loss of the text, nats per token."""
    with torch.no_grad():
        return network(ids, labels=ids).language_loss.item()


print(f"the demo:                      {loss_of(model):.2f} nats per token")
torch.manual_seed(0)
misnamed = HydraForCausalLM(config).eval()
report = misnamed.load_state_dict(named, strict=False)  # without their "model." in front
print(
    f"wrong prefix, strict=False:    {loss_of(misnamed):.2f} ({len(report.missing_keys)} parameters were not loaded)"
)
stored_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
model.set_path_scale("moe", 0.0)
unchanged = all(torch.equal(tensor, stored_before[name]) for name, tensor in model.state_dict().items())
print(f"a path scaled to 0:            {loss_of(model):.2f} (state dict unchanged: {unchanged})")
model.set_path_scale("moe", 1.0)
rounded, _ = hydra_lab.load("demo", dtype=torch.bfloat16)
with torch.no_grad():
    exact, coarse = model(ids).logits, rounded(ids).logits.float()
changed = (exact.argmax(-1) != coarse.argmax(-1)).float().mean()
print(
    f"computed in bfloat16:          {loss_of(rounded):.2f} (logits off by up to {(exact - coarse).abs().max():.2f}, ",
    end="",
)
print(f"{changed:.1%} of the likeliest tokens change)")

# %% [markdown]
# - **Names that do not fit** are skipped with `strict=False`: most of the model stays random, and it runs. Load strictly, or
#   look at what was missing.
# - **What is not in the weights is lost.** The curriculum's path scale is no parameter: a model saved while a path was
#   still off comes back with it on.
# - **Precision is part of the computation.** The file holds bfloat16, which fp32 represents exactly, so loading loses
#   nothing; *computing* in bfloat16 does, and a router or a memory that ties may decide otherwise.
# - **Counted FLOPs are not seconds.** What the tables leave out (lookups, norms, the convolution) is bound by memory traffic.
# - **The prototype** of the paper would not pass 8.3 or 8.4: its router pools the mean of the whole chunk, its workspace
#   pools the whole sequence and writes one state that the batch and later calls share. Its fast "SSM" is a gated
#   convolution of width 8: it has no state, and no Mamba-2 fits into it.

# %% [markdown]
# ## Next
#
# - Lesson 9 reads and writes inside the assembled model: taps, traces and the lens.
# - Lesson 12 replaces one operation by a kernel of your own; lesson 13 trains a Hydra from the start.
# - `hydra-lab accounting --preset 1.6b` prints the tables of the size that the paper proposes.

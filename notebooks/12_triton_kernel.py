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
# # 12. Write a Triton kernel
#
# **Goal:** write a Triton kernel and its gradient, and test them without a GPU so that a wrong one is caught · **Minutes:** 60 · **Difficulty:** hard
#
# You need PyTorch and its autograd; no CUDA, and no lesson before this one.
#
# Each PyTorch operation reads its inputs from memory and writes its result back. A chain of small operations therefore
# spends its time on moving the same numbers to and fro. A **kernel** of your own reads them once, does the whole chain in
# registers, and writes once. In [Triton](https://triton-lang.org) a kernel is a Python function that computes one *tile* of
# the output; a grid of such **programs** covers it all.
#
# Here the programs run in Triton's **interpreter**: one after another, on the CPU, as NumPy operations. The code is the same
# as on a GPU. The speed is not, so this lesson times nothing; and some mistakes hide, which it shows.

# %%
import json
import os
import subprocess
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so this comes first

import ipywidgets
import plotly.graph_objects as go
import torch
import triton
import triton.language as tl
from IPython.display import display
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.errors import InterpreterError

from hydra_lab import figures
from hydra_lab.course import check, check_close, passed, predict, show_source
from hydra_lab.nn.layers import GatedRMSNorm
from hydra_lab.ops.causal_conv import causal_conv, kernels, reference

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same ones for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# %% [markdown]
# ## The operation
#
# In front of its recurrence Mamba-2 ([arXiv 2405.21060](https://arxiv.org/abs/2405.21060)) mixes each channel with its own
# last $W = 4$ inputs, and applies SiLU. For row $b$, position $t$ and channel $d$:
#
# $$s_{btd} = \beta_d + \sum_{w=0}^{W-1} k_{dw}\, x_{b,\,t-(W-1)+w,\,d}, \qquad y_{btd} = s_{btd}\,\sigma(s_{btd}),$$
#
# with $x_{bud} = 0$ for $u < 0$. The last tap, $k_{d,W-1}$, belongs to the current position. The library's oracle slides a
# window along the row:

# %%
show_source(reference.causal_conv)

# %%
x, filters, bias = normal(2, 37, 5), normal(5, 4, seed=1), normal(5, seed=2)
by_library, _ = causal_conv(x, filters, bias, activation="silu", backend="reference")
by_torch = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), filters[:, None], bias, groups=5)).mT
print("largest difference between the sum and torch's conv1d:", f"{(by_library - by_torch).abs().max():.1e}")

# %% [markdown]
# ## Why one kernel?
#
# Written with PyTorch's operations, the sum is a padding, $W$ products, $W$ additions and an activation. Every one of them
# reads tensors and writes one. We count the bytes; slices and other views move nothing and are left out. The least that any
# program can move is one reading of $x$ and one writing of $y$: two tensors' worth.


# %%
def conv_by_operations(x_BLD: torch.Tensor, weight_DW: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    """The causal convolution as a chain of PyTorch operations."""
    positions, width = x_BLD.shape[1], weight_DW.shape[1]
    padded = F.pad(x_BLD, (0, 0, width - 1, 0))
    sums = padded[:, :positions] * weight_DW[:, 0]
    for w in range(1, width):
        sums = sums + padded[:, w : w + positions] * weight_DW[:, w]
    return F.silu(sums + bias_D)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if all(out.untyped_storage().data_ptr() != each.untyped_storage().data_ptr() for each in inputs):
            moved = sum(each.numel() * each.element_size() for each in [*inputs, out])
            self.operations.append((str(function).removeprefix("aten."), moved))
        return out


# %% tags=["predict"]
traffic = predict(
    "With W = 4, how many tensors' worth of bytes does the chain of PyTorch operations move?",
    ["about 4: x is read once more for each tap", "about 10", "more than 20"],
)

# %%
large, large_filters, large_bias = normal(2, 512, 64), normal(64, 4), normal(64)
with Traffic() as counted:
    conv_by_operations(large, large_filters, large_bias)
one_tensor = large.numel() * large.element_size()
for name, moved in counted.operations:
    print(f"{name:26s} {moved / one_tensor:5.2f}")
total = sum(moved for _, moved in counted.operations) / one_tensor
fused = 2 + (64 * 4 + 64) * 4 / one_tensor
traffic.reveal(
    traffic.options[0 if total < 6 else 1 if total < 20 else 2],
    f"It moves {total:.1f} tensors' worth; one kernel that reads all once and writes once moves {fused:.1f}. "
    "Each product and each sum reads its operands and writes a tensor that the next one reads again.",
)

# %% [markdown]
# The convolution does some ten operations for each number that it reads, far fewer than a GPU can do in the time that the
# reading takes. So its time goes into the traffic, and there is the case for this kernel. (A compiler such as `torch.compile` fuses
# such a chain too. The library's kernel does more: it also carries a state from piece to piece and rows of their own lengths.)
#
# ## A tile, its pointers and its mask
#
# A program learns from `tl.program_id` which tile is its own. `tl.arange(0, T)` is a vector of T **lanes**, and T must be a
# power of two, known when the kernel is compiled (`tl.constexpr`). A pointer plus a tensor of offsets is a tensor of
# pointers: in a contiguous tensor `[positions, channels]`, element $(t, d)$ lies at
#
# $$\mathrm{base} + t \cdot \mathrm{channels} + d .$$
#
# Lengths are seldom multiples of T, so the last tile sticks out. A **mask** says which lanes count: a masked lane of
# `tl.load` gets `other` instead of what lies there, one of `tl.store` writes nothing. The letters after a name say its axes, as
# everywhere in the library: `x_TD` is a tile of T positions and D channels.


# %%
@triton.jit
def silu_kernel(x_ptr, y_ptr, positions, channels, MASKED: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """y = x sigmoid(x) for one tile of a contiguous [positions, channels] tensor."""
    t_T = tl.program_id(0) * T + tl.arange(0, T)
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    offsets_TD = t_T[:, None] * channels + d_D[None, :]
    if MASKED:
        mask_TD = (t_T < positions)[:, None] & (d_D < channels)[None, :]
    else:
        mask_TD = t_T[:, None] + d_D[None, :] >= 0  # always true
    x_TD = tl.load(x_ptr + offsets_TD, mask=mask_TD, other=0.0)
    tl.store(y_ptr + offsets_TD, x_TD * tl.sigmoid(x_TD), mask=mask_TD)


def launch(kernel, grid, *arguments, **constants) -> None:
    """Run a kernel on a grid of programs; an error inside it comes wrapped by the interpreter and is unwrapped."""
    try:
        kernel[grid](*arguments, **constants)
    except InterpreterError as error:
        cause: BaseException = error
        while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None


def draw_tiles(positions: int, tile: int) -> go.Figure:
    """Which program owns which lane of a [positions, 5] tensor, in tiles of `tile` x 8."""
    programs = triton.cdiv(positions, tile)
    t, d = torch.meshgrid(torch.arange(programs * tile), torch.arange(8), indexing="ij")
    inside = (t < positions) & (d < 5)
    owner = torch.where(inside, t // tile % 2 + 1, 0)
    grey, (first, second) = "#c9ced6", figures.colours(2)
    steps = [(0, grey), (1 / 3, grey), (1 / 3, first), (2 / 3, first), (2 / 3, second), (1, second)]
    figure = go.Figure(
        go.Heatmap(z=owner.T, zmin=0, zmax=2, colorscale=steps, showscale=False, xgap=1, ygap=1)
    )
    for program in range(programs):
        middle = (program * tile + min((program + 1) * tile, positions) - 1) / 2
        figure.add_annotation(x=middle, y=2, text=f"<b>{program}</b>", showarrow=False)
    share = inside.double().mean()
    figure.update_layout(
        template=figures.template("light"), height=270, margin_t=60, xaxis_title="position t", yaxis_title="channel d",
        title=f"{programs} programs of {tile} x 8 lanes for {positions} x 5 numbers: {share:.0%} of the lanes do work.<br>"
        "Colours tell programs apart (the number is program_id(0)); grey lanes are masked.",
    )  # fmt: skip
    return figure


choose = ipywidgets.interactive(
    lambda positions, tile: display(draw_tiles(positions, tile)),
    positions=ipywidgets.IntSlider(37, 1, 64, continuous_update=False),
    tile=ipywidgets.ToggleButtons(options=[4, 8, 16, 32], value=16),
)
display(choose)

# %% [markdown]
# Memory on a GPU has no bounds check. To see what a kernel does outside its tensors, we put every tensor into the middle of a
# larger buffer. Around an input stands NaN: a lane that reads it brings NaN in. An output starts as NaN, so a number that
# nobody wrote shows, and around it stands a number that should still be there afterwards. (The library's kernel tests
# poison what `torch.empty` returns in the same way.)

# %%
GUARD, UNTOUCHED = 4096, 12345.0


def surrounded(values: torch.Tensor, around: float = torch.nan) -> torch.Tensor:
    """A contiguous copy of `values` with GUARD numbers of value `around` on either side in memory."""
    buffer = torch.full((values.numel() + 2 * GUARD,), around)
    inside = buffer[GUARD:-GUARD].view(values.shape)
    return inside.copy_(values)


def new_output(*shape: int, poison: float = torch.nan) -> torch.Tensor:
    """An output full of `poison`, amid numbers that `strays` looks for."""
    return surrounded(torch.full(shape, poison), around=UNTOUCHED)


def strays(output: torch.Tensor) -> int:
    """How many numbers around an output were overwritten."""
    buffer = output.new_empty(0).set_(output.untyped_storage())
    return int((torch.cat([buffer[:GUARD], buffer[-GUARD:]]) != UNTOUCHED).sum())


# %% tags=["predict"]
without_mask = predict(
    "silu_kernel runs on [37, 5] in tiles of 16 x 8 without its mask. What happens?",
    [
        "an error: the pointers leave the tensor",
        "y is wrong where tiles overlap, and memory around it changes",
        "y is right everywhere, and memory around it changes",
    ],
)

# %%
for masked in (True, False):
    written = new_output(37, 5)
    launch(silu_kernel, (triton.cdiv(37, 16), 1), surrounded(x[0]), written, 37, 5, MASKED=masked, T=16, D=8)
    error, overwritten = (written - F.silu(x[0])).abs().max().item(), strays(written)
    print(f"masked {masked!s:5}  largest error of y {error:.0e}  numbers overwritten around y {overwritten}")
without_mask.reveal(
    without_mask.options[2 if error < 1e-5 else 1],
    f"{overwritten} numbers behind y changed, and nothing complained. A stray lane reads and writes at the same offset, "
    "so what it leaves inside y is what belongs there: a test that compares y alone passes.",
)

# %% [markdown]
# ### Exercise 12.1: a reduction that minds its tail
#
# Mamba-2's output norm gates and normalises in one go (the library's `GatedRMSNorm`, in PyTorch, with one group). For one row
# $x, z, w \in \mathbb{R}^{n}$:
#
# $$g_j = x_j\, z_j\, \sigma(z_j), \qquad y_j = \frac{g_j\, w_j}{\sqrt{\tfrac1n \sum_i g_i^2 + \varepsilon}} .$$
#
# Write `gated_norm_kernel`, where program i computes row i with D lanes, D the next power of two of `channels`. `x` and `y` are
# contiguous [rows, channels]; `z` is a slice of a wider tensor, so its rows lie `z_row` numbers apart. `tl.sum(v_D, axis=0)` adds up lanes.


# %% tags=["exercise"]
@triton.jit
def gated_norm_kernel(x_ptr, z_ptr, weight_ptr, y_ptr, channels, z_row, eps, D: tl.constexpr):
    """One row of RMSNorm(x * silu(z)) * weight."""
    # BEGIN SOLUTION: load this row of x and z and the weight under a mask, gate, normalise, store under the mask
    row = tl.program_id(0)
    d_D = tl.arange(0, D)
    in_D = d_D < channels
    x_D = tl.load(x_ptr + row * channels + d_D, mask=in_D, other=0.0)
    z_D = tl.load(z_ptr + row * z_row + d_D, mask=in_D, other=0.0)
    gated_D = x_D * z_D * tl.sigmoid(z_D)
    scale = 1 / tl.sqrt(tl.sum(gated_D * gated_D, axis=0) / channels + eps)
    weight_D = tl.load(weight_ptr + d_D, mask=in_D, other=0.0)
    tl.store(y_ptr + row * channels + d_D, gated_D * scale * weight_D, mask=in_D)
    # END SOLUTION


# %% tags=["check"]
for channels in (8, 5, 33):
    norm, lanes = GatedRMSNorm(channels, 1, 1e-5), triton.next_power_of_2(channels)
    norm.weight.data = normal(channels, seed=3)
    left, right = normal(3, channels, seed=4), surrounded(normal(3, channels + 3, seed=5))[:, :channels]
    result, wanted = new_output(3, channels), norm(left, right).detach()
    arguments = (surrounded(left), right, surrounded(norm.weight.data), result)
    launch(gated_norm_kernel, (3,), *arguments, channels, channels + 3, 1e-5, D=lanes)
    check(strays(result) == 0, "Lanes past the last channel were stored: mask tl.store with d_D < channels.")
    lost = int(result.isnan().any(dim=1).sum())
    check(
        lost < 3,
        "NaN everywhere: nothing was stored, or a load took in lanes past the last channel (mask, other=0.0).",
    )
    check(
        lost == 0 or result[:-1].isnan().any() or not result[-1].isnan().all(),
        "The last row holds NaN: a load takes in lanes past the last channel (mask, other=0.0).",
    )
    check(lost == 0, "Some rows hold NaN: row i is at x_ptr + i * channels, that of z at z_ptr + i * z_row.")
    check(
        lanes == channels or (result - wanted * (lanes / channels) ** 0.5).abs().max() > 1e-3,
        "The mean counts the masked lanes: divide the sum by channels, not by D.",
    )
    check_close(
        result[0], wanted[0], "Row 0 differs: gate with z sigmoid(z), add eps inside the root.", rtol=1e-4
    )
    check_close(
        result, wanted, "Later rows differ: rows of z lie z_row numbers apart, not channels.", rtol=1e-4
    )
passed("12.1")

# %% [markdown]
# ## The convolution as a kernel
#
# A program takes T positions of D channels of one row. Two things are new. The inputs of a tile begin $W - 1$ positions
# before it, in the tile of another program: this is its *halo*, and it is simply read again. And in memory a
# row begins where the row before it ends, so the position $u = t - (W-1) + w$ needs a mask on *both* sides: $u \ge 0$ keeps
# the end of the row before out.
#
# The grid has two axes here: `program_id(0)` counts the tiles of all rows (`tiles` of them per row), `program_id(1)` the
# groups of D channels.
#
# ### Exercise 12.2: the forward kernel
#
# Write `conv_kernel` for contiguous `x`, `y` [rows, positions, channels], `filters` [channels, W] and `bias` [channels].
# `for w in tl.static_range(W)` is a loop that the compiler unrolls. Start the sums with `tl.zeros((T, D), dtype=tl.float32)`.


# %%
def run_tiles(kernel, shape: tuple[int, int, int], *inputs: torch.Tensor, **constants) -> torch.Tensor:
    """What a kernel makes of `inputs`, shape [rows, positions, channels], in tiles of 16 x 8 with W = 4."""
    rows, positions, channels = shape
    output, tiles = new_output(*shape), triton.cdiv(positions, 16)
    arguments = (*map(surrounded, inputs), output, positions, channels, tiles)
    launch(kernel, (rows * tiles, triton.cdiv(channels, 8)), *arguments, W=4, T=16, D=8, **constants)
    return output


# %% tags=["exercise"]
@triton.jit
def conv_kernel(
    x_ptr, filters_ptr, bias_ptr, y_ptr, positions, channels, tiles, W: tl.constexpr, T: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """y = silu(bias + sum over w of filters[:, w] x[t - (W - 1) + w]) for a tile of [T, D]."""
    # BEGIN SOLUTION: find the tile's row, positions and channels; add up bias and W masked taps; store silu of it
    row = tl.program_id(0) // tiles
    t_T = tl.program_id(0) % tiles * T + tl.arange(0, T)
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    in_D = d_D < channels
    sums_TD = tl.zeros((T, D), dtype=tl.float32) + tl.load(bias_ptr + d_D, mask=in_D, other=0.0)[None, :]
    for w in tl.static_range(W):
        u_T = t_T - (W - 1) + w
        inside_TD = ((u_T >= 0) & (u_T < positions))[:, None] & in_D[None, :]
        x_ptrs = x_ptr + (row * positions + u_T[:, None]) * channels + d_D[None, :]
        filter_D = tl.load(filters_ptr + d_D * W + w, mask=in_D, other=0.0)
        sums_TD += tl.load(x_ptrs, mask=inside_TD, other=0.0) * filter_D[None, :]
    y_ptrs = y_ptr + (row * positions + t_T[:, None]) * channels + d_D[None, :]
    tl.store(y_ptrs, sums_TD * tl.sigmoid(sums_TD), mask=(t_T < positions)[:, None] & in_D[None, :])
    # END SOLUTION


# %% tags=["check"]
for shape in ((1, 16, 8), (1, 1, 8), (1, 17, 5), (2, 37, 5), (2, 16, 11)):
    where = f" (rows, positions, channels: {shape})"
    given = (normal(*shape), normal(shape[2], 4, seed=1), normal(shape[2], seed=2))
    result = run_tiles(conv_kernel, shape, *given)
    wanted, flipped, bare = (
        causal_conv(given[0], taps, given[2], activation=activation, backend="reference")[0]
        for taps, activation in ((given[1], "silu"), (given[1].flip(1), "silu"), (given[1], None))
    )
    lost = result.isnan()
    check(
        strays(result) == 0, "The kernel stored outside y: mask positions and channels of tl.store." + where
    )
    check(
        not lost[0, :3].any() or lost[0, 3:].any(),
        "NaN in the first W - 1 positions: mask u >= 0 there." + where,
    )
    check(not lost.any(), "y holds NaN: an unmasked lane was read, or a number never written." + where)
    check(
        (result - flipped).abs().max() > 1e-4,
        "The filter runs backwards: the last tap belongs to t itself." + where,
    )
    check((result - bare).abs().max() > 1e-4, "The activation is missing: store s sigmoid(s)." + where)
    check_close(
        result[0], wanted[0], "Row 0 differs. Does the sum start with the bias?" + where, rtol=1e-4, atol=1e-5
    )
    hint = (
        "Row 1 differs: it begins at x_ptr + row * positions * channels, and its u < 0 lie in row 0." + where
    )
    check_close(result, wanted, hint, rtol=1e-4, atol=1e-5)
passed("12.2")

# %% [markdown]
# ## Which test catches which mistake?
#
# A kernel that passes one test on round sizes proves little. Below is a convolution kernel with a switch: each value of
# `BUG` plants one mistake that people make, and six tests look at each. Without *poison*, zeros stand around the inputs and in
# y before the launch, as they often do in fresh memory, and nobody looks around y afterwards. *Reversed* runs
# the same programs in the opposite order, which a GPU is free to do.


# %%
@triton.jit
def planted_kernel(
    x_ptr, filters_ptr, bias_ptr, y_ptr, positions, channels, tiles,
    BUG: tl.constexpr, REVERSED: tl.constexpr, W: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A causal convolution of contiguous tensors in which `BUG` plants a mistake."""
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    row = program // tiles
    t_T = program % tiles * T + tl.arange(0, T)
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    in_D = d_D < channels
    if BUG == "channels not masked":
        in_D = d_D >= 0
    sums_TD = tl.zeros((T, D), dtype=tl.float32) + tl.load(bias_ptr + d_D, mask=in_D, other=0.0)[None, :]
    for w in tl.static_range(W):
        u_T = t_T - (W - 1) + w
        begun_T = u_T >= (-W if BUG == "no mask before a row" else 0)
        inside_TD = (begun_T & (u_T < positions))[:, None] & in_D[None, :]
        x_ptrs = x_ptr + (row * positions + u_T[:, None]) * channels + d_D[None, :]
        tap = W - 1 - w if BUG == "filter backwards" else w
        filter_D = tl.load(filters_ptr + d_D * W + tap, mask=in_D, other=0.0)
        sums_TD += tl.load(x_ptrs, mask=inside_TD, other=0.0) * filter_D[None, :]
    if BUG == "row forgotten in the store":
        row = 0
    ends_TD = (t_T < (positions + T if BUG == "tail not masked" else positions))[:, None] & in_D[None, :]
    y_ptrs = y_ptr + (row * positions + t_T[:, None]) * channels + d_D[None, :]
    tl.store(y_ptrs, sums_TD * tl.sigmoid(sums_TD), mask=ends_TD)


BUGS = (
    "none", "tail not masked", "channels not masked", "no mask before a row", "filter backwards",
    "row forgotten in the store", "one tile too few",
)  # fmt: skip
TESTS = {  # rows, positions, channels; poison, reversed
    "1 row<br>32 x 8": ((1, 32, 8), False, False),
    "1 row<br>37 x 8": ((1, 37, 8), False, False),
    "2 rows<br>37 x 5": ((2, 37, 5), False, False),
    "2 rows<br>reversed": ((2, 37, 5), False, True),
    "1 row<br>poison": ((1, 37, 8), True, False),
    "2 rows<br>poison": ((2, 37, 5), True, False),
}


def catches(bug: str, shape: tuple[int, int, int], poison: bool, is_reversed: bool) -> bool:
    """Whether a test tells the kernel with this mistake from a right one."""
    fill = torch.nan if poison else 0.0
    given = (normal(*shape), normal(shape[2], 4, seed=1), normal(shape[2], seed=2))
    output = new_output(*shape, poison=fill)
    tiles = shape[1] // 16 if bug == "one tile too few" else triton.cdiv(shape[1], 16)
    arguments = (*(surrounded(each, fill) for each in given), output, *shape[1:], tiles)
    launch(planted_kernel, (shape[0] * tiles, 1), *arguments, BUG=bug, REVERSED=is_reversed, W=4, T=16, D=8)
    wanted, _ = causal_conv(*given, activation="silu", backend="reference")
    return not torch.allclose(output, wanted, rtol=1e-4, atol=1e-5) or (poison and strays(output) > 0)


caught = torch.tensor([[catches(bug, *test) for test in TESTS.values()] for bug in BUGS])
first, second = figures.colours(2)
matrix = go.Figure(
    go.Heatmap(
        z=caught.int(), x=list(TESTS), y=list(BUGS), zmin=0, zmax=1, showscale=False, xgap=2, ygap=2,
        colorscale=[(0, second), (0.5, second), (0.5, first), (1, first)],
        text=[["caught" if each else "passes" for each in row] for row in caught], texttemplate="%{text}",
    )
)  # fmt: skip
matrix.update_layout(
    template=figures.template("light"), height=420, margin_t=70, yaxis_autorange="reversed", xaxis_title="test",
    yaxis_title="planted mistake",
    title=f"A test on round sizes catches {int(caught[1:, 0].sum())} of {len(BUGS) - 1} mistakes, two odd rows with poison "
    f"{int(caught[1:, -1].sum())}.<br>One run per cell; tiles of 16 x 8, W = 4.",
)  # fmt: skip
matrix

# %% [markdown]
# Read the row *tail not masked*. The last tile of row 0 writes garbage over the first positions of row 1. In the interpreter
# row 1 is computed later and repairs them; in the opposite order it does not. On a GPU the programs run at the same time:
# such a kernel is right on some days. Two writers of one address are a **race**, and the interpreter, which has
# only one program at a time, cannot show it. Rule: every output element is written by exactly one program.
#
# ## The way back
#
# Let $\bar y = \partial \ell / \partial y$. The chain rule through SiLU, with $s$ computed again from $x$ instead of being kept in memory:
#
# $$\bar s_t = \bar y_t\, \sigma(s_t)\,\bigl(1 + s_t\,(1 - \sigma(s_t))\bigr).$$
#
# Input $u$ is read by the outputs $t = u + (W-1) - w$, one for each tap, as far as they exist:
#
# $$\bar x_u = \sum_{w=0}^{W-1} k_w\, \bar s_{u+(W-1)-w}, \qquad \bar k_w = \sum_{b,t} \bar s_t\, x_{t-(W-1)+w}, \qquad \bar\beta = \sum_{b,t} \bar s_t .$$
#
# The forward pass looks back, the gradient of $x$ looks ahead. In numbers, against autograd through the oracle:

# %%
leaves = [each.clone().requires_grad_() for each in (x, filters, bias)]
y, _ = causal_conv(*leaves, activation="silu", backend="reference")
grad_y = normal(*y.shape, seed=6)
by_autograd = torch.autograd.grad(y, leaves, grad_y)

padded = F.pad(x, (0, 0, 3, 0))
windows = padded.unfold(1, 4, 1)  # [B, L, D, W]: the inputs t - 3 .. t
sums = bias + (windows * filters).sum(-1)
grad_sums = grad_y * sums.sigmoid() * (1 + sums * (1 - sums.sigmoid()))
grad_filters = torch.einsum("btd,btdw->dw", grad_sums, windows)
ahead = F.pad(grad_sums, (0, 0, 0, 3)).unfold(1, 4, 1)  # [B, L, D, j]: the outputs u + j
grad_x = (ahead * filters.flip(1)).sum(-1)
for name, ours, theirs in zip(
    ("x", "filters", "bias"), (grad_x, grad_filters, grad_sums.sum((0, 1))), by_autograd, strict=True
):
    print(f"gradient of {name:8s} largest difference {(ours - theirs).abs().max():.0e}")

# %% [markdown]
# ### Exercise 12.3: the gradient of the inputs
#
# Write `inputs_gradient_kernel`: from `grad_sums` ($\bar s$, contiguous [rows, positions, channels]) and the filters to `grad_x` of
# the same shape. The grid is that of exercise 12.2. A program owns a tile of *inputs* u and collects from the outputs that read them.


# %% tags=["exercise"]
@triton.jit
def inputs_gradient_kernel(
    grad_sums_ptr, filters_ptr, grad_x_ptr, positions, channels, tiles, W: tl.constexpr, T: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """grad_x[u] = sum over w of filters[:, w] grad_sums[u + (W - 1) - w] for a tile of [T, D]."""
    # BEGIN SOLUTION: for each tap load the outputs u + (W - 1) - w that exist, add them up times the tap, store
    row = tl.program_id(0) // tiles
    u_T = tl.program_id(0) % tiles * T + tl.arange(0, T)
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    in_D = d_D < channels
    grad_TD = tl.zeros((T, D), dtype=tl.float32)
    for w in tl.static_range(W):
        t_T = u_T + (W - 1) - w
        ptrs = grad_sums_ptr + (row * positions + t_T[:, None]) * channels + d_D[None, :]
        filter_D = tl.load(filters_ptr + d_D * W + w, mask=in_D, other=0.0)
        grad_TD += (
            tl.load(ptrs, mask=(t_T < positions)[:, None] & in_D[None, :], other=0.0) * filter_D[None, :]
        )
    x_ptrs = grad_x_ptr + (row * positions + u_T[:, None]) * channels + d_D[None, :]
    tl.store(x_ptrs, grad_TD, mask=(u_T < positions)[:, None] & in_D[None, :])
    # END SOLUTION


# %% tags=["check"]
for shape in ((1, 16, 8), (1, 2, 8), (1, 17, 5), (2, 37, 11)):
    where = f" (rows, positions, channels: {shape})"
    given, leaf = (
        (normal(*shape, seed=7), normal(shape[2], 4, seed=1)),
        torch.zeros(shape, requires_grad=True),
    )
    result = run_tiles(inputs_gradient_kernel, shape, *given)
    [wanted] = torch.autograd.grad(causal_conv(leaf, given[1], None, backend="reference")[0], leaf, given[0])
    forward_again = causal_conv(*given, None, backend="reference")[0]
    check(
        not result[0, :3].isnan().any() or result[-1, 3:].isnan().any(),
        "NaN in the first positions: this looks back, to outputs before u; the gradient looks ahead." + where,
    )
    lost = result[-1].isnan()
    check(strays(result) == 0, "The kernel stored outside grad_x: mask tl.store." + where)
    check(
        not lost[-3:].any() or lost[:-3].any(),
        "NaN in the last positions: outputs t >= positions do not exist." + where,
    )
    check(
        not result.isnan().any(),
        "grad_x holds NaN: an unmasked lane was read, or a number never written." + where,
    )
    check(
        (result - forward_again).abs().max() > 1e-4,
        "This looks back, as the forward pass: look at t >= u." + where,
    )
    check_close(
        result[-1], wanted[-1], "The last row differs: tap w meets output u + (W - 1) - w." + where, atol=1e-5
    )
    check_close(
        result, wanted, "An earlier row differs: does its end read the row after it?" + where, atol=1e-5
    )
passed("12.3")

# %% [markdown]
# ## A sum over programs
#
# $\bar k_w$ sums over all positions, hence over programs, and here "one writer per element" costs something. One could let
# each program add its part to the same address with `tl.atomic_add`. Their order then changes from run to run, and floating-point
# addition is not associative:

# %%
parts, generator, results = normal(1024, seed=8).numpy(), torch.Generator().manual_seed(0), set()
for _ in range(50):
    order = torch.randperm(1024, generator=generator).numpy()
    results.add(float(parts[order].cumsum()[-1]))  # in float32, one number after the other
print(
    f"1,024 float32 numbers added up in 50 orders: {len(results)} different sums, {max(results) - min(results):.0e} apart"
)

# %% [markdown]
# So the library's kernel writes each tile's part to its own place, and PyTorch adds the parts in a fixed order: the same bits in every
# run, for a little more memory. The sums $s$ are computed again (`_sums`), because reading $x$ once more is cheaper than writing and reading $s$.

# %%
show_source(kernels.sums_backward_kernel.fn)

# %% [markdown]
# All of it together, as `backend="triton"`: output, final state and every gradient against the oracle in float64, at odd
# lengths.

# %%
print("positions  " + "  ".join(f"{name:>12s}" for name in ("y", "grad x", "grad filters", "grad bias")))
worst = 0.0
for length in (1, 3, 15, 17, 37):
    both = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        given = [
            each.to(dtype).requires_grad_()
            for each in (normal(2, length, 5, seed=length), normal(5, 4, seed=1), normal(5, seed=2))
        ]
        out, _ = causal_conv(*given, activation="silu", backend=backend)
        both.append((out, *torch.autograd.grad(out, given, normal(*out.shape, seed=6).to(dtype))))
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(*both, strict=True)]
    worst = max(worst, *errors)
    print(f"{length:9d}  " + "  ".join(f"{each:12.1e}" for each in errors))
print(f"worst relative error {worst:.1e}; the kernel tests allow 1e-5 in float32")

# %% [markdown]
# ## What the compiler makes of it
#
# Triton can compile for a GPU that is not there. A fresh process (without the interpreter) compiles the library's
# forward kernel for an H100 (`sm_90`), in two tile sizes. A multiprocessor has 65,536 registers for all its threads, and one thread can use
# at most 255; what does not fit **spills** to memory, which is what the kernel was to spare.

# %%
COMPILE = """
import json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hydra_lab.ops.causal_conv.kernels import forward_kernel as kernel

pointers = ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr", "final_ptr")
numbers = ("positions", "channels", "tiles", "x_row", "x_position")
found = {}
for size in (16, 64):
    constants = dict(initial_ptr=None, length_ptr=None, x_channel=1, initial_row=0, initial_channel=0, initial_tap=0)
    constants |= dict(SILU=True, W=4, T=size, D=64)
    kinds = {name: "*fp32" if name in pointers else "i32" if name in numbers else "constexpr" for name in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, kinds, constexprs=constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    size_of = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
    loads = [line.strip() for line in compiled.asm["ptx"].splitlines() if "ld.global" in line]
    found[size] = {"registers": size_of["REG"], "spilled": size_of["STACK"] + size_of["LOCAL"], "loads": loads}
print(json.dumps(found))
"""

# %% tags=["predict"]
bigger_tile = predict(
    "Tiles of 64 x 64 instead of 16 x 64, with as many threads: what happens to the registers of a thread?",
    [
        "as many as before: tiles live in memory",
        "more, but they fit",
        "they no longer fit, and spill to memory",
    ],
)

# %%
environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", COMPILE],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
)
compiled = json.loads(done.stdout)
for size, found in compiled.items():
    predicated = sum(line.startswith("@") for line in found["loads"])
    print(
        f"T = {size}: {found['registers']} registers per thread, {found['spilled']} bytes spilled, "
        f"{len(found['loads'])} load instructions, {predicated} of them under a predicate"
    )
print("a masked load in PTX:", compiled["16"]["loads"][-1])
small, big = compiled["16"], compiled["64"]
bigger_tile.reveal(
    bigger_tile.options[2 if big["spilled"] else 1 if big["registers"] > small["registers"] else 0],
    f"{small['registers']} registers and {small['spilled']} bytes spilled become {big['registers']} and {big['spilled']}. "
    "A tile lives in registers, spread over the program's threads.",
)

# %% [markdown]
# The mask has become a *predicate* (`@%p`) in front of each load: the instruction is skipped, without a branch, where it is false. The
# library keeps 16 positions, and a test compiles every kernel that is launched and allows no spills.
#
# ## Where this breaks
#
# The interpreter is a fine tool for logic and a poor one for everything else. It runs programs in order and hides races, as you saw. And
# arithmetic in bfloat16 is silently wrong in it:


# %%
@triton.jit
def square_kernel(x_ptr, y_ptr, length, T: tl.constexpr):
    """y = x x, in the dtype of x."""
    i_T = tl.arange(0, T)
    x_T = tl.load(x_ptr + i_T, mask=i_T < length, other=0.0)
    tl.store(y_ptr + i_T, x_T * x_T, mask=i_T < length)


for dtype in (torch.float32, torch.bfloat16):
    numbers = normal(20).to(dtype)
    squares = torch.empty_like(numbers)
    launch(square_kernel, (1,), numbers, squares, 20, T=32)
    print(f"{dtype}: largest error of x * x = {(squares.double() - numbers.double() ** 2).abs().max():.0e}")

# %% [markdown]
# - Poison catches what reaches a stored number. A lane that reads outside and is then masked in `tl.store` passes every test above, and faults
#   on a GPU where the page ends.
# - The library loads in any dtype, converts to float32 at once and rounds once at the end; that is right on a GPU and testable here.
# - Nothing here says how *fast* a kernel is. On an H200 the kernels agreed with the oracles in 418 of 420 tests (GPU.md
#   names the two); their speed there has not been measured, so `backend="auto"` still takes PyTorch's path.
# - Triton chooses tile sizes by *autotuning*: it times several on the device. The interpreter has no device to time on and fails with two or
#   more configurations.
# - Program ids are 32-bit. At $2^{31}$ elements `row * positions * channels` wraps around without a word; the library's kernels convert
#   ids to 64 bits first. The kernels of this lesson do not.
# - No program can save a bad plan. The paper's prototype builds all $T \times T$ attention scores and masks them (18.2 GB at 16K tokens,
#   by its own account); fusing that would be a fast way to waste work.

# %% [markdown]
# ## Next
#
# - `hydra_lab/ops/*/kernels.py` holds all kernels of the model, each with its maths in a README; `tests/kernels` holds poison, odd
#   lengths and the compiler check. `make gpu-check` runs them on a GPU.
# - A kernel worth writing next: the gated norm of exercise 12.1 with its backward pass, which the library leaves to PyTorch.
# - Lesson 2 derives the state-space recurrence whose kernels are in `hydra_lab/ops/ssd`; lesson 13 trains a model.

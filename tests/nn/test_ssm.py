"""The ssm path against transformers' Mamba-2 mixer, and its tap against a recurrence written out by hand."""

from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn.ssm import SSMPath, SSMState
from hydra_lab.taps import StateSummary

CHUNK = 8


def config(**fields: Any) -> HydraConfig:
    return HydraConfig.from_preset("nano", **fields)


def mixer(fields: HydraConfig) -> Mamba2Mixer:
    torch.manual_seed(0)
    theirs = Mamba2Mixer(
        Mamba2Config(
            num_hidden_layers=1,
            hidden_size=fields.hidden_size,
            num_heads=fields.ssm_num_heads,
            head_dim=fields.ssm_head_dim,
            state_size=fields.ssm_state_size,
            n_groups=fields.ssm_num_groups,
            expand=fields.ssm_expand,
            conv_kernel=fields.ssm_conv_kernel,
            chunk_size=CHUNK,
            layer_norm_epsilon=fields.norm_eps,
            hidden_act="silu",
        ),
        layer_idx=0,
    ).eval()
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 1.5)
        theirs.D.uniform_(-1, 1)
    return theirs


def path(fields: HydraConfig) -> SSMPath:
    torch.manual_seed(0)
    ours = SSMPath(fields).eval()
    ours.reset_parameters()
    with torch.no_grad():
        ours.dt_bias.uniform_(-2, 1)  # decays that show within a few tokens
    return ours


# --- against transformers ---

GROUPS = pytest.mark.parametrize("groups", [1, 2])


@GROUPS
def test_the_state_dict_of_transformers_loads_unchanged(groups: int) -> None:
    fields = config(ssm_num_groups=groups)
    theirs, ours = mixer(fields).state_dict(), SSMPath(fields)
    assert set(theirs) == set(ours.state_dict())
    ours.load_state_dict(theirs, strict=True)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


@GROUPS
@pytest.mark.parametrize("length", [1, 7, 8, 29])
@torch.no_grad()
def test_outputs_are_those_of_transformers(length: int, groups: int) -> None:
    fields = config(ssm_num_groups=groups)
    theirs, ours = mixer(fields), SSMPath(fields)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(3, length, fields.hidden_size)
    expected = theirs(hidden)
    found, _ = ours(hidden, Span(length), None)
    print(f"length {length}, largest difference {(found - expected).abs().max():.1e}")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@GROUPS
@torch.no_grad()
def test_outputs_with_a_cache_are_those_of_transformers(groups: int) -> None:
    fields = config(ssm_num_groups=groups)
    theirs, ours = mixer(fields), SSMPath(fields)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 17, fields.hidden_size)
    mamba = Mamba2Config(num_hidden_layers=1)
    cache, state = DynamicCache(config=mamba), None
    worst = 0.0
    for first, end in [(0, 11), *((t, t + 1) for t in range(11, 17))]:
        expected = theirs(hidden[:, first:end], cache_params=cache)
        span = Span(end - first, torch.full((2,), first))
        found, state = ours(hidden[:, first:end], span, state)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        worst = max(worst, float((found - expected).abs().max()))
    assert isinstance(state, SSMState)
    torch.testing.assert_close(
        state.state, cast(Any, cache.layers[0]).recurrent_states[0], rtol=1e-5, atol=1e-5
    )
    print(f"largest difference {worst:.1e}")


# --- writes to the tap, against the recurrence one token at a time ---


class Inputs(NamedTuple):
    """What the recurrence works on: x [L, H, P], dt and decay [L, H], B and C [L, H, N], z [L, H P]."""

    x: Tensor
    dt: Tensor
    decay: Tensor
    B: Tensor
    C: Tensor
    z: Tensor


def inputs_by_hand(ours: SSMPath, hidden_LD: Tensor) -> Inputs:
    """Projection and convolution of one row, written out."""
    size, state_size, heads, groups = ours.inner_size, ours.state_size, ours.num_heads, ours.num_groups
    projected = hidden_LD @ ours.in_proj.weight.T
    z, channels, dt = projected.split([size, size + 2 * groups * state_size, heads], dim=-1)
    width = ours.conv1d.weight.shape[-1]
    padded = torch.cat([channels.new_zeros(width - 1, channels.shape[1]), channels])
    assert ours.conv1d.bias is not None
    convolved = torch.stack(
        [
            (padded[t : t + width] * ours.conv1d.weight[:, 0].T).sum(0) + ours.conv1d.bias
            for t in range(len(channels))
        ]
    )
    x, B, C = F.silu(convolved).split([size, groups * state_size, groups * state_size], dim=-1)
    step = F.softplus(dt + ours.dt_bias)
    of_head = torch.arange(heads) // (heads // groups)
    return Inputs(
        x.reshape(-1, heads, ours.head_dim),
        step,
        -step * ours.A_log.exp(),
        B.reshape(-1, groups, state_size)[:, of_head],
        C.reshape(-1, groups, state_size)[:, of_head],
        z,
    )


def run_by_hand(ours: SSMPath, inputs: Inputs, scales: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [L, D], norms at chunk ends [C, H], last state; `scales[c]` [H] multiplies what leaves chunk c."""
    state = torch.zeros(ours.num_heads, ours.head_dim, ours.state_size)
    outputs, norms = [], []
    length = len(inputs.x)
    for t in range(length):
        update = inputs.dt[t][:, None, None] * inputs.x[t][:, :, None] * inputs.B[t][:, None]
        state = inputs.decay[t].exp()[:, None, None] * state + update
        y = (state * inputs.C[t][:, None]).sum(-1) + ours.D[:, None] * inputs.x[t]
        outputs.append(y.flatten())
        if (t + 1) % CHUNK == 0 or t + 1 == length:
            norms.append(state.square().sum((1, 2)).sqrt())
            scale = scales.get(t // CHUNK)
            state = state if scale is None else state * scale[:, None, None]
    y = torch.stack(outputs)
    gated = (y * F.silu(inputs.z)).unflatten(-1, (ours.num_groups, -1))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + ours.norm.eps).sqrt()).flatten(
        -2
    ) * ours.norm.weight
    return normed @ ours.out_proj.weight.T, torch.stack(norms), state


def write(ours: SSMPath, change: Any) -> list[StateSummary]:
    """Let `change` replace what passes the tap; returns what was there, as a list that the next run fills."""
    seen: list[StateSummary] = []

    def hook(_module: Any, _args: Any, summary: StateSummary) -> StateSummary | None:
        seen.append(StateSummary(*(field.clone() for field in summary)))
        return change(summary)

    ours.state.register_forward_hook(hook)
    return seen


@GROUPS
@torch.no_grad()
def test_the_tap_reports_norms_and_decays(groups: int) -> None:
    ours = path(config(ssm_num_groups=groups))
    hidden = torch.randn(1, 21, 32)
    seen = write(ours, lambda _summary: None)
    found, state = ours(hidden, Span(21), None)
    inputs = inputs_by_hand(ours, hidden[0])
    expected, norms, last = run_by_hand(ours, inputs, {})
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.state[0], last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0].norms[0], norms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0].decay[0], inputs.decay, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_a_written_decay_is_what_the_recurrence_uses(in_place: bool) -> None:
    ours = path(config())
    hidden = torch.randn(1, 21, 32)

    def change(summary: StateSummary) -> StateSummary | None:
        decay = summary.decay if in_place else summary.decay.clone()
        decay[:, 5:9, 1] = 0.0  # keep everything
        decay[:, 12, :] = -50.0  # forget everything
        return None if in_place else summary._replace(decay=decay)

    write(ours, change)
    found, state = ours(hidden, Span(21), None)
    inputs = inputs_by_hand(ours, hidden[0])
    untouched, _, _ = run_by_hand(ours, inputs, {})
    inputs.decay[5:9, 1], inputs.decay[12] = 0.0, -50.0
    expected, _, last = run_by_hand(ours, inputs, {})
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.state[0], last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0, :5], untouched[:5], rtol=1e-5, atol=1e-5)
    assert (found[0, 5:] - untouched[5:]).abs().max() > 1e-2


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_a_written_norm_scales_the_state_that_leaves_its_chunk(in_place: bool) -> None:
    ours = path(config())
    hidden = torch.randn(1, 21, 32)
    factors = torch.tensor([3.0, 1.0, 0.25, 1.0])

    def change(summary: StateSummary) -> StateSummary | None:
        norms = summary.norms if in_place else summary.norms.clone()
        norms[:, 0] *= factors
        norms[:, 2] *= 2.0  # the open chunk: changes the state that is kept, no output of this pass
        return None if in_place else summary._replace(norms=norms)

    write(ours, change)
    found, state = ours(hidden, Span(21), None)
    inputs = inputs_by_hand(ours, hidden[0])
    untouched, _, _ = run_by_hand(ours, inputs, {})
    expected, _, last = run_by_hand(ours, inputs, {0: factors, 2: torch.full((4,), 2.0)})
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.state[0], last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0, :CHUNK], untouched[:CHUNK], rtol=1e-5, atol=1e-5)
    assert (found[0, CHUNK] - untouched[CHUNK]).abs().max() > 1e-2


@torch.no_grad()
def test_a_norm_of_zero_empties_the_head() -> None:
    ours = path(config())
    hidden = torch.randn(1, 16, 32)
    write(ours, lambda summary: summary._replace(norms=summary.norms * 0.0))
    found, state = ours(hidden, Span(16), None)
    expected, _, last = run_by_hand(
        ours, inputs_by_hand(ours, hidden[0]), {0: torch.zeros(4), 1: torch.zeros(4)}
    )
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert state.state.abs().max() == last.abs().max() == 0


@torch.no_grad()
def test_writes_to_a_piece_that_starts_inside_a_chunk() -> None:
    ours = path(config())
    hidden = torch.randn(1, 21, 32)
    _, state = ours(hidden[:, :5], Span(5), None)
    factors = torch.tensor([0.5, 2.0, 1.0, 4.0])

    def change(summary: StateSummary) -> StateSummary:
        assert summary.norms.shape == (1, 3, 4)  # chunks 0 (its rest), 1 and 2
        norms = summary.norms.clone()
        norms[:, 0] *= factors
        return summary._replace(norms=norms)

    write(ours, change)
    found, _ = ours(hidden[:, 5:], Span(16, torch.tensor([5])), state)
    expected, _, _ = run_by_hand(ours, inputs_by_hand(ours, hidden[0]), {0: factors})
    torch.testing.assert_close(found[0], expected[5:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_leaves_the_state_alone() -> None:
    ours = path(config())
    hidden = torch.randn(2, 19, 32)
    seen = write(ours, lambda _summary: None)
    _, padded = ours(hidden, Span(19, None, torch.tensor([6, 19])), None)
    _, alone = ours(hidden[:1, :6], Span(6), None)
    torch.testing.assert_close(padded.state[:1], alone.state)
    torch.testing.assert_close(padded.conv[:1], alone.conv)
    torch.testing.assert_close(seen[0].norms[0], seen[1].norms[0].expand(3, -1))
    assert (seen[0].decay[0, 6:] == 0).all()

"""States read and written whole: a written state is where later tokens go on from, a written read-out is one token's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hydra_lab.capture import record
from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.ssm import SSMPath, SSMState
from hydra_lab.taps import ChunkStates, requested
from tests.helpers import lively_model, random_ids

CHUNK, LENGTH = 8, 29  # `nano`: chunks of 8


@pytest.fixture(scope="module")
def path() -> SSMPath:
    torch.manual_seed(0)
    path = SSMPath(HydraConfig.from_preset("nano", ssm_num_groups=2))
    path.reset_parameters()
    with torch.no_grad():
        path.dt_bias.add_(2.0)
    return path


@pytest.fixture(scope="module")
def hidden(path: SSMPath) -> Tensor:
    return torch.randn(2, LENGTH, path.in_proj.in_features, generator=torch.Generator().manual_seed(1))


def rewrite(tap: nn.Module, chunk: int, state: Tensor) -> Any:
    """A hook that writes `state` [B, H, P, N] at the end of `chunk`."""

    def hook(_module: Any, _inputs: Any, decision: ChunkStates) -> ChunkStates:
        states = decision.states.clone()
        states[:, chunk] = state
        return ChunkStates(states)

    return tap.register_forward_hook(hook)


@torch.no_grad()
def run(path: SSMPath, hidden: Tensor, state: SSMState | None = None, start: int = 0) -> tuple[Tensor, SSMState]:
    span = Span(hidden.shape[1], torch.full((len(hidden),), start) if start else None)
    return path(hidden, span, state)


def another_state(path: SSMPath, seed: int) -> Tensor:
    shape = (2, path.num_heads, path.head_dim, path.state_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_states_are_those_after_each_chunk(path: SSMPath, hidden: Tensor) -> None:
    seen: list[ChunkStates] = []
    handles = [tap.register_forward_hook(lambda *each: seen.append(each[2])) for tap in (path.readout, path.states)]
    untouched, last = run(path, hidden)
    assert not seen, "nobody asked"
    with requested([path.readout, path.states]):
        read, _ = run(path, hidden)
    for handle in handles:
        handle.remove()
    assert torch.equal(read, untouched)
    for states in (decision.states for decision in seen):
        for chunk in range(3):
            _, prefix = run(path, hidden[:, : (chunk + 1) * CHUNK])
            torch.testing.assert_close(states[:, chunk], prefix.state, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(states[:, 3], last.state)


def test_a_written_state_is_where_the_rest_goes_on_from(path: SSMPath, hidden: Tensor) -> None:
    written = another_state(path, seed=2)
    handle = rewrite(path.states, 1, written)
    with requested([path.states]):
        patched, final = run(path, hidden)
    handle.remove()
    untouched, _ = run(path, hidden)
    assert torch.equal(patched[:, : 2 * CHUNK], untouched[:, : 2 * CHUNK])
    _, before = run(path, hidden[:, : 2 * CHUNK])
    rest, after = run(path, hidden[:, 2 * CHUNK :], SSMState(before.conv, written), start=2 * CHUNK)
    # 1e-5: the same recurrence, its edit added after the scan instead of before
    torch.testing.assert_close(patched[:, 2 * CHUNK :], rest, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final.state, after.state, rtol=1e-5, atol=1e-5)


def test_of_two_written_states_the_later_one_counts(path: SSMPath, hidden: Tensor) -> None:
    first, second = another_state(path, seed=3), another_state(path, seed=4)
    handles = [rewrite(path.states, 0, first), rewrite(path.states, 1, second)]
    with requested([path.states]):
        both, _ = run(path, hidden)
    handles.pop(0).remove()
    with requested([path.states]):
        later, _ = run(path, hidden)
    handles.pop().remove()
    torch.testing.assert_close(both[:, 2 * CHUNK :], later[:, 2 * CHUNK :], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[:, CHUNK : 2 * CHUNK], later[:, CHUNK : 2 * CHUNK])


def test_a_written_read_out_changes_one_token(path: SSMPath, hidden: Tensor) -> None:
    handle = rewrite(path.readout, 1, torch.zeros(()))
    with requested([path.readout]):
        patched, final = run(path, hidden)
    handle.remove()
    untouched, last = run(path, hidden)
    token = 2 * CHUNK - 1
    changed = (patched != untouched).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    assert changed == [token]
    assert torch.equal(final.state, last.state)
    kept = path.D.detach().clone()
    with torch.no_grad():  # with nothing read from the state, only the skip D x is left
        channels, z = hidden @ path.in_proj.weight.T, None
        z, channels, _ = channels.split([path.inner_size, path.conv1d.in_channels, path.num_heads], dim=-1)
        window = channels[:, token - 3 : token + 1].transpose(1, 2)
        x = torch.nn.functional.silu(path.conv1d(window))[:, : path.inner_size, 0]
        y = (x.unflatten(1, (path.num_heads, -1)) * kept[:, None]).flatten(1)
        by_hand = path.out_proj(path.norm(y[:, None], z[:, token : token + 1]))
    torch.testing.assert_close(patched[:, token : token + 1], by_hand, rtol=1e-5, atol=1e-5)


def test_a_written_norm_and_a_written_state_go_together(path: SSMPath, hidden: Tensor) -> None:
    """A halved norm and a halved state are the same change, wherever they are written."""

    def halve_norm(_module: Any, _inputs: Any, decision: Any) -> Any:
        norms = decision.norms.clone()
        norms[:, 0] *= 0.5
        return decision._replace(norms=norms)

    def halve_state(_module: Any, _inputs: Any, decision: ChunkStates) -> ChunkStates:
        states = decision.states.clone()
        states[:, 0] *= 0.5
        return ChunkStates(states)

    handle = path.state.register_forward_hook(halve_norm)
    by_norm, norm_final = run(path, hidden)
    with requested([path.states]):
        read, _ = run(path, hidden)
    handle.remove()
    handle = path.states.register_forward_hook(halve_state)
    with requested([path.states]):
        by_state, state_final = run(path, hidden)
    handle.remove()
    torch.testing.assert_close(by_state, by_norm, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state_final.state, norm_final.state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read, by_norm)


@pytest.mark.parametrize("tap", ["states", "readout"])
def test_an_edit_holds_whatever_the_pieces(path: SSMPath, hidden: Tensor, tap: str) -> None:
    """Scaling every state at the chunks' ends, in one pass and in pieces that end where chunks do."""

    def scale(_module: Any, _inputs: Any, decision: ChunkStates) -> ChunkStates:
        whole = decision.states.shape[1] if ends_whole[0] else decision.states.shape[1] - 1
        states = decision.states.clone()
        states[:, :whole] *= 0.7
        return ChunkStates(states)

    ends_whole = [False]
    handle = getattr(path, tap).register_forward_hook(scale)
    with requested([getattr(path, tap)]):
        one_pass, _ = run(path, hidden)
        state, pieces, start = None, [], 0
        for size, ends in ((5, False), (3, True), (16, True), (5, False)):
            ends_whole[0] = ends
            piece, state = run(path, hidden[:, start : start + size], state, start)
            pieces.append(piece)
            start += size
    handle.remove()
    torch.testing.assert_close(torch.cat(pieces, dim=1), one_pass, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> HydraForCausalLM:
    return lively_model(seed=5)


def test_requested_taps_are_recorded_when_named_and_only_then(model: HydraForCausalLM) -> None:
    ids = random_ids(model.config, 2, LENGTH)
    everything = record(model, ids)
    assert not [name for name in everything if name.endswith(("ssm.states", "ssm.readout", "attention.mass"))]
    recording = record(model, ids, taps=["ssm.states", "attention.mass"])
    states = recording.by_layer("ssm.states")
    norms = everything.by_layer("ssm.state")
    assert list(states) == list(range(4))
    for layer, decision in states.items():
        measured = torch.linalg.vector_norm(decision.states.flatten(-2), dim=-1)
        torch.testing.assert_close(measured, norms[layer].norms)
    for decision in recording.by_layer("attention.mass").values():
        assert decision.mass.shape == (2, LENGTH, 4, 3)
        torch.testing.assert_close(decision.mass.sum(-1), torch.ones(2, LENGTH, 4))
    assert torch.equal(recording.logits, everything.logits)


def test_the_mass_of_attention_is_a_measurement(model: HydraForCausalLM) -> None:
    tap = model.get_submodule("model.layers.1.attention.mass")
    handle = tap.register_forward_hook(lambda _m, _i, decision: type(decision)(decision.mass * 0.5))
    try:
        with requested([tap]), pytest.raises(ValueError, match="write attention.selection"):
            model(random_ids(model.config, 1, 9))
    finally:
        handle.remove()

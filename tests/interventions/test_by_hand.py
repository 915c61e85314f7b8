"""Each change does what the same change does when it is made by hand in torch, mostly in the weights of a copy."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_lab.capture import record
from hydra_lab.interventions import PatchState, capture_state, intervened
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import Selection, requested
from tests.helpers import lively_model, random_ids
from tests.interventions.vocabulary import STATE

CHUNK = 8


@torch.no_grad()
def logits_of(model: HydraForCausalLM, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def block_of(model: HydraForCausalLM, index: int) -> Any:
    return model.model.blocks[index]


def swiglu(path: Any, expert: int, hidden: Tensor) -> Tensor:
    gate, up = (hidden @ path.gate_up_proj[expert].T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ path.down_proj[expert].T


# --- changes that a change of weights makes too ---------------------------------------------------------------------


def empty_expert(model: Any) -> None:
    block_of(model, 0).moe.down_proj[1] = 0


def divide_router_logits(model: Any) -> None:
    for index in (0, 2):
        path = block_of(model, index).moe
        path.router.weight /= 0.25
        path.token_router.weight /= 0.25


def empty_rows(model: Any) -> None:
    block_of(model, 2).memory.values[[1, 9, 17]] = 0


def copy_row(model: Any) -> None:
    values = block_of(model, 2).memory.values
    values[9] = values[60]


def swap_rows(model: Any) -> None:
    values = block_of(model, 2).memory.values
    values[[9, 33]] = values[[33, 9]]


def write_row(model: Any) -> None:
    block_of(model, 2).memory.values[9] = torch.arange(32) / 8


def fix_gate(model: Any) -> None:
    gate = block_of(model, 2).memory.gate
    gate.weight.zero_()
    gate.bias.fill_(math.log(0.9 / 0.1))


def never_write(model: Any) -> None:
    gate = block_of(model, 3).workspace.forget_gate
    gate.weight[1] = 0
    gate.bias[1] = 200.0  # 1 - sigmoid(200) is 0 in fp32


def swap_names(model: Any) -> None:
    # a reader's attention sums over slots, so contents that are exchanged are names that are exchanged
    name = block_of(model, 1).workspace.slot_name
    name[[0, 3]] = name[[3, 0]]


def slow_down(model: Any) -> None:
    block_of(model, 1).ssm.A_log[2] += math.log(0.25)


def never_forget(model: Any) -> None:
    block_of(model, 1).ssm.A_log[2] = -torch.inf


def close_gates(model: Any) -> None:
    for index in (0, 2):
        block_of(model, index).gates["moe"].zero_()


def turn_gate(model: Any) -> None:
    block_of(model, 3).gates["attention"].mul_(-1.5)


IN_WEIGHTS: dict[str, Callable[[Any], None]] = {
    "moe[0].ablate(expert=1, renormalize=false)": empty_expert,
    "moe[*].temperature(value=0.25)": divide_router_logits,
    "memory[2].mask(addresses=[1, 9, 17])": empty_rows,
    "memory[2].replace(source=9, target=60)": copy_row,
    "memory[2].swap(first=9, second=33)": swap_rows,
    f"memory[2].edit(address=9, value={[n / 8 for n in range(32)]})": write_row,
    "memory[2].beta(value=0.9)": fix_gate,
    "workspace[3].freeze(slot=1)": never_write,
    "workspace[1].swap(first=3, second=0)": swap_names,
    "ssm[1].scale_decay(head=2, factor=0.25)": slow_down,
    "ssm[1].scale_decay(head=2, factor=0)": never_forget,
    "moe[*].cut()": close_gates,
    "attention[3].scale(factor=-1.5)": turn_gate,
}


@pytest.mark.parametrize("text", IN_WEIGHTS, ids=lambda text: text[:50])
def test_a_change_of_weights_that_does_the_same(model: HydraForCausalLM, ids: Tensor, text: str) -> None:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        IN_WEIGHTS[text](changed)
    with intervened(model, text):
        ours = logits_of(model, ids)
    # 1e-4: the same numbers, summed in another order or scaled in another place
    torch.testing.assert_close(ours, logits_of(changed, ids), rtol=1e-4, atol=1e-4)
    assert (ours - logits_of(model, ids)).abs().max() > 1e-3, "the change shows nothing"


# --- changes to decisions ---------------------------------------------------------------------------------------------


@contextmanager
def output_replaced(module: Any, replace: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def test_ablation_gives_the_weight_to_the_others(model: HydraForCausalLM, ids: Tensor) -> None:
    """The expert's output at zero, and what the path adds scaled to the weight that the others had."""
    path = block_of(model, 0).moe
    routing = record(model, ids, taps="layers.0.moe.routing")["layers.0.moe.routing"]
    experts_BLK = routing.experts.repeat_interleave(CHUNK, dim=1)[:, : ids.shape[1]]
    others_BL = torch.where(experts_BLK == 1, 0.0, routing.weights).sum(dim=-1)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        empty_expert(changed)
    by_hand = block_of(changed, 0).moe
    with output_replaced(by_hand, lambda _m, _a, out: (out[0] / others_BL[..., None], *out[1:])):
        expected = logits_of(changed, ids)
    with intervened(model, "moe[0].ablate(expert=1)"):
        ours = logits_of(model, ids)
        after = record(model, ids, taps="layers.0.moe.routing")["layers.0.moe.routing"]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    chose_BL = (experts_BLK == 1).any(dim=-1)
    assert chose_BL.any() and not chose_BL.all()
    assert torch.equal(after.weights[~chose_BL], routing.weights[~chose_BL])
    torch.testing.assert_close(after.weights.sum(-1), torch.ones_like(after.weights[..., 0]))
    assert path.top_k == 2


def test_ablating_the_only_expert_of_a_chunk_adds_nothing() -> None:
    model = lively_model(seed=4, moe_top_k=1)
    ids = random_ids(model.config, 1, 20)
    expert = int(record(model, ids)["layers.0.moe.routing"].experts[0, 0, 0])
    with intervened(model, f"moe[0].ablate(expert={expert})"):
        recording = record(model, ids, taps=[], contributions=True)
    assert recording.contributions["layers.0.moe"].norm[0, :CHUNK].max() == 0
    with intervened(model, f"moe[0].ablate(expert={expert}); moe[0].temperature(value=3.0)"):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_forced_expert_serves_every_token_alone(model: HydraForCausalLM, ids: Tensor) -> None:
    path = block_of(model, 0).moe
    with output_replaced(path, lambda _m, args, out: (swiglu(path, 1, args[0]), *out[1:])):
        expected = logits_of(model, ids)
    with intervened(model, "moe[0].force(expert=1)"):
        ours = logits_of(model, ids)
        routing = record(model, ids)["layers.0.moe.routing"]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert bool((routing.experts == 1).all())
    assert bool((routing.weights == torch.tensor([1.0, 0.0])).all())


def test_forced_experts_share_a_token_by_their_logits(model: HydraForCausalLM, ids: Tensor) -> None:
    path = block_of(model, 2).moe

    def both(_module: Any, args: tuple[Any, ...], out: tuple[Any, ...]) -> tuple[Any, ...]:
        chunk_logits = logits_BCE.repeat_interleave(CHUNK, dim=1)[:, : ids.shape[1]]
        scores = (chunk_logits + args[0] @ path.token_router.weight.T)[..., [3, 1]].softmax(dim=-1)
        added = scores[..., :1] * swiglu(path, 3, args[0]) + scores[..., 1:] * swiglu(path, 1, args[0])
        return added, *out[1:]

    logits_BCE = record(model, ids)["layers.2.moe.routing"].logits
    with output_replaced(path, both):
        expected = logits_of(model, ids)
    with intervened(model, "moe[2].force(experts=[3, 1])"):
        ours = logits_of(model, ids)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with intervened(model, "moe[2].force(experts=[1, 3])"):
        torch.testing.assert_close(logits_of(model, ids), ours)


def test_routing_by_a_table(model: HydraForCausalLM, ids: Tensor) -> None:
    """Chunk 1 by expert 3, chunk 3 by the experts that it would have chosen, the rest by the model."""
    path = block_of(model, 0).moe
    untouched = record(model, ids)["layers.0.moe.routing"]

    def second_chunk(_module: Any, args: tuple[Any, ...], out: tuple[Any, ...]) -> tuple[Any, ...]:
        added = out[0].clone()
        added[:, CHUNK : 2 * CHUNK] = swiglu(path, 3, args[0][:, CHUNK : 2 * CHUNK])
        return added, *out[1:]

    with output_replaced(path, second_chunk):
        expected = logits_of(model, ids)
    with intervened(model, "moe[0].route(experts=[[], [3]])"):
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-5, atol=1e-5)
    own = untouched.experts[0].tolist()
    with intervened(model, f"moe[0].route(experts={own})"):
        routing = record(model, ids[:1])["layers.0.moe.routing"]
    assert torch.equal(routing.experts, untouched.experts[:1])
    torch.testing.assert_close(routing.weights, untouched.weights[:1])


def test_masked_rows_give_their_weight_to_the_heads_others(model: HydraForCausalLM, ids: Tensor) -> None:
    lookup = record(model, ids)["layers.2.memory.lookup"]
    masked = [int(each) for each in lookup.addresses[0, 5, 0, :2]] + [int(lookup.addresses[1, 3, 1, 0])]
    expected = lookup.weights.clone()
    for cell, row in enumerate(lookup.addresses.flatten(0, 2).tolist()):
        weights = expected.view(-1, expected.shape[-1])[cell]
        kept = [
            weight if address not in masked else 0.0
            for address, weight in zip(row, weights.tolist(), strict=True)
        ]
        expected.view(-1, expected.shape[-1])[cell] = torch.tensor(kept) / (sum(kept) or 1.0)
    with intervened(model, f"memory[2].mask(addresses={sorted(set(masked))}, renormalize=true)"):
        found = record(model, ids)["layers.2.memory.lookup"]
    torch.testing.assert_close(found.weights, expected)
    assert torch.equal(found.addresses, lookup.addresses)


def test_a_zeroed_slot_hands_out_zeros(model: HydraForCausalLM, ids: Tensor) -> None:
    path = block_of(model, 1).workspace

    def empty(_module: Any, _args: Any, slots: Tensor) -> Tensor:
        slots = slots.clone()
        slots[:, :, 2] = 0
        return slots

    with output_replaced(path.slot_norm, empty):
        expected = logits_of(model, ids)
    with intervened(model, "workspace[1].zero(slot=2)"):
        assert torch.equal(logits_of(model, ids), expected)
    assert not torch.equal(logits_of(model, ids), expected)


def test_a_slot_frozen_later_keeps_what_it_has(model: HydraForCausalLM, ids: Tensor) -> None:
    path = block_of(model, 1).workspace
    seen: list[Tensor] = []
    with intervened(model, "workspace[1].freeze(slot=4, from_chunk=2)"):
        with output_replaced(path.slot_norm, lambda _m, args, _out: seen.append(args[0])):
            written = record(model, ids)["layers.1.workspace.write"]
    with output_replaced(path.slot_norm, lambda _m, args, _out: seen.append(args[0])):
        untouched = record(model, ids)["layers.1.workspace.write"]
    frozen, free = seen
    assert bool((written.gate[:, 2:, 4] == 0).all())
    assert torch.equal(written.gate[:, :2], untouched.gate[:, :2])
    assert torch.equal(frozen[:, :3], free[:, :3]), "chunk 2 reads what chunks 0 and 1 wrote"
    assert torch.equal(frozen[:, 3:, 4], free[:, 2:3, 4].expand(-1, 3, -1))
    assert torch.equal(frozen[:, :, :4], free[:, :, :4])


def test_a_written_state_is_where_the_rest_goes_on_from(model: HydraForCausalLM, ids: Tensor) -> None:
    """The same state put into the cache between two pieces."""
    with torch.no_grad():
        out = model(input_ids=ids[:, :16], use_cache=True)
        state = out.past_key_values.states[1]["ssm"]
        out.past_key_values.states[1]["ssm"] = state._replace(state=STATE.expand_as(state.state))
        expected = model(input_ids=ids[:, 16:], past_key_values=out.past_key_values).logits
    with intervened(model, PatchState(block=1, position=15, state=STATE)):
        patched = logits_of(model, ids)
    torch.testing.assert_close(patched[:, 16:], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(patched[:, :16], out.logits, rtol=1e-4, atol=1e-4)


def test_one_head_is_patched_alone(model: HydraForCausalLM, ids: Tensor) -> None:
    before = record(model, ids, taps="layers.0.ssm.states")["layers.0.ssm.states"].states
    with intervened(model, PatchState(block=0, position=7, state=STATE[1], head=3)):
        after = record(model, ids, taps="layers.0.ssm.states")["layers.0.ssm.states"].states
    assert torch.equal(after[:, 0, 3], STATE[1].expand(3, -1, -1))
    assert torch.equal(after[:, :, :3], before[:, :, :3])


def test_a_patched_read_out_is_one_tokens(model: HydraForCausalLM, ids: Tensor) -> None:
    path = block_of(model, 3).ssm

    def written(_module: Any, _args: Any, decision: Any) -> Any:
        states = decision.states.clone()
        states[:, 3] = STATE
        return type(decision)(states)

    with requested([path.readout]), output_replaced(path.readout, written):
        expected = logits_of(model, ids)
    with intervened(model, PatchState(block=3, position=31, state=STATE, kind="read")):
        patched = logits_of(model, ids)
    assert torch.equal(patched, expected)
    changed = (patched != logits_of(model, ids)).any(dim=-1).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [31]  # the last block, and only that token


def test_a_captured_state_stands_in_for_its_run(model: HydraForCausalLM, ids: Tensor) -> None:
    """Block 0 has nothing but its state and a short convolution, so with another run's state it ends as that run."""
    own = capture_state(model, ids[0], block=0, position=15)
    assert own.shape == (4, 16, 16) and own.dtype == torch.float32
    states = record(model, ids, taps="layers.0.ssm.states")["layers.0.ssm.states"].states
    torch.testing.assert_close(own, states[0, 1], rtol=1e-5, atol=1e-6)
    last = capture_state(model, ids[:1], block=0)
    torch.testing.assert_close(last, states[0, -1], rtol=1e-5, atol=1e-6)
    untouched = logits_of(model, ids[:1])
    with intervened(model, PatchState(block=0, position=15, state=own)):
        torch.testing.assert_close(logits_of(model, ids[:1]), untouched, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(capture_state(model, ids[1], 0, 15), own)
    mixed = torch.cat([ids[1:2, :13], ids[:1, 13:]], dim=1)  # the convolution reaches three tokens back
    added: list[Tensor] = []
    with output_replaced(
        block_of(model, 0).contributions["ssm"], lambda _m, _a, update: added.append(update)
    ):
        logits_of(model, ids[:1])
        with intervened(model, PatchState(block=0, position=15, state=own)):
            logits_of(model, mixed)
        logits_of(model, mixed)
    own_run, patched, untouched = (update[:, 16:] for update in added)
    torch.testing.assert_close(patched, own_run, rtol=1e-4, atol=1e-5)
    # their last three tokens are the same, so the two runs are not far from each other to begin with
    assert (untouched - own_run).abs().max() > 50 * (patched - own_run).abs().max()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"block": 4}, "no block 4"),
        ({"position": 45}, "0 to 44"),
        ({"position": -1}, "0 to 44"),
    ],
)
def test_what_cannot_be_captured(
    model: HydraForCausalLM, ids: Tensor, given: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        capture_state(model, ids[0], **{"block": 0, **given})
    with pytest.raises(ValueError, match=r"one row of tokens.* got \[3, 45\]"):
        capture_state(model, ids, block=0)


def test_scaled_decay_is_what_the_tap_would_write(model: HydraForCausalLM, ids: Tensor) -> None:
    def scaled(_module: Any, _args: Any, decision: Any) -> Any:
        decay = decision.decay.clone()
        decay[..., 2] *= 0.25
        return decision._replace(decay=decay)

    with output_replaced(block_of(model, 1).ssm.state, scaled):
        expected = logits_of(model, ids)
    with intervened(model, "ssm[1].scale_decay(head=2, factor=0.25)"):
        ours = record(model, ids, taps=["ssm.state", "ssm.states"])
    torch.testing.assert_close(ours.logits, expected, rtol=1e-4, atol=1e-4)
    norms = torch.linalg.vector_norm(ours["layers.1.ssm.states"].states.flatten(-2), dim=-1)
    torch.testing.assert_close(
        ours["layers.1.ssm.state"].norms, norms
    )  # the norms are those of the changed run


def selected_by_hand(ids: Tensor, choose: Callable[[int, list[int]], list[int]]) -> Callable[..., Selection]:
    """A hook that chooses blocks query by query, from the query's own block and what the model selected."""

    def hook(_module: Any, _args: Any, selection: Selection) -> Selection:
        blocks = selection.blocks.clone()
        for row in range(blocks.shape[0]):
            for position in range(blocks.shape[1]):
                for head in range(blocks.shape[2]):
                    own = selection.blocks[row, position, head].tolist()
                    chosen = choose(position // 4, own)
                    blocks[row, position, head] = torch.tensor((chosen + [-1, -1])[:2])
        return selection._replace(blocks=blocks)

    return hook


ON_BLOCKS: dict[str, Callable[[int, list[int]], list[int]]] = {
    "attention[1].forbid(blocks=[1, 2, 4, 6])": lambda _here, own: [b for b in own if b not in (1, 2, 4, 6)],
    "attention[1].select(blocks=[3, 1])": lambda here, _own: [b for b in (3, 1) if b < here],
    "attention[1].select(blocks=[])": lambda _here, _own: [],
}


@pytest.mark.parametrize("text", ON_BLOCKS)
def test_selected_blocks(model: HydraForCausalLM, ids: Tensor, text: str) -> None:
    tap = block_of(model, 1).attention.selection
    untouched = record(model, ids)["layers.1.attention.selection"]
    with output_replaced(tap, selected_by_hand(ids, ON_BLOCKS[text])):
        expected = record(model, ids)
    with intervened(model, text):
        ours = record(model, ids)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours.logits, logits_of(model, ids))
    selection = ours["layers.1.attention.selection"]
    assert bool((selection.scores[selection.blocks < 0] == -torch.inf).all())
    same = selection.blocks == untouched.blocks
    assert torch.equal(selection.scores[same], untouched.scores[same])

"""Taps: each has the documented shapes, tells the truth whatever the padding, and what is written to it counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import (
    PATHS,
    REQUESTED_TAPS,
    TAPS,
    Lookup,
    Routing,
    Selection,
    StateSummary,
    Tap,
    WorkspaceRead,
    WorkspaceWrite,
)
from tests.helpers import listen, lively_model, random_ids

# Sizes of `nano`: chunks of 8 (ssm, moe, workspace), blocks of 4, window 8.
CHUNK, LENGTH = 8, 29


@pytest.fixture(scope="module", params=["token", "tile"])
def model(request: pytest.FixtureRequest) -> HydraForCausalLM:
    return lively_model(attention_selection=request.param)


def tap_of(model: HydraForCausalLM, layer: int, name: str) -> Tap:
    tap = model.get_submodule(f"model.layers.{layer}.{name}")
    assert isinstance(tap, Tap)
    return tap


def places(model: HydraForCausalLM) -> list[tuple[int, str]]:
    """(block, tap) for every tap that the configuration promises."""
    return [(layer, name) for name in TAPS for layer in model.config.layers_with(name.split(".")[0])]


@torch.no_grad()
def recorded(model: HydraForCausalLM, ids: Tensor, **inputs: Any) -> tuple[dict[tuple[int, str], Any], Any]:
    """What every tap carried in one run, and the run's output."""
    lists = {place: listen(tap_of(model, *place)) for place in places(model)}
    out = model(ids, **inputs)
    for place in places(model):
        tap_of(model, *place)._forward_hooks.clear()
    assert all(len(seen) == 1 for seen in lists.values())
    return {place: seen[0] for place, seen in lists.items()}, out


def shapes(batch: int, length: int, num_chunks: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The design's table, for `nano`."""
    B, L, C = batch, length, num_chunks
    return {
        "moe.routing": {"logits": (B, C, 4), "experts": (B, C, 2), "weights": (B, L, 2)},
        "attention.selection": {"blocks": (B, L, 2, 2), "scores": (B, L, 2, 2)},
        "workspace.write": {"address": (B, C, 5, CHUNK), "gate": (B, C, 5)},
        "workspace.read": {"address": (B, L, 5), "gate": (B, L, 1)},
        "memory.lookup": {"addresses": (B, L, 2, 4), "weights": (B, L, 2, 4), "gate": (B, L, 1)},
        "ssm.state": {"norms": (B, C, 4), "decay": (B, L, 4)},
    }


def check_shapes(decisions: dict[tuple[int, str], Any], batch: int, length: int, num_chunks: int) -> None:
    for (_, name), decision in decisions.items():
        assert type(decision) is TAPS[name]
        assert {k: tuple(v.shape) for k, v in decision._asdict().items()} == shapes(
            batch, length, num_chunks
        )[name]


def test_the_table_of_taps() -> None:
    assert TAPS == {
        "moe.routing": Routing,
        "attention.selection": Selection,
        "workspace.write": WorkspaceWrite,
        "workspace.read": WorkspaceRead,
        "memory.lookup": Lookup,
        "ssm.state": StateSummary,
    }
    assert {name.split(".")[0] for name in TAPS} == set(PATHS)


def test_the_model_has_these_taps_and_no_others(model: HydraForCausalLM) -> None:
    found = {name for name, module in model.named_modules() if isinstance(module, Tap)}
    on_request = {
        f"model.layers.{layer}.{name}"
        for name in REQUESTED_TAPS
        for layer in model.config.layers_with(name.split(".")[0])
    }
    assert found == {f"model.layers.{layer}.{name}" for layer, name in places(model)} | on_request


def test_every_tap_fires_with_the_shapes_of_the_table(model: HydraForCausalLM) -> None:
    ids = random_ids(model.config, 3, LENGTH)
    decisions, out = recorded(model, ids, use_cache=True)
    check_shapes(decisions, 3, LENGTH, 4)
    decisions, _ = recorded(model, ids[:, :1], past_key_values=out.past_key_values)
    check_shapes(decisions, 3, 1, 1)  # a single step
    mask = torch.ones(3, LENGTH)
    mask[1, :11] = 0
    check_shapes(recorded(model, ids, attention_mask=mask)[0], 3, LENGTH, 4)


def test_values_are_what_the_table_says(model: HydraForCausalLM) -> None:
    decisions, _ = recorded(model, random_ids(model.config, 2, LENGTH))
    one = torch.ones(())
    for (_, name), decision in decisions.items():
        if name == "moe.routing":
            assert decision.experts.dtype == torch.int64
            assert torch.equal(decision.experts, decision.logits.topk(2).indices)
            torch.testing.assert_close(decision.weights.sum(-1), one.expand(2, LENGTH))
        elif name == "attention.selection":
            assert decision.blocks.dtype == torch.int64
            assert torch.equal(decision.blocks < 0, decision.scores == -torch.inf)
            assert (decision.scores.diff(dim=-1).nan_to_num(0.0) <= 0).all()  # best first
            assert (decision.blocks[:, 20:] > 0).any()
        elif name == "workspace.write":
            torch.testing.assert_close(decision.address.sum(-1), one.expand(2, 4, 5))
            assert (decision.address[:, 3, :, LENGTH % CHUNK :] == 0).all()
            assert ((decision.gate > 0) & (decision.gate < 1)).all()
        elif name == "workspace.read":
            torch.testing.assert_close(decision.address.sum(-1), one.expand(2, LENGTH))
        elif name == "memory.lookup":
            assert ((decision.addresses >= 0) & (decision.addresses < 64)).all()
            torch.testing.assert_close(decision.weights.sum(-1), one.expand(2, LENGTH, 2))
            assert ((decision.gate > 0) & (decision.gate < 1)).all()
        else:
            assert (decision.norms > 0).all() and (decision.decay < 0).all()


def test_decisions_are_in_the_rows_own_coordinates(model: HydraForCausalLM) -> None:
    ids = random_ids(model.config, 1, 19)
    alone, _ = recorded(model, ids)
    padded = torch.cat([torch.ones(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 19])
    shifted, _ = recorded(model, padded, attention_mask=mask)
    for place, decision in alone.items():
        for field, value in decision._asdict().items():
            here = getattr(shifted[place], field)[:, : value.shape[1]]
            torch.testing.assert_close(here, value, rtol=1e-4, atol=1e-5, msg=f"{place} {field}")


def test_reading_changes_nothing(model: HydraForCausalLM) -> None:
    ids = random_ids(model.config, 2, LENGTH)
    with torch.no_grad():
        untouched = model(ids)
    _, read = recorded(model, ids)
    assert torch.equal(read.logits, untouched.logits)
    for run in (torch.no_grad, torch.inference_mode):  # in which writes are told from reads differently
        with run():
            assert torch.equal(model(ids).logits, untouched.logits)


def test_a_tap_that_returns_equal_values_changes_nothing(model: HydraForCausalLM) -> None:
    ids = random_ids(model.config, 2, LENGTH)
    with torch.no_grad():
        untouched = model(ids).logits
        handles = [
            tap_of(model, *place).register_forward_hook(
                lambda _m, _a, out: type(out)(*(f.clone() for f in out))
            )
            for place in places(model)
        ]
        copied = model(ids).logits
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(copied, untouched, rtol=0, atol=1e-5)


# --- writes ---


def edited(field: str, place: Any, change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def edit(decision: Any) -> Any:
        tensor = getattr(decision, field).clone()
        tensor[place] = change(tensor[place])
        return decision._replace(**{field: tensor})

    return edit


AT_5, AT_20 = (slice(None), 5), (slice(None), 20)
CHUNK_0, CHUNK_1 = (slice(None), 0), (slice(None), 1)

WRITES: dict[str, tuple[int, str, Callable[[Any], Any], int | None]] = {
    # name: block, tap, edit, first position whose logits change (None: no position)
    "experts of chunk 1": (0, "moe.routing", edited("experts", CHUNK_1, lambda e: (e + 1) % 4), CHUNK),
    "weights of a token": (0, "moe.routing", edited("weights", AT_5, lambda w: 1 - w), 5),
    "logits": (0, "moe.routing", edited("logits", CHUNK_1, lambda z: -z), None),
    "blocks of a token": (
        1,
        "attention.selection",
        edited("blocks", AT_20, lambda b: torch.full_like(b, -1)),
        20,
    ),
    "a block that was not chosen": (
        1,
        "attention.selection",
        edited("blocks", AT_20, lambda b: b % 3 + 1),
        20,
    ),
    "scores": (1, "attention.selection", edited("scores", AT_20, lambda s: s + 1), None),
    "where a slot writes from": (
        1,
        "workspace.write",
        edited("address", CHUNK_0, lambda a: a.roll(1, -1)),
        CHUNK,
    ),
    "how much a slot writes": (1, "workspace.write", edited("gate", CHUNK_0, lambda g: 1 - g / 2), CHUNK),
    "what the open chunk would write": (
        1,
        "workspace.write",
        edited("gate", (slice(None), 3), lambda g: g / 2),
        None,
    ),
    "slots that are read": (1, "workspace.read", edited("address", AT_5, lambda a: a.roll(1, -1)), 5),
    "read gate": (1, "workspace.read", edited("gate", AT_5, lambda g: 0 * g), 5),
    "addresses": (2, "memory.lookup", edited("addresses", AT_5, lambda a: (a + 7) % 64), 5),
    "weights of addresses": (2, "memory.lookup", edited("weights", AT_5, lambda w: w.flip(-1)), 5),
    "beta": (2, "memory.lookup", edited("gate", AT_5, lambda g: 0 * g), 5),
    "decay": (0, "ssm.state", edited("decay", AT_5, lambda d: d - 3), 5),
    "norm of the state that leaves chunk 0": (
        0,
        "ssm.state",
        edited("norms", CHUNK_0, lambda n: 3 * n),
        CHUNK,
    ),
}


@pytest.mark.parametrize("name", WRITES)
@torch.no_grad()
def test_a_write_changes_the_logits_from_its_place_on(model: HydraForCausalLM, name: str) -> None:
    layer, tap, edit, first = WRITES[name]
    ids = random_ids(model.config, 2, LENGTH)
    untouched = model(ids)
    handle = tap_of(model, layer, tap).register_forward_hook(lambda _m, _a, out: edit(out))
    written = model(ids)
    handle.remove()
    change = (written.logits - untouched.logits).abs().amax(dim=(0, 2))
    changed = (change > 1e-5).nonzero()[:, 0].tolist()
    if first is None:
        assert torch.equal(written.logits, untouched.logits)
    else:
        assert changed and changed[0] == first
        assert float(change[first]) > 1e-4
    assert torch.equal(model(ids).logits, untouched.logits)  # and the next run knows nothing of it


@torch.no_grad()
def test_written_router_logits_change_the_auxiliary_losses(model: HydraForCausalLM) -> None:
    layer, tap, edit, _ = WRITES["logits"]
    ids = random_ids(model.config, 2, LENGTH)
    untouched = model(ids)
    handle = tap_of(model, layer, tap).register_forward_hook(lambda _m, _a, out: edit(out))
    written = model(ids)
    handle.remove()
    assert abs(float(written.load_balance_loss - untouched.load_balance_loss)) > 1e-3
    assert abs(float(written.router_z_loss - untouched.router_z_loss)) > 1e-3


@torch.no_grad()
def test_a_forced_expert_is_what_its_weights_compute(model: HydraForCausalLM) -> None:
    """The contribution equals the expert's formula, by hand, from what enters the path."""
    block = model.model.blocks[0]
    entered, left = listen(block.norm), listen(block.contributions["moe"])

    def force(_module: Any, _args: Any, routing: Routing) -> Routing:
        return routing._replace(
            experts=torch.full_like(routing.experts, 3), weights=torch.full_like(routing.weights, 0.5)
        )

    handle = block.moe.routing.register_forward_hook(force)
    model(random_ids(model.config, 2, LENGTH))
    for module in (block.norm, block.contributions["moe"]):
        module._forward_hooks.clear()
    handle.remove()
    gate, up = (entered[0] @ block.moe.gate_up_proj[3].T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ block.moe.down_proj[3].T * block.gates["moe"]
    torch.testing.assert_close(left[0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_forced_expert_stays_forced_in_the_next_piece_of_its_chunk(model: HydraForCausalLM) -> None:
    ids = random_ids(model.config, 1, 7)
    tap = model.model.blocks[0].moe.routing
    forced = torch.tensor([[[3, 1]]])
    handle = tap.register_forward_hook(lambda _m, _a, out: out._replace(experts=forced))
    cache = model(ids[:, :3], use_cache=True).past_key_values
    handle.remove()
    seen = listen(tap)
    model(ids[:, 3:], past_key_values=cache)
    tap._forward_hooks.clear()
    assert torch.equal(seen[0].experts, forced)

"""Ablating and forcing an expert do what the same change made by hand does, and leave nothing behind."""

import pytest
import torch
from torch import Tensor

from hydra_lab.capture import record
from hydra_lab.interventions import ablate_expert, force_expert
from hydra_lab.modeling import HydraForCausalLM
from tests.helpers import lively_model, random_ids

LAYER, EXPERT = 0, 1


@pytest.fixture(scope="module")
def model() -> HydraForCausalLM:
    return lively_model(seed=3)


@pytest.fixture(scope="module")
def ids(model: HydraForCausalLM) -> Tensor:
    return random_ids(model.config, 3, 45, seed=1)


def logits_of(model: HydraForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def without_output(model: HydraForCausalLM, ids: Tensor) -> Tensor:
    """What the block's experts add with the expert's output projection at zero, renormalised by hand."""
    path = model.model.blocks[LAYER].moe
    routing = record(model, ids, taps=f"layers.{LAYER}.moe.routing")[f"layers.{LAYER}.moe.routing"]
    experts_BLK = routing.experts.repeat_interleave(path.chunk_size, dim=1)[:, : ids.shape[1]]
    others_BL = torch.where(experts_BLK == EXPERT, 0.0, routing.weights).sum(dim=-1)
    scale_BL = torch.where(others_BL > 0, 1 / others_BL, 0.0)
    kept = path.down_proj[EXPERT].detach().clone()
    path.down_proj.data[EXPERT] = 0
    handle = path.register_forward_hook(lambda _m, _a, out: (out[0] * scale_BL[..., None], *out[1:]))
    try:
        return logits_of(model, ids)
    finally:
        handle.remove()
        path.down_proj.data[EXPERT] = kept


def test_ablation_is_the_expert_without_output_and_the_others_renormalised(
    model: HydraForCausalLM, ids: Tensor
) -> None:
    untouched = logits_of(model, ids)
    with ablate_expert(model, LAYER, EXPERT):
        ablated = logits_of(model, ids)
    # 1e-5: the same sums, scaled before instead of after the experts' last product
    torch.testing.assert_close(ablated, without_output(model, ids), rtol=1e-5, atol=1e-5)
    assert (ablated - untouched).abs().max() > 1e-3, "no chunk chose the expert: the test shows nothing"
    assert torch.equal(logits_of(model, ids), untouched)


def test_chunks_that_did_not_choose_the_expert_keep_their_weights(
    model: HydraForCausalLM, ids: Tensor
) -> None:
    tap = f"layers.{LAYER}.moe.routing"
    before = record(model, ids, taps=tap)[tap]
    with ablate_expert(model, LAYER, EXPERT):
        after = record(model, ids, taps=tap)[tap]
    size = model.config.moe_chunk_size
    chose_BL = (before.experts == EXPERT).any(-1).repeat_interleave(size, 1)[:, : ids.shape[1]]
    assert chose_BL.any() and not chose_BL.all()
    assert torch.equal(after.weights[~chose_BL], before.weights[~chose_BL])
    torch.testing.assert_close(after.weights.sum(-1), torch.ones_like(after.weights[..., 0]))


def test_ablating_the_only_expert_of_a_chunk_adds_nothing() -> None:
    model = lively_model(seed=4, moe_top_k=1)
    ids = random_ids(model.config, 1, 20)
    tap = f"layers.{LAYER}.moe.routing"
    expert = int(record(model, ids, taps=tap)[tap].experts[0, 0, 0])
    with ablate_expert(model, LAYER, expert):
        recording = record(model, ids, taps=[], contributions=True)
    assert recording.contributions[f"layers.{LAYER}.moe"].norm[0, : model.config.moe_chunk_size].max() == 0


def test_a_forced_expert_serves_every_token_with_the_whole_weight(
    model: HydraForCausalLM, ids: Tensor
) -> None:
    tap = f"layers.{LAYER}.moe.routing"
    with force_expert(model, LAYER, EXPERT):
        routing = record(model, ids, taps=tap)[tap]
        forced = logits_of(model, ids)
    assert bool((routing.experts == EXPERT).all())
    path = model.model.blocks[LAYER].moe

    def swiglu(_module: object, inputs: tuple[Tensor, object, object], out: tuple[Tensor, ...]) -> object:
        gate, up = (inputs[0] @ path.gate_up_proj[EXPERT].T).chunk(2, dim=-1)
        return ((torch.nn.functional.silu(gate) * up) @ path.down_proj[EXPERT].T, *out[1:])

    handle = path.register_forward_hook(swiglu)
    by_hand = logits_of(model, ids)
    handle.remove()
    torch.testing.assert_close(forced, by_hand, rtol=1e-5, atol=1e-5)


def test_an_intervention_holds_token_by_token_as_in_one_pass(model: HydraForCausalLM, ids: Tensor) -> None:
    for change in (ablate_expert, force_expert):
        with change(model, LAYER, EXPERT), torch.no_grad():
            whole = logits_of(model, ids)
            cache, pieces = None, []
            for piece in ids.split([7, 1, 1, 20, 16], dim=1):
                out = model(input_ids=piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layer", "expert"), [(1, 0), (0, 4), (0, -1)])
def test_what_is_not_there_cannot_be_changed(model: HydraForCausalLM, layer: int, expert: int) -> None:
    with pytest.raises(
        ValueError, match=r"block 1 has no experts|is not among the experts 0 to 3 of block 0"
    ):
        with ablate_expert(model, layer, expert):
            pass

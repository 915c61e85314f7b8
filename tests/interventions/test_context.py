"""Changes hold wherever the model runs, are seen by whoever reads, go together in order, and leave nothing behind."""

import threading
from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor, nn

from hydra_lab.capture import record
from hydra_lab.interventions import CutPath, Intervention, in_force, intervened
from hydra_lab.lens import HydraLens
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import RequestedTap
from tests.helpers import lively_model, random_ids
from tests.interventions.vocabulary import VOCABULARY, name

every_change = pytest.mark.parametrize("change", VOCABULARY, ids=name)


@torch.no_grad()
def logits_of(model: HydraForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def in_pieces(model: HydraForCausalLM, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of the same tokens, given piece by piece with the cache."""
    cache, pieces = None, []
    for piece in ids.split(sizes, dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1)


def traces_left(model: nn.Module) -> list[str]:
    """Whatever a change may leave on a model."""
    left = []
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._forward_hooks_always_called:
            left.append(f"hook on {path}")
        if isinstance(module, RequestedTap) and module.num_requests:
            left.append(f"request at {path}")
        if set(vars(module)) & set(module._parameters):
            left.append(f"shadow at {path}")
    return left


@every_change
def test_it_changes_the_model_and_is_gone_afterwards(
    model: HydraForCausalLM, ids: Tensor, change: Intervention
) -> None:
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = logits_of(model, ids)
    with intervened(model, change) as made:
        during = logits_of(model, ids)
        assert made == in_force(model) == (change,)
    with pytest.raises(ZeroDivisionError), intervened(model, change):
        logits_of(model, ids)
        raise ZeroDivisionError("in the middle")
    assert (during - before).abs().max() > 1e-3
    assert torch.equal(logits_of(model, ids), before)
    assert traces_left(model) == [] and in_force(model) == ()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key


@every_change
def test_pieces_and_single_steps_are_one_pass(
    model: HydraForCausalLM, ids: Tensor, change: Intervention
) -> None:
    with intervened(model, change):
        whole = logits_of(model, ids)
        pieces = in_pieces(model, ids, [7, 1, 1, 20, 16])
        steps = in_pieces(model, ids[:1], [1] * ids.shape[1])
    # 1e-4: the same sums in another order
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steps, whole[:1], rtol=1e-4, atol=1e-4)


@every_change
def test_a_row_alone_is_a_row_of_a_padded_batch(
    model: HydraForCausalLM, ids: Tensor, change: Intervention
) -> None:
    lengths, size = (45, 13, 32), ids.shape[1]
    for left in (True, False):
        padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        columns = [slice(size - n, size) if left else slice(0, n) for n in lengths]
        for row, column in enumerate(columns):
            padded[row, column], mask[row, column] = ids[row, : lengths[row]], 1
        with intervened(model, change):
            together = logits_of(model, padded, mask)
            for row, column in enumerate(columns):
                alone = logits_of(model, ids[row : row + 1, : lengths[row]])[0]
                torch.testing.assert_close(together[row, column], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [each for each in VOCABULARY if each.path in ("attention", "moe", "ssm")],
    ids=name,
)
def test_rows_that_stand_at_different_positions(
    model: HydraForCausalLM, ids: Tensor, change: Intervention
) -> None:
    """Two rows of unequal length are continued in one batch: chunks count from each row's own first token."""
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    first = ids[:2, :14].clone()
    first[1, 5:] = ids[1, :9]
    with intervened(model, change), torch.no_grad():
        cache = model(input_ids=first, attention_mask=mask, use_cache=True).past_key_values
        second = torch.stack([ids[0, 14:34], ids[1, 9:29]])
        together = model(input_ids=second, past_key_values=cache).logits
        alone = [logits_of(model, ids[:1, :34])[0, 14:], logits_of(model, ids[1:2, :29])[0, 9:]]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_tiles_that_select_together() -> None:
    model = lively_model(seed=5, attention_selection="tile")
    ids = random_ids(model.config, 2, 45)
    for text in ("attention[1].forbid(blocks=[1, 2, 4, 6])", "attention[*].select(blocks=[3, 1])"):
        with intervened(model, text):
            whole = logits_of(model, ids)
            pieces = in_pieces(model, ids, [7, 1, 1, 20, 16])
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
        assert not torch.equal(whole, logits_of(model, ids))


@every_change
def test_generation_is_one_pass_at_a_time(model: Any, ids: Tensor, change: Intervention) -> None:
    """Greedy tokens with the cache are those of whole passes without it."""
    prompt = ids[:1, :14]
    with intervened(model, change):
        made = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
        grown = prompt
        for _ in range(12):
            grown = torch.cat([grown, logits_of(model, grown)[:, -1:].argmax(dim=-1)], dim=1)
    assert made.tolist() == grown.tolist()


@every_change
def test_readers_see_what_the_model_uses(model: Any, ids: Tensor, change: Intervention) -> None:
    """Recorder and lens agree to the bit, on the decisions and on what comes of them."""
    lens = HydraLens(model)
    with intervened(model, change):
        recorded = record(model, ids, contributions=True)
        with lens.trace(ids) as tracer:
            cache = tracer.cache(modules=[f"model.{path}" for path in recorded])
            logits = lens.logits.save()
        contributions = {}
        for name_, update in recorded.contributions.items():
            _, layer, path = name_.split(".")
            with lens.trace(ids):
                contributions[name_] = lens.get(f"layers.{layer}.{path}").contribution.save()
            torch.testing.assert_close(contributions[name_].norm(dim=-1), update.norm)
    assert torch.equal(logits, recorded.logits)
    for path, decision in recorded.items():
        seen = cache[f"model.{path}"].output
        for field, ours, theirs in zip(decision._fields, decision, seen, strict=True):
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)), f"{path}.{field}"


def test_recording_shows_the_changed_decision(model: Any, ids: Tensor) -> None:
    with intervened(
        model, "moe[0].force(expert=2)", "memory[2].beta(value=0.5)", "attention[1].select(blocks=[])"
    ):
        recorded = record(model, ids)
    assert bool((recorded["layers.0.moe.routing"].experts == 2).all())
    assert bool((recorded["layers.2.memory.lookup"].gate == 0.5).all())
    assert bool((recorded["layers.1.attention.selection"].blocks == -1).all())


def test_a_hook_that_was_there_before_sees_it_too(model: Any, ids: Tensor) -> None:
    seen: list[Any] = []
    with model.model.layers[0].moe.routing.register_forward_hook(lambda _m, _a, out: seen.append(out)):
        with intervened(model, "moe[0].force(expert=2)"):
            logits_of(model, ids)
    assert bool((seen[0].experts == 2).all())


def test_the_lens_has_the_last_word(model: Any, ids: Tensor) -> None:
    lens = HydraLens(model)
    with lens.trace(ids):
        lens.layers[0].moe.experts[:] = 3
        lens.layers[0].moe.weights[:] = 0.5
        expected = lens.logits.save()
    with intervened(model, "moe[0].force(expert=2)"):
        with lens.trace(ids):
            experts = lens.layers[0].moe.experts
            was = experts.clone().save()
            experts[:] = 3
            lens.layers[0].moe.weights[:] = 0.5
            logits = lens.logits.save()
        with lens.generate([1, 2, 3], max_new_tokens=3, do_sample=False) as tracer:
            steps = nnsight.save([])
            for _ in tracer.iter[:3]:
                steps.append(lens.layers[0].moe.experts)
    assert bool((was == 2).all()) and torch.equal(logits, expected)
    assert len(steps) == 3 and all(bool((each == 2).all()) for each in steps)


class TestTogether:
    def test_order_counts(self, model: Any, ids: Tensor) -> None:
        """Temperature softens what is left after the ablation, or the ablation takes away from the softened."""
        routing = record(model, ids)["layers.0.moe.routing"]
        experts_BLK = routing.experts.repeat_interleave(8, dim=1)[:, : ids.shape[1]]
        kept = routing.weights.masked_fill(experts_BLK == 1, 0.0)
        softened = (routing.weights.log() / 3).softmax(dim=-1)
        ablate, temper = "moe[0].ablate(expert=1, renormalize=false)", "moe[0].temperature(value=3.0)"
        with intervened(model, ablate, temper):
            ablated_first = record(model, ids)["layers.0.moe.routing"].weights
        with intervened(model, f"{temper}; {ablate}"):
            tempered_first = record(model, ids)["layers.0.moe.routing"].weights
        chose_BL1 = (experts_BLK == 1).any(dim=-1, keepdim=True)
        torch.testing.assert_close(ablated_first, torch.where(chose_BL1, kept, softened))
        torch.testing.assert_close(tempered_first, softened.masked_fill(experts_BLK == 1, 0.0))
        assert not torch.allclose(ablated_first, tempered_first)

    def test_each_works_on_what_the_earlier_ones_made(self, model: Any, ids: Tensor) -> None:
        with intervened(model, "moe[0].force(expert=1); moe[0].ablate(expert=1)"):
            nothing = record(model, ids, contributions=True).contributions["layers.0.moe"].norm
        with intervened(model, "moe[0].ablate(expert=1); moe[0].force(expert=1)"):
            forced = logits_of(model, ids)
        with intervened(model, "moe[0].force(expert=1)"):
            assert torch.equal(forced, logits_of(model, ids))
        assert bool((nothing == 0).all())
        with intervened(model, "memory[2].replace(source=9, target=60); memory[2].mask(addresses=[60])"):
            both = logits_of(model, ids)
        with intervened(model, "memory[2].mask(addresses=[9, 60])"):
            assert torch.equal(both, logits_of(model, ids))

    def test_twice_is_a_product(self, model: Any, ids: Tensor) -> None:
        for twice, once in (
            ("ssm[1].scale_decay(head=2, factor=0.5)", "ssm[1].scale_decay(head=2, factor=0.25)"),
            ("moe[0].scale(factor=0.5)", "moe[0].scale(factor=0.25)"),
        ):
            with intervened(model, twice, twice):
                ours = logits_of(model, ids)
            with intervened(model, once):
                torch.testing.assert_close(ours, logits_of(model, ids), rtol=1e-5, atol=1e-5)

    def test_a_row_edited_twice_gets_back_what_it_held(self, model: Any, ids: Tensor) -> None:
        values = model.model.layers[2].memory.values
        before = values.detach().clone()
        first, second = (f"memory[2].edit(address=9, value={[float(n)] * 32})" for n in (1, 2))
        with intervened(model, first):
            with intervened(model, second, "memory[2].beta(value=1.0)"):
                assert values[9].eq(2).all() and len(in_force(model)) == 3
            assert values[9].eq(1).all() and [str(each) for each in in_force(model)] == [first]
        assert torch.equal(values, before)

    def test_the_whole_vocabulary_at_once(self, model: Any, ids: Tensor) -> None:
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        with intervened(model, *VOCABULARY) as made:
            assert made == VOCABULARY
            whole = logits_of(model, ids)
            pieces = in_pieces(model, ids, [7, 1, 1, 20, 16])
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
        assert traces_left(model) == []
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())

    def test_no_change_is_no_change(self, model: Any, ids: Tensor) -> None:
        before = logits_of(model, ids)
        with intervened(model) as made:
            assert made == () and torch.equal(logits_of(model, ids), before)


def test_nothing_is_changed_where_one_change_is_impossible(model: Any) -> None:
    with pytest.raises(ValueError, match="block 0 has no memory path"):
        with intervened(
            model, "memory[2].edit(address=1, value=" + str([0.0] * 32) + ")", "memory[0].beta(value=1)"
        ):
            raise AssertionError("the context opened")
    assert traces_left(model) == [] and in_force(model) == ()


def test_a_failing_pass_leaves_nothing(model: Any, ids: Tensor) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    before = logits_of(model, ids)
    with model.model.layers[1].ssm.state.register_forward_hook(fail):
        with pytest.raises(RuntimeError, match="in the middle"), intervened(model, *VOCABULARY):
            logits_of(model, ids)
    assert traces_left(model) == [] and torch.equal(logits_of(model, ids), before)


def test_another_thread_waits(model: Any) -> None:
    free: list[bool] = []

    def look() -> None:
        taken = model_lock(model).acquire(blocking=False)
        free.append(taken)
        if taken:
            model_lock(model).release()

    with intervened(model, "moe[*].cut()"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert free == [False, True]


def test_gradients_flow_through_a_changed_model(ids: Tensor) -> None:
    """The weights' gradients are those of the same model with the change in its weights."""
    model, by_hand = lively_model(seed=3), lively_model(seed=3)
    with torch.no_grad():
        by_hand.model.blocks[1].ssm.A_log[2] += torch.tensor(0.25).log()
        by_hand.model.blocks[2].gates["memory"].mul_(0.5)
    by_hand(input_ids=ids, labels=ids).loss.backward()
    with intervened(model, "ssm[1].scale_decay(head=2, factor=0.25)", "memory[2].scale(factor=0.5)"):
        model(input_ids=ids, labels=ids).loss.backward()
    expected = dict(by_hand.named_parameters())
    for key, parameter in model.named_parameters():
        if "gates.memory" not in key and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-3, atol=1e-5, msg=key)


def test_cutting_is_the_models_own_cut(model: Any, ids: Tensor) -> None:
    with model.cut("workspace", [1]):
        expected = logits_of(model, ids)
    with intervened(model, CutPath(path="workspace", block=1)):
        assert torch.equal(logits_of(model, ids), expected)

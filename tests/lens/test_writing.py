"""What is written through a name changes the logits exactly as the same change made by hand with torch hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.capture import record
from hydra_lab.lens import HydraLens

CHANGES: dict[str, tuple[int, Callable[[Tensor], Tensor], bool]] = {
    "moe.routing.logits": (2, lambda x: x + 1, False),
    "moe.routing.experts": (2, lambda x: (x + 1) % 4, True),
    "moe.routing.weights": (2, lambda x: x.flip(-1) * 0.7, True),
    "attention.selection.blocks": (1, lambda x: torch.where(x > 0, x - 1, x), True),
    "attention.selection.scores": (1, lambda x: x + 1, False),
    "workspace.write.address": (1, lambda x: x.flip(-1), True),
    "workspace.write.gate": (1, lambda x: 1 - x, True),
    "workspace.read.address": (3, lambda x: x.flip(-1), True),
    "workspace.read.gate": (3, lambda x: x * 0, True),
    "memory.lookup.addresses": (2, lambda x: (x * 7 + 3) % 64, True),
    "memory.lookup.weights": (2, lambda x: x * 2, True),
    "memory.lookup.gate": (2, lambda x: 1 - x, True),
    "ssm.state.norms": (0, lambda x: x * 0.5, True),
    "ssm.state.decay": (0, lambda x: x * 3, True),
}
"""By field: the block, a change, and whether the logits depend on the field (scores and router logits are the reasons
for a decision; the decision itself lies in the other fields)."""


def by_hand(model: Any, ids: Tensor, name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    layer = CHANGES[name][0]
    path, field = name.rsplit(".", 1)

    def hook(_module: Any, _inputs: Any, decision: Any) -> Any:
        return decision._replace(**{field: change(getattr(decision, field))})

    handle = model.get_submodule(f"model.layers.{layer}.{path}").register_forward_hook(hook)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("name", CHANGES)
def test_a_written_field_is_what_the_model_uses(model: Any, lens: HydraLens, ids: Tensor, name: str) -> None:
    layer, change, decisive = CHANGES[name]
    path, field = name.rsplit(".", 1)
    expected = by_hand(model, ids, name, change)
    assert torch.equal(expected, record(model, ids).logits) is not decisive

    tap = lens.get(f"layers.{layer}.{path}")
    with lens.trace(ids):
        setattr(tap, field, change(getattr(tap, field)))
        assigned = lens.logits.save()
    with lens.trace(ids):
        view = getattr(tap, field)
        view[:] = change(view)
        in_place = lens.logits.save()
    with lens.trace(ids):
        whole = tap.output
        getattr(whole, field)[:] = change(getattr(whole, field))
        in_decision = lens.logits.save()
    with lens.trace(ids):
        whole = tap.output
        tap.output = whole._replace(**{field: change(getattr(whole, field))})
        replaced = lens.logits.save()
    for logits in (assigned, in_place, in_decision, replaced):
        assert torch.equal(logits, expected)


def test_short_names_write(model: Any, lens: HydraLens, ids: Tensor) -> None:
    expected = by_hand(model, ids, "moe.routing.experts", lambda x: torch.full_like(x, 3))
    with lens.trace(ids):
        lens.layers[2].moe.experts[:] = 3
        sliced = lens.logits.save()
    with lens.trace(ids):
        lens.layers[2].moe.experts = 3
        number = lens.logits.save()
    with lens.trace(ids):
        lens.layers[2].moe.experts = torch.tensor([3, 3])
        broadcast = lens.logits.save()
    assert all(torch.equal(logits, expected) for logits in (sliced, number, broadcast))


def test_two_fields_of_one_decision(model: Any, lens: HydraLens, ids: Tensor) -> None:
    def hook(_module: Any, _inputs: Any, decision: Any) -> Any:
        return decision._replace(experts=torch.zeros_like(decision.experts), weights=decision.weights * 0.5)

    handle = model.model.layers[2].moe.routing.register_forward_hook(hook)
    expected = record(model, ids).logits
    handle.remove()
    with lens.trace(ids):
        lens.layers[2].moe.experts[:] = 0
        lens.layers[2].moe.weights *= 0.5
        logits = lens.logits.save()
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("path", ["ssm", "attention", "moe", "workspace", "memory"])
def test_cutting_a_path(model: Any, lens: HydraLens, ids: Tensor, path: str) -> None:
    layer = model.config.layers_with(path)[-1]
    with model.cut(path, layers=[layer]):
        expected = record(model, ids).logits
    with lens.trace(ids):
        lens.get(f"layers.{layer}.{path}").contribution = 0
        assigned = lens.logits.save()
    with lens.trace(ids):
        lens.get(f"layers.{layer}.{path}").contribution[:] = 0
        in_place = lens.logits.save()
    assert torch.equal(assigned, expected) and torch.equal(in_place, expected)
    assert not torch.equal(expected, record(model, ids).logits)


def test_a_written_prefix_does_not_reach_back(lens: HydraLens, ids: Tensor) -> None:
    """Writing from position 10 on leaves the logits before it as they were."""
    with lens.trace(ids):
        untouched = lens.logits.save()
    with lens.trace(ids):
        lens.layers[2].memory.beta[:, 10:] = 0
        logits = lens.logits.save()
    assert torch.equal(logits[:, :10], untouched[:, :10])
    assert not torch.equal(logits[:, 10:], untouched[:, 10:])


def test_edits_stay_and_leave_the_lens_alone(model: Any, lens: HydraLens, ids: Tensor) -> None:
    untouched = record(model, ids).logits
    expected = by_hand(model, ids, "moe.routing.experts", lambda x: torch.full_like(x, 1))
    with lens.edit() as (_tracer, edited):
        edited.layers[2].moe.experts[:] = 1
    for _ in range(2):
        with edited.trace(ids):
            changed = edited.logits.save()
        assert torch.equal(changed, expected)
    with lens.trace(ids):
        plain = lens.logits.save()
    assert torch.equal(plain, untouched)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.5, TypeError, "moe.routing.experts holds torch.int64"),
        ("expert", TypeError, "takes a tensor or a number, got str"),
        (torch.zeros(2, 5, dtype=torch.long), ValueError, r"has shape \[2, 3, 2\], got \[2, 5\]"),
        (4, ValueError, r"experts must lie in 0 .. 3, got 4 .. 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    lens: HydraLens, ids: Tensor, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        with lens.trace(ids):
            lens.layers[0].moe.experts = value
    with lens.trace(ids):  # and the lens still works
        logits = lens.logits.save()
    assert logits.isfinite().all()

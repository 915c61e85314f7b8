"""Gradients of decisions against finite differences, taken by writing the decision."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hydra_lab.attribution import decision_gradients
from hydra_lab.capture import record
from hydra_lab.taps import Routing
from tests.attribution.hooks import num_hooks, replaced
from tests.helpers import lively_model, random_ids

STEP = 1e-5


@pytest.fixture()
def double(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model in float64 throughout: where it asks for fp32 for precision's sake, it gets more."""
    model = lively_model(seed=8).double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return model


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1].log_softmax(-1)[5] - logits[1, 9].log_softmax(-1)[7]


def difference(model: Any, ids: Tensor, tap: str, change: Any) -> float:
    """Central difference of the metric while `change(decision, step)` takes the decision's place."""
    numbers: list[float] = []
    for step in (STEP, -STEP):
        written = replaced(
            model.get_submodule(f"model.{tap}"), lambda decision, step=step: change(decision, step)
        )
        with written, torch.no_grad():
            numbers.append(float(metric(model(ids, use_cache=False).logits)))
    return (numbers[0] - numbers[1]) / (2 * STEP)


@pytest.mark.parametrize(
    ("tap", "name"),
    [
        ("layers.0.moe.routing", "weights"),
        ("layers.2.memory.lookup", "weights"),
        ("layers.2.memory.lookup", "gate"),
        ("layers.1.workspace.read", "address"),
        ("layers.1.workspace.read", "gate"),
        ("layers.1.workspace.write", "address"),
        ("layers.1.workspace.write", "gate"),
    ],
)
def test_a_gradient_is_what_a_small_change_of_the_field_makes(double: Any, tap: str, name: str) -> None:
    ids = random_ids(double.config, 2, 17)
    found = decision_gradients(double, ids, metric)
    gradient = found.gradients[f"{tap}.{name}"]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)

    def change(decision: Any, step: float) -> Any:
        return decision._replace(**{name: getattr(decision, name) + step * direction})

    expected = float((torch.from_numpy(gradient) * direction).sum())
    assert abs(expected) > 1e-3, "the field has no effect: the test shows nothing"
    # 1e-3: the workspace sums in fp32 even here, and a step of 1e-5 sees that
    assert difference(double, ids, tap, change) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_gradient_of_router_logits_goes_through_the_token_weights(double: Any) -> None:
    ids = random_ids(double.config, 2, 17)
    tap = "layers.0.moe.routing"
    found = decision_gradients(double, ids, metric)
    gradient = torch.from_numpy(found.gradients[f"{tap}.logits"])
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    size = double.config.moe_chunk_size

    def change(decision: Routing, step: float) -> Routing:
        moved_BCK = (step * direction).gather(-1, decision.experts)
        moved_BLK = moved_BCK.repeat_interleave(size, dim=1)[:, : ids.shape[1]]
        return decision._replace(weights=(decision.weights.log() + moved_BLK).softmax(dim=-1))

    expected = float((gradient * direction).sum())
    assert abs(expected) > 1e-3
    assert difference(double, ids, tap, change) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    chosen = np.zeros(gradient.shape, dtype=bool)
    np.put_along_axis(chosen, found.values[f"{tap}.experts"], True, axis=-1)
    assert (gradient.numpy()[~chosen] == 0).all()


def test_values_are_the_decisions_and_effects_their_products() -> None:
    model = lively_model(seed=8)
    ids = random_ids(model.config, 2, 17)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, :4] = 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # frozen weights must not cut the graph
    found = decision_gradients(model, ids, lambda logits: logits[:, -1, 5].sum(), mask=mask)
    assert found.length.tolist() == [13, 17]
    with torch.no_grad():
        assert found.metric == float(model(ids, attention_mask=mask, use_cache=False).logits[:, -1, 5].sum())
    taps = ("moe.routing", "memory.lookup", "workspace.read", "workspace.write")
    recorded = record(model, ids, mask, taps=taps)
    for path, decision in recorded.items():
        for name, value in decision._asdict().items():
            np.testing.assert_array_equal(
                found.values[f"{path.removeprefix('model.')}.{name}"], value.numpy()
            )
    assert len(found.values) == sum(len(decision) for decision in recorded.values())
    name = "layers.2.memory.lookup.gate"
    np.testing.assert_array_equal(found.effect(name), found.gradients[name] * found.values[name])
    assert (found.gradients[name][0, 13:] == 0).all() and (found.gradients[name][0, :13] != 0).any()
    assert all(parameter.grad is None for parameter in model.parameters()) and num_hooks(model) == 0


def test_what_has_no_gradient_is_refused() -> None:
    model = lively_model(seed=8)
    ids = random_ids(model.config, 1, 5)
    with pytest.raises(
        ValueError, match=r"attention.selection has no gradient; these taps have: moe.routing"
    ):
        decision_gradients(model, ids, lambda logits: logits.sum(), taps="layers.1.attention.selection")
    with pytest.raises(ValueError, match=r"the metric must be one number, got shape \[1\, 5\]"):
        decision_gradients(model, ids, lambda logits: logits[..., 0])

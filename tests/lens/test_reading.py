"""The two readers see the same, to the bit, under every name."""

from typing import Any

import nnsight
import pytest
import torch
from torch import Tensor

from hydra_lab.capture import record
from hydra_lab.lens import HydraLens
from hydra_lab.lens.envoys import SHORT_NAMES
from hydra_lab.taps import TAPS


def test_every_tap_reads_as_recorded(model: Any, lens: HydraLens, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :6] = 0  # padding on the left
    recorded = record(model, ids, mask)
    with lens.trace(ids, attention_mask=mask):
        seen = nnsight.save({path: lens.get(path).output for path in in_order(recorded)})
        logits = lens.logits.save()
    assert {path.split(".", 3)[3] for path in recorded} == set(TAPS)
    for path, decision in recorded.items():
        for name, value in decision._asdict().items():
            assert torch.equal(value, getattr(seen[path], name)), f"{path}.{name}"
    assert torch.equal(recorded.logits, logits)


def test_every_field_has_its_name(model: Any, lens: HydraLens, ids: Tensor) -> None:
    recorded = record(model, ids)
    for path, decision in recorded.items():
        for name in decision._fields:
            with lens.trace(ids):
                value = getattr(lens.get(path), name).save()
            assert torch.equal(value, getattr(decision, name)), f"{path}.{name}"


@pytest.mark.parametrize(
    "name", [f"{path}.{short}" for path, names in SHORT_NAMES.items() for short in names]
)
def test_short_names(model: Any, lens: HydraLens, ids: Tensor, name: str) -> None:
    path, short = name.split(".")
    tap, field = SHORT_NAMES[path][short].rsplit(".", 1)
    for layer, decision in record(model, ids, taps=tap).by_layer(tap).items():
        with lens.trace(ids):
            value = getattr(lens.get(f"layers.{layer}.{path}"), short).save()
        assert torch.equal(value, getattr(decision, field))


def test_names_do_not_hide_modules(lens: HydraLens) -> None:
    for path, names in SHORT_NAMES.items():
        envoys = [
            envoy
            for name, envoy in lens.named_modules()
            if name.endswith(f".{path}") and "contrib" not in name
        ]
        assert envoys
        for envoy in envoys:
            assert not set(names) & set(envoy._module._modules)


def test_contributions_are_what_the_block_adds(model: Any, lens: HydraLens, ids: Tensor) -> None:
    hidden = record(model, ids, hidden=True).hidden
    for layer in (1, 2, 3):
        paths = model.model.layers[layer].paths
        with lens.trace(ids):
            added = nnsight.save([lens.get(f"layers.{layer}.{path}").contribution for path in paths])
        torch.testing.assert_close(hidden[layer - 1] + sum(added), hidden[layer])


def test_reading_leaves_the_model_as_it_was(model: Any, lens: HydraLens, ids: Tensor) -> None:
    """Reading a state's summary must not count as writing it: that would run the scan again, in another rounding."""
    untouched = record(model, ids).logits
    with lens.trace() as tracer:
        with tracer.invoke(ids[:1]):
            lens.layers[0].ssm.decay  # noqa: B018
            first = lens.logits.save()
        with tracer.invoke(ids[1:]):
            lens.layers[1].ssm.norms  # noqa: B018
            second = lens.logits.save()
    assert torch.equal(torch.cat([first, second]), untouched)


def test_text_and_ids_are_the_same_input(lens: HydraLens) -> None:
    inputs = ["a bb ccc dd", [1, 2, 3, 2], torch.tensor([1, 2, 3, 2]), torch.tensor([[1, 2, 3, 2]])]
    inputs += [["a bb ccc dd"], {"input_ids": [[0, 1, 2, 3, 2]], "attention_mask": [[0, 1, 1, 1, 1]]}]
    seen = []
    for data in inputs:
        with lens.trace(data):
            logits = lens.logits.save()
        seen.append(logits)
    assert all(torch.equal(logits, seen[0]) for logits in seen)


@pytest.mark.parametrize("data", ["", [], 3, torch.zeros(1, 2), [[1], []]])
def test_bad_input_is_refused(lens: HydraLens, data: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"row without tokens|takes text or token ids|integers"):
        with lens.trace(data):
            lens.logits.save()


def test_without_a_tokenizer_text_is_refused(model: Any) -> None:
    lens = HydraLens(model)
    with pytest.raises(TypeError, match="no tokenizer"):
        with lens.trace("some text"):
            lens.logits.save()


def test_gradients_reach_a_decision(lens: HydraLens, ids: Tensor) -> None:
    """d loss / d weights through a name equals the same through a leaf put in by hand."""
    leaf = None

    def put_leaf(_module: object, _inputs: object, decision: tuple[Tensor, ...]) -> object:
        nonlocal leaf
        leaf = decision[2].detach().clone().requires_grad_()
        return decision._replace(weights=leaf)  # type: ignore[attr-defined]

    model: Any = lens._module
    handle = model.model.layers[2].moe.routing.register_forward_hook(put_leaf)
    model(ids, use_cache=False).logits.square().sum().backward()
    handle.remove()
    assert leaf is not None

    with lens.trace(ids):
        lens.layers[0].output = lens.layers[0].output.detach().requires_grad_()
        weights = lens.layers[2].moe.weights
        loss = lens.logits.square().sum()
        with loss.backward():
            gradient = weights.grad.save()
    torch.testing.assert_close(gradient, leaf.grad)


def in_order(recorded: object) -> list[str]:
    """Paths of taps in the order in which a block runs them."""
    order = [
        "ssm.state",
        "attention.selection",
        "moe.routing",
        "workspace.write",
        "workspace.read",
        "memory.lookup",
    ]
    return sorted(recorded, key=lambda path: (int(path.split(".")[2]), order.index(path.split(".", 3)[3])))  # type: ignore[call-overload]

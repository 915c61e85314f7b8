"""`record` sees what the model used, and leaves nothing behind."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hydra_lab.capture import record
from hydra_lab.capture.record import select_taps
from hydra_lab.locks import model_lock
from hydra_lab.taps import TAPS
from tests.helpers import lively_model, random_ids


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model()


@pytest.fixture(scope="module")
def ids(model: Any) -> Tensor:
    return random_ids(model.config, 3, 21)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_decisions_are_the_taps_outputs(model: Any, ids: Tensor) -> None:
    recorded = record(model, ids)
    with torch.no_grad():
        assert torch.equal(recorded.logits, model(ids, use_cache=False).logits)
    assert recorded.length.tolist() == [21, 21, 21]
    for path, decision in recorded.items():
        assert isinstance(decision, TAPS[path.split(".", 3)[3]])
        for name, value in decision._asdict().items():
            assert value.shape[0] == 3, f"{path}.{name}"
            assert not value.requires_grad
    assert len(recorded) == 13 and recorded.contributions == {} and recorded.hidden == {}
    assert recorded["layers.0.moe.routing"].experts.shape == (3, 3, 2)
    assert list(recorded.by_layer("moe.routing")) == [0, 2]
    assert num_hooks(model) == 0


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_moved_out_of_the_way(model: Any, ids: Tensor, left: bool) -> None:
    """A padded row's decisions are those of the row alone, from index 0."""
    alone = record(model, ids[:1, :13])
    padded = torch.zeros(2, 21, dtype=torch.long)
    mask = torch.zeros_like(padded)
    columns = slice(8, 21) if left else slice(0, 13)
    padded[0, columns], mask[0, columns] = ids[0, :13], 1
    padded[1], mask[1] = ids[1], 1
    together = record(model, padded, mask)
    assert together.length.tolist() == [13, 21]
    for path, decision in alone.items():
        for name, value in decision._asdict().items():
            size = value.shape[1]
            # tolerance: the same sums in another order where the batch has another shape
            torch.testing.assert_close(getattr(together[path], name)[:1, :size], value, msg=f"{path}.{name}")
    # 1e-4, as the rule of isolation allows: after four blocks the other order of the sums shows on some processors
    torch.testing.assert_close(together.logits[:1, columns], alone.logits, rtol=1e-4, atol=1e-4)


def test_taps_are_chosen_by_name(model: Any, ids: Tensor) -> None:
    def chosen(taps: Any) -> list[str]:
        return list(record(model, ids, taps=taps))

    assert chosen("moe.routing") == ["model.layers.0.moe.routing", "model.layers.2.moe.routing"]
    assert chosen("layers.2.memory.lookup") == ["model.layers.2.memory.lookup"]
    assert chosen("model.layers.2.memory.lookup") == ["model.layers.2.memory.lookup"]
    third = [path for path in select_taps(model) if ".3." in path]
    assert len(third) == 4 and chosen(["memory.lookup", "layers.3.*"]) == [
        "model.layers.2.memory.lookup",
        *third,
    ]
    assert chosen([]) == []
    with pytest.raises(ValueError, match=r"no tap 'routing.moe'; it has model.layers.0"):
        record(model, ids, taps="routing.moe")


def test_looking_up_a_short_path(model: Any, ids: Tensor) -> None:
    recorded = record(model, ids)
    assert recorded["layers.2.memory.lookup"] is recorded["model.layers.2.memory.lookup"]
    with pytest.raises(KeyError, match="it could be"):
        recorded["moe.routing"]
    with pytest.raises(KeyError, match=r"recorded: model\.layers\.0"):
        recorded["layers.9.moe.routing"]


def test_earlier_hooks_are_seen(model: Any, ids: Tensor) -> None:
    def force(_module: Any, _inputs: Any, decision: Any) -> Any:
        return decision._replace(experts=torch.ones_like(decision.experts))

    with model.model.layers[0].moe.routing.register_forward_hook(force):
        assert record(model, ids)["layers.0.moe.routing"].experts.eq(1).all()
    with model.cut("memory"):
        assert record(model, ids, contributions=True).contributions["layers.2.memory"].norm.eq(0).all()


def test_contributions_and_hidden(model: Any, ids: Tensor) -> None:
    recorded = record(model, ids, taps=[], contributions=True, hidden=True)
    assert list(recorded.hidden) == [0, 1, 2, 3] and recorded.hidden[3].shape == (3, 21, 32)
    for layer, block in enumerate(model.model.layers):
        updates = [recorded.contributions[f"layers.{layer}.{path}"] for path in block.paths]
        torch.testing.assert_close(sum(update.share for update in updates), torch.ones(3, 21))
        if layer:
            # |update| = sum over paths of |contribution| * cosine to the update
            whole = (recorded.hidden[layer] - recorded.hidden[layer - 1]).norm(dim=-1)
            torch.testing.assert_close(sum(update.norm * update.cosine for update in updates), whole)


def test_hooks_are_released_on_error(model: Any, ids: Tensor) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with model.model.layers[2].moe.routing.register_forward_hook(fail):
        with pytest.raises(RuntimeError, match="in the middle"):
            record(model, ids, contributions=True, hidden=True)
        assert num_hooks(model) == 1
    free: list[bool] = []

    def try_lock() -> None:
        with model_lock(model):
            free.append(True)

    thread = threading.Thread(target=try_lock)
    thread.start()
    thread.join(timeout=10)
    assert free == [True]


def test_a_path_that_is_switched_off(ids: Tensor) -> None:
    model = lively_model()
    model.set_path_scale("moe", 0.0)
    assert not record(model, ids).by_layer("moe.routing")
    with pytest.raises(
        ValueError, match=r"model.layers.0.moe.routing, .* carried nothing: the path is switched off"
    ):
        record(model, ids, taps="moe.routing")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(0, 3, dtype=torch.long), "at least one token"),
        (torch.zeros(1, 3), "integer tensor"),
        (torch.zeros(3, dtype=torch.long), r"\[B, L\]"),
        (torch.tensor([[1, 97]]), "input_ids lie in 1 .. 97, the vocabulary in 0 .. 96"),
    ],
)
def test_bad_inputs(model: Any, bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(model, bad)


def test_a_mask_of_another_shape(model: Any, ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 20\]"):
        record(model, ids, torch.ones(3, 20))


def test_record_needs_nothing_of_the_lab() -> None:
    code = (
        "import sys, hydra_lab.capture\n"
        "print([name for name in ('nnsight', 'xarray', 'zarr', 'rich', 'plotly') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

"""Path patching changes the edges that it names and no others."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hydra_lab.attribution import activation_patching, block_paths, logit_difference, path_patching
from hydra_lab.chunks import Span
from tests.attribution.hooks import contribution, num_hooks, output_of, replaced
from tests.helpers import lively_model, random_ids

METRIC = logit_difference(5, 7)


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model(seed=6)


@pytest.fixture(scope="module")
def texts(model: Any) -> tuple[Tensor, Tensor]:
    return random_ids(model.config, 2, 19, seed=1), random_ids(model.config, 2, 19, seed=2)


def patch(
    model: Any, texts: tuple[Tensor, Tensor], senders: Any, receivers: Any, metric: Any = METRIC
) -> Any:
    return path_patching(model, *texts, metric, senders, receivers, progress=False)


@pytest.mark.parametrize("sender", ["layers.0.moe", "layers.1.attention", "embedding"])
def test_all_receivers_together_are_activation_patching(
    model: Any, texts: tuple[Tensor, Tensor], sender: str
) -> None:
    depth = -1 if sender == "embedding" else int(sender.split(".")[1])
    later = [name for name in block_paths(model) if int(name.split(".")[1]) > depth]
    found = patch(model, texts, [sender], [[*later, "logits"], [*later], "logits"])
    whole = activation_patching(model, *texts, METRIC, sites=[sender], progress=False)
    # 1e-4 of logits near 10: the same number is added to the stream before the norm instead of within it
    np.testing.assert_allclose(found.value[0, 0], whole.value[0, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.clean, whole.clean)
    np.testing.assert_array_equal(found.corrupted, whole.corrupted)
    assert (np.abs(found.value[0, 1:] - whole.value[0, 0]).max(axis=-1) > 1e-3).all(), (
        "every edge should matter here"
    )


@torch.no_grad()
def test_the_edge_to_the_logits_by_hand(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    said, was_said = (output_of(model, contribution(model, "layers.1.workspace"), text) for text in texts)
    last = output_of(model, model.model.layers[-1], texts[1])
    logits = model.lm_head(model.model.norm(last + said - was_said))
    by_hand = (logits[:, -1, 5] - logits[:, -1, 7]).numpy()
    found = patch(model, texts, ["layers.1.workspace"], ["logits"])
    np.testing.assert_allclose(found.value[0, 0], by_hand, rtol=1e-4, atol=1e-4)
    assert np.abs(by_hand - found.corrupted).max() > 1e-3


@torch.no_grad()
def test_only_the_receiver_hears_the_sender(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    """The receiver says what it says of the changed stream; its neighbours and the blocks before it what they said."""
    names = [name for name in block_paths(model) if int(name.split(".")[1]) < 3]
    before = {name: output_of(model, contribution(model, name), texts[1]) for name in names}
    during: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in names:
            keep = replaced(
                contribution(model, name), lambda update, name=name: during.update({name: update})
            )
            hooks.enter_context(keep)
        patch(model, texts, ["layers.0.moe"], ["layers.2.moe"])
    assert [name for name in names if not torch.equal(during[name], before[name])] == ["layers.2.moe"]
    said = output_of(model, contribution(model, "layers.0.moe"), texts[0])
    entering = output_of(model, model.model.layers[1], texts[1])
    block = model.model.layers[2]
    update, _, _ = block.moe(block.norm(entering + said - before["layers.0.moe"]), Span(19), None)
    torch.testing.assert_close(during["layers.2.moe"], update * block.gates["moe"], rtol=1e-5, atol=1e-5)


def test_in_two_blocks_of_one_path_there_are_two_ways_to_the_logits() -> None:
    """Embedding and block 0 reach the logits directly and through block 1: with all three edges the run is clean."""
    model = lively_model(seed=7, num_hidden_layers=2, attention_every=0, moe_layers=[], workspace_layers=[],
                         memory_layers=[])  # fmt: skip
    texts = random_ids(model.config, 1, 9, seed=3), random_ids(model.config, 1, 9, seed=4)
    found = patch(
        model,
        texts,
        [["embedding", "layers.0.ssm"], "layers.0.ssm", ["embedding", "layers.0.ssm", "layers.1.ssm"]],
        [["layers.1.ssm", "logits"], "layers.1.ssm", "logits"],
    )
    np.testing.assert_allclose(found.value[0, 0], found.clean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.recovery()[2, 2], 1.0, rtol=1e-4)
    # Through block 1 alone: block 0 says what it said in the clean run, and what goes past block 1 is taken back.
    block0 = contribution(model, "layers.0.ssm")
    said, was_said = (output_of(model, block0, text) for text in texts)
    take_back = replaced(model.model.layers[1], lambda stream: stream - (said - was_said))
    with replaced(block0, lambda _update: said), take_back, torch.no_grad():
        logits = model(texts[1], use_cache=False).logits
    by_hand = (logits[:, -1, 5] - logits[:, -1, 7]).numpy()
    np.testing.assert_allclose(found.value[1, 1], by_hand, rtol=1e-4, atol=1e-5)
    assert np.abs(found.value[1, 1] - found.value[1, 2]).max() > 1e-3


def test_no_edge_and_bad_names(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    told: list[tuple[int, int]] = []
    found = path_patching(
        model, *texts, METRIC, ["layers.2.ssm"], ["layers.2.moe", "layers.1.ssm"],
        progress=lambda *at: told.append(at),
    )  # fmt: skip
    assert np.isnan(found.value).all() and np.isnan(found.recovery()).all() and told == [(1, 2), (2, 2)]
    with pytest.raises(ValueError, match=r"sender 'layers.1' is no path"):
        patch(model, texts, ["layers.1"], ["logits"])
    with pytest.raises(ValueError, match=r"receiver 'layers.2.moe.routing' is no path"):
        patch(model, texts, ["layers.1.ssm"], ["layers.2.moe.routing"])
    assert num_hooks(model) == 0

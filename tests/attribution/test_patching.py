"""Activation patching does what the same patch made with a plain torch hook does."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hydra_lab.attribution import activation_patching, block_paths, logit_difference
from hydra_lab.capture import record
from hydra_lab.taps import requested
from tests.attribution.hooks import contribution, num_hooks, output_of, replaced
from tests.helpers import lively_model, random_ids

METRIC = logit_difference(5, 7)


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model(seed=5)


@pytest.fixture(scope="module")
def texts(model: Any) -> tuple[Tensor, Tensor]:
    clean = random_ids(model.config, 2, 19, seed=1)
    corrupted = clean.clone()
    corrupted[:, 3:6] = random_ids(model.config, 2, 3, seed=2)
    return clean, corrupted


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def difference(logits: Tensor) -> np.ndarray:
    return (logits[:, -1, 5] - logits[:, -1, 7]).double().numpy()


def patch(model: Any, texts: tuple[Tensor, Tensor], **options: Any) -> Any:
    return activation_patching(model, *texts, METRIC, progress=False, **options)


def test_patching_everything_recovers_the_clean_run(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    found = patch(model, texts, sites=["embedding", "layers.3"])
    np.testing.assert_array_equal(found.clean, difference(logits_of(model, texts[0])))
    np.testing.assert_array_equal(found.corrupted, difference(logits_of(model, texts[1])))
    assert np.abs(found.clean - found.corrupted).min() > 0.05, (
        "the pairs do not differ: the test shows nothing"
    )
    np.testing.assert_array_equal(found.value[:, 0], np.stack([found.clean] * 2))
    np.testing.assert_allclose(found.recovery(), 1.0)
    noised = patch(model, texts, sites=["embedding", "layers.3"], direction="noising")
    np.testing.assert_array_equal(noised.value[:, 0], np.stack([found.corrupted] * 2))
    np.testing.assert_allclose(noised.recovery(), 0.0, atol=1e-9)


def test_a_position_of_a_site_is_the_same_patch_by_hand(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    clean, corrupted = texts
    sites = ["layers.1", "layers.2.moe", "embedding"]
    found = patch(model, texts, sites=sites, positions=[4, 18, 2], batch_size=5)
    modules = [model.model.layers[1], contribution(model, "layers.2.moe"), model.model.embed_tokens]
    for z, module in enumerate(modules):
        source = output_of(model, module, clean)
        for p, position in enumerate((4, 18, 2)):
            patched = output_of(model, module, corrupted).clone()
            patched[:, position] = source[:, position]
            with replaced(module, lambda _value, patched=patched: patched):
                by_hand = difference(logits_of(model, corrupted))
            # 1e-4 of logits near 10: other batch sizes add up in another order
            np.testing.assert_allclose(found.value[z, p], by_hand, rtol=1e-4, atol=1e-4)
    moved = np.abs(found.value - found.corrupted)
    assert moved[0, 0].max() > 1e-2 and moved[2, 2].max() < 1e-4  # token 2 is the same in both texts


@pytest.mark.parametrize(
    "tap",
    ["layers.2.moe.routing", "layers.2.memory.lookup", "layers.1.workspace.write", "layers.1.workspace.read"],
)
def test_a_decision_is_replaced_whole(model: Any, texts: tuple[Tensor, Tensor], tap: str) -> None:
    clean, corrupted = texts
    decision = record(model, clean, taps=tap)[tap]
    module = model.get_submodule(f"model.{tap}")
    with replaced(module, lambda _decision: decision):
        by_hand = difference(logits_of(model, corrupted))
    found = patch(model, texts, sites=[tap])
    np.testing.assert_array_equal(found.value[0, 0], by_hand)
    assert np.abs(by_hand - found.corrupted).max() > 1e-4, (
        "the decision changes nothing: the test shows nothing"
    )


def test_states_that_carry_the_past_can_be_patched(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    found = patch(model, texts, sites=["layers.1.ssm.states"])
    tap = model.model.layers[1].ssm.states
    states = record(model, texts[0], taps="layers.1.ssm.states")["layers.1.ssm.states"]
    with requested([tap]), replaced(tap, lambda _states: states):
        by_hand = difference(logits_of(model, texts[1]))
    np.testing.assert_allclose(found.value[0, 0], by_hand, rtol=1e-5, atol=1e-5)
    assert np.abs(by_hand - found.corrupted).max() > 1e-4
    assert tap.num_requests == 0


def test_positions_are_counted_from_a_rows_first_token(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    alone = patch(model, texts, positions=[4], sites=["layers.0"])
    junk = torch.ones(2, 3, dtype=torch.long)
    padded = (torch.cat([junk, texts[0]], dim=1), torch.cat([junk, texts[1]], dim=1))
    mask = torch.cat([torch.zeros_like(junk), torch.ones_like(texts[0])], dim=1)
    found = patch(model, padded, positions=[4], sites=["layers.0"], mask=mask)
    np.testing.assert_allclose(found.value, alone.value, rtol=1e-4, atol=1e-4)


def test_progress_is_told_and_no_hook_stays(model: Any, texts: tuple[Tensor, Tensor], capsys: Any) -> None:
    told: list[tuple[int, int]] = []
    found = activation_patching(
        model, *texts, METRIC, positions=range(19), progress=lambda *at: told.append(at)
    )
    assert found.sites == tuple(f"layers.{i}" for i in range(4)) and found.value.shape == (4, 19, 2)
    assert told[-1] == (14, 14) and [done for done, _ in told] == list(
        range(1, 15)
    )  # 2 runs, 4 x 3 batches of 8 x 2
    assert capsys.readouterr().err == ""
    activation_patching(model, *texts, METRIC, sites=["embedding"])
    assert "patching" in capsys.readouterr().err
    assert num_hooks(model) == 0


def test_bad_input_is_named(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    for options, message in (
        ({"sites": ["layers.4"]}, r"no site 'layers.4': .* a block of 0 to 3"),
        ({"sites": ["layers.0.memory"]}, r"no site 'layers.0.memory': block 0 has the paths ssm, moe"),
        ({"sites": ["layers.0.moe.router"]}, r"no site 'layers.0.moe.router': the taps of moe are routing"),
        ({"sites": ["layers.0.moe.routing"], "positions": [1]}, r"a decision is replaced whole"),
        ({"positions": [19]}, r"positions \[19\] are not among the tokens 0 to 18"),
        ({"direction": "both"}, r"direction 'both' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            patch(model, texts, **options)
    with pytest.raises(ValueError, match=r"equally long, got \[2, 19\] and \[2, 18\]"):
        patch(model, (texts[0], texts[1][:, 1:]))
    with pytest.raises(ValueError, match=r"one number for each of the 2 pairs, got \[\]"):
        activation_patching(model, *texts, lambda logits: logits.mean(), progress=False)
    model.set_path_scale("moe", 0.0)
    try:
        with pytest.raises(ValueError, match=r"layers.0.moe carries nothing: the path is switched off"):
            patch(model, texts, sites=["layers.0.moe"])
    finally:
        model.set_path_scale("moe", 1.0)


def test_sites_cover_the_residual_stream(model: Any, texts: tuple[Tensor, Tensor]) -> None:
    """The embedding and every path of every block, patched at once by hand, are the clean run; one of them is not."""
    found = patch(model, texts, sites=block_paths(model))
    assert (np.abs(found.value[:, 0] - found.clean).max(axis=-1) > 1e-3).all()

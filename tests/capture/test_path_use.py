"""Path use measured on small models against the same quantities computed by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hydra_lab.capture.path_use import path_use_of_samples, sample_losses, weighted_mean
from hydra_lab.config import HydraConfig
from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM


@pytest.fixture(scope="module")
def model() -> HydraForCausalLM:
    torch.manual_seed(0)
    model = HydraForCausalLM(HydraConfig.from_preset("nano")).eval()
    for parameter in model.parameters():  # output projections start at zero: give every path something to say
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(0)
    length = np.array([20, 13, 7, 20, 16])
    mask = np.arange(20) < length[:, None]
    scored = mask & (rng.random((5, 20)) < 0.7)
    return Samples(
        np.where(mask, rng.integers(97, size=(5, 20)), 0), scored, length, ("a", "a", "b", "b", "b")
    )


def loss_by_hand(model: HydraForCausalLM, samples: Samples, row: int) -> float:
    size = samples.length[row]
    ids = torch.from_numpy(samples.tokens[row, :size])
    nll = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return float(nll[torch.from_numpy(samples.scored[row, 1:size])].mean())


@torch.no_grad()
def test_losses_do_not_depend_on_the_batch(model: HydraForCausalLM, samples: Samples) -> None:
    expected = [loss_by_hand(model, samples, row) for row in range(5)]
    for batch_size in (1, 2, 5):
        np.testing.assert_allclose(sample_losses(model, samples, batch_size=batch_size), expected, rtol=1e-5)


@torch.no_grad()
def test_path_use_is_what_a_hand_made_cut_costs(model: HydraForCausalLM, samples: Samples) -> None:
    use = path_use_of_samples(model, samples, batch_size=2)
    assert use.paths == ("ssm", "attention", "moe", "workspace", "memory")
    assert use.domains == ("a", "b") and use.layers == (0, 1, 2, 3)
    assert use.layers_with("memory") == (2,) and use.layers_with("moe") == (0, 2)
    np.testing.assert_allclose(np.nansum(use.share, axis=1), 1.0, rtol=1e-5)
    assert (np.abs(use.cosine[~np.isnan(use.cosine)]) <= 1 + 1e-6).all()

    count = samples.scored[:, 1:].sum(axis=1)
    uncut = np.array([loss_by_hand(model, samples, row) for row in range(5)])
    gate = model.get_parameter("model.layers.2.gates.memory")  # only block 2 has the memory
    kept = gate.clone()
    gate.zero_()
    without = np.array([loss_by_hand(model, samples, row) for row in range(5)])
    gate.copy_(kept)
    for z, rows in enumerate(([0, 1], [2, 3, 4])):
        expected = np.average((without - uncut)[rows], weights=count[rows])
        assert use.loss_increase[4, z] == pytest.approx(expected, abs=1e-5)
        assert use.loss[z] == pytest.approx(np.average(uncut[rows], weights=count[rows]), rel=1e-5)
        assert use.num_tokens[z] == count[rows].sum()
    np.testing.assert_array_equal(use.num_samples, [2, 3])


def test_share_of_the_only_path_is_one(samples: Samples) -> None:
    config = HydraConfig.from_preset(
        "nano", attention_every=0, moe_layers=[], workspace_layers=[], memory_layers=[], num_hidden_layers=2
    )
    use = path_use_of_samples(HydraForCausalLM(config).eval(), samples)
    np.testing.assert_allclose(use.share, 1.0, rtol=1e-6)
    np.testing.assert_allclose(use.cosine, 1.0, rtol=1e-5)


def test_a_domain_without_scored_tokens_is_refused(model: HydraForCausalLM, samples: Samples) -> None:
    empty = Samples(samples.tokens, np.zeros_like(samples.scored), samples.length, samples.domains)
    with pytest.raises(ValueError, match="no token of a, b is scored"):
        path_use_of_samples(model, empty)


def test_weighted_mean_and_its_error() -> None:
    values = np.array([1.0, 2.0, 4.0])
    assert weighted_mean(values, np.array([1, 1, 1])) == pytest.approx(
        (7 / 3, np.std(values, ddof=1) / np.sqrt(3))
    )
    assert weighted_mean(values, np.array([3, 1, 0]))[0] == pytest.approx(1.25)
    assert np.isnan(weighted_mean(values[:1], np.array([5]))[1])

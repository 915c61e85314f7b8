"""The study on costs and models whose answer is known."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from hydra_lab.capture.path_use import sample_losses
from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Probe, corrected, planted
from probes.expert_ablation import run
from probes.expert_ablation.analysis import costliest, domains_matter, pairs_interact

SETTINGS: dict[str, Any] = {
    "pair_samples_per_domain": 6,
    "num_resamplings": 199,
    "num_controls": 2,
    "batch_size": 24,
}


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_what_the_domain_explains_of_the_costs() -> None:
    """Two experts, each of which costs 1 in its own domain alone: the domain explains everything."""
    domain = np.arange(12) % 2
    cost = np.stack([domain == 0, domain == 1]).astype(np.float64)
    found = domains_matter(cost, domain, num_resamplings=199, rng=generator())
    assert found.explained == pytest.approx(1.0) and found.p_value <= 0.02
    assert found.null_mean == pytest.approx(1 / 11, abs=0.05)  # (groups - 1) / (samples - 1)


def test_costs_that_are_nothing_are_no_evidence() -> None:
    found = domains_matter(np.zeros((3, 8)), np.arange(8) % 2, num_resamplings=9, rng=generator())
    assert (found.explained, found.p_value) == (0.0, 1.0)


def test_false_positive_rate_of_the_test_of_domains() -> None:
    """Heavy-tailed costs that have nothing to do with the domains: of 200, 10 false claims are expected; 20 have a
    chance of 0.2%."""
    rng = generator()
    claims = 0
    for _ in range(200):
        cost = rng.gamma(0.3, 1.0, size=(1, 12)) * rng.gamma(0.5, 1.0, size=(3, 12))
        claims += domains_matter(cost, np.arange(12) % 3, num_resamplings=79, rng=rng).p_value <= 0.05
    assert claims <= 20


def test_the_costliest_is_measured_on_other_samples_than_it_is_chosen_on() -> None:
    """A cost that stands in the choosing half alone is not believed."""
    domain = np.zeros(8, dtype=np.int64)
    cost = np.zeros((2, 8))
    cost[1, ::2] = 5.0  # every second sample of a domain chooses
    found = costliest(cost, domain, num_resamplings=99, rng=generator())
    assert (found.expert, found.domain, found.cost) == (1, 0, 0.0)


def test_interaction_of_pairs() -> None:
    """Experts 0 and 1 cost nothing alone and 1 together; 2 is used by nobody who uses another."""
    single = np.zeros((3, 10))
    both = np.zeros((3, 3, 10))
    both[0, 1] = 1.0
    used = np.ones((3, 10), dtype=bool)
    used[2] = False
    found = pairs_interact(single, both, used, num_resamplings=999, rng=generator())
    assert found.interaction[0, 1] == found.interaction[1, 0] == found.mean == 1.0
    assert np.isnan(found.interaction[2]).all() and np.isnan(np.diag(found.interaction)).all()
    assert found.p_value is not None and found.p_value <= 0.01 and found.num_samples == 10


def test_rounding_is_no_interaction_and_few_samples_no_test() -> None:
    used = np.ones((2, 8), dtype=bool)
    noise = np.full((2, 2, 8), 1e-8)
    found = pairs_interact(np.zeros((2, 8)), noise, used, num_resamplings=99, rng=generator())
    assert (found.mean, found.p_value) == (0.0, 1.0)
    few = pairs_interact(np.zeros((2, 4)), noise[..., :4], used[:, :4], num_resamplings=99, rng=generator())
    assert few.p_value is None
    none = pairs_interact(np.zeros((2, 4)), noise[..., :4], ~used[:, :4], num_resamplings=99, rng=generator())
    assert np.isnan(none.mean) and none.num_samples == 0


# --- a whole model


@pytest.fixture(scope="module")
def probe() -> Probe:
    """Experts 2 and 3 serve letters, 0 and 1 digits; either of the two would do nearly as well alone."""
    rng = np.random.default_rng(1)
    model = planted.one_block_model(1, feature=planted.LETTERS, other=planted.DIGITS, moe_top_k=2)
    planted.tie_experts(model, (2, 3), (0, 1), strength=0.5)
    samples = planted.letters_and_digits(rng, num_samples=24, num_chunks=3, purity=1.0)
    return Probe(model=model, tokenizer=planted.byte_tokenizer(), name="planted", samples=samples)


def by_hand(model: HydraForCausalLM, samples: Samples, experts: tuple[int, ...]) -> Any:
    """Loss of each sample with the experts' own weights at zero."""
    down = model.get_parameter("model.layers.0.moe.down_proj")
    kept = down.detach().clone()
    down.data[list(experts)] = 0.0
    losses = sample_losses(model, samples)
    down.data.copy_(kept)
    return losses


def test_costs_are_those_of_zeroed_weights(probe: Probe) -> None:
    costs = run.measure(probe, SETTINGS)
    intact = sample_losses(probe.model, probe.samples)
    atol = 1e-5  # fp32 sums in another order
    for expert in range(4):
        expected = by_hand(probe.model, probe.samples, (expert,)) - intact
        np.testing.assert_allclose(costs.single[0, expert], expected, atol=atol)
    taken = probe.samples.take(costs.pair_rows)
    letters = np.array([domain == "letters" for domain in taken.domains])
    expected = by_hand(probe.model, taken, (2, 3)) - intact[costs.pair_rows]
    np.testing.assert_allclose(costs.both[0, 2, 3, letters], expected[letters], atol=atol)
    assert (costs.both[0, 2, 3, ~letters] == 0).all()  # digits use neither
    assert (costs.both[0, 0, 2] == 0).all()  # no sample uses both


def test_the_study_of_a_planted_model(probe: Probe) -> None:
    outcome = run.STUDY.run(probe, SETTINGS)
    by_domain, of_pairs = corrected(outcome.findings)
    assert by_domain.is_claimed() and by_domain.estimate > 0.9 and by_domain.causal is not None
    assert by_domain.causal.estimate > 0.1
    assert (
        of_pairs.is_claimed() and of_pairs.estimate > 0.05 and "stand in for each other" in of_pairs.verdict
    )
    assert of_pairs.n == 12 and by_domain.n == 24
    assert list(outcome.figures) == ["cost_by_domain", "interaction_of_pairs", "cost_and_load"]


def test_too_few_samples_are_named(probe: Probe) -> None:
    few = dataclasses.replace(probe, samples=probe.samples.take(range(6)))
    with pytest.raises(ValueError, match=r"too few samples \(letters 3, digits 3\)"):
        run.measure(few, SETTINGS)
    one = dataclasses.replace(probe, samples=probe.samples.take(range(0, 24, 2)))
    with pytest.raises(ValueError, match=r"of one domain \(letters\)"):
        run.measure(one, SETTINGS)

"""The study on data and models whose answer is known: planted structure is found, absent structure is not."""

from typing import Any

import numpy as np
import pytest
import torch

from hydra_lab import metrics
from hydra_lab.capture.path_use import sample_losses
from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Finding, Probe, claims_anything, corrected, planted
from hydra_lab.probing.experts import cost_of_each_expert, cost_of_random_removals, observe_routing
from probes.expert_specialization import analysis, measure, run

CLASSES = ("word", "digit")


def observation(
    rng: np.random.Generator, *, domain: float, token: float, num_samples: int = 16
) -> analysis.Observation:
    """Two domains, 3 experts, 8 chunks of 4 tokens. `domain` and `token`: chance that the expert follows
    them.

    Without both, every sample has a taste of its own, so that its chunks resemble each other.
    """
    code = np.arange(num_samples) % 2
    taste = rng.dirichlet(np.full(3, 0.4), size=num_samples)
    first = np.stack([rng.choice(3, size=8, p=each) for each in taste])
    first = np.where(rng.random(first.shape) < domain, code[:, None], first)
    experts = np.stack([first, (first + 1) % 3], axis=-1)
    classes = rng.integers(2, size=(num_samples, 32))
    heavy = np.where(rng.random(classes.shape) < token, classes, rng.integers(2, size=classes.shape))
    weights = np.stack([np.where(heavy == 0, 0.9, 0.1), np.where(heavy == 0, 0.1, 0.9)], axis=-1)
    record = metrics.RoutingRecord(
        (0,), experts[None], 3, 4, np.full(num_samples, 32), tuple("ab"[c] for c in code), weights[None]
    )
    return analysis.Observation(record, classes, CLASSES, np.ones((1, num_samples, 8)))


def p_values(found: analysis.Association) -> list[float]:
    """Of the tests of dependence on the domain and on the token's class, corrected."""
    tests = [test.p_value for test in (*found.domain_tests, *found.class_tests)]
    return metrics.holm(np.array(tests)).tolist()


def test_planted_structure_is_found() -> None:
    rng = np.random.default_rng(0)
    found = analysis.associate(observation(rng, domain=0.7, token=0.8), num_resamplings=199, seed=0)
    assert max(p_values(found)) <= 0.05
    assert found.domain_share[0, 0].argmax() == 0 and found.domain_share[0, 1].argmax() == 1
    best = analysis.clearest(found.domain_share, found.domain_adjusted, found.domains, (0,))
    assert {(each.name, each.expert) for each in best} == {("a", 0), ("b", 1)}
    low, high = found.domain_tests[0].interval
    assert 0.1 < low <= found.domain_tests[0].corrected <= high


def test_one_kind_of_structure_is_not_taken_for_the_other() -> None:
    rng = np.random.default_rng(1)
    found = analysis.associate(observation(rng, domain=0.8, token=0.0), num_resamplings=199, seed=0)
    about_domain, about_class = p_values(found)
    assert about_domain <= 0.05 < about_class


def test_false_positive_rate_of_the_tests_of_dependence() -> None:
    """At 5%, 60 structureless data sets give 3 false claims on average; more than 8 has a chance below 1%."""
    rng = np.random.default_rng(2)
    claims = 0
    for seed in range(60):
        found = analysis.associate(
            observation(rng, domain=0.0, token=0.0, num_samples=12), num_resamplings=59, seed=seed
        )
        claims += min(p_values(found)) <= 0.05
    assert claims <= 8


def test_false_positive_rate_of_the_causal_test() -> None:
    """200 data sets whose costs have nothing to do with the domains: 10 false claims expected, 20 have a
    chance of 0.2%. Costs vary strongly between samples, as real ones do."""
    rng = np.random.default_rng(3)
    preferring = observation(rng, domain=0.8, token=0.0)
    domains = tuple("ab" * 8)
    claims = 0
    for seed in range(200):
        increase = rng.gamma(0.5, 1.0, size=(1, 1, 16)) * rng.gamma(1.0, 1.0, size=(1, 3, 16))
        found = analysis.compare_with_ablation(preferring, increase, domains, num_resamplings=79, seed=seed)
        claims += bool(found.slope_p[0] <= 0.05)
    assert claims <= 20


def test_planted_cost_is_found() -> None:
    rng = np.random.default_rng(4)
    preferring = observation(rng, domain=0.8, token=0.0)
    increase = 0.05 * rng.random((1, 3, 16))
    increase[0, 0, ::2] += 1.0  # expert 0 matters in a, expert 1 in b
    increase[0, 1, 1::2] += 1.0
    found = analysis.compare_with_ablation(preferring, increase, tuple("ab" * 8), num_resamplings=199, seed=0)
    assert found.agreement[0] > 0.5 and found.slope_p[0] <= 0.05
    low, high = found.slope_interval[0]
    assert 0.5 < low <= found.slope[0] <= high
    np.testing.assert_allclose(
        found.increase[0, 0], [increase[0, 0, ::2].mean(), increase[0, 0, 1::2].mean()]
    )
    assert (found.interval[0, 0, 0] > 0.9).all() and found.matches[0] >= 2


def test_rank_correlation() -> None:
    a = np.array([1.0, 2.0, 2.0, 5.0])
    assert analysis.rank_correlation(a, 10 * a) == pytest.approx(1.0)
    assert analysis.rank_correlation(a, -a) == pytest.approx(-1.0)
    assert analysis.rank_correlation(a, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.9486833)
    assert np.isnan(analysis.rank_correlation(a, np.ones(4)))


# --- a whole model
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples() -> Samples:
    """Letters in one domain, digits in the other, and nothing else; 24 samples of 24 tokens."""
    return planted.letters_and_digits(np.random.default_rng(5), num_samples=24, num_chunks=3, purity=1.0)


@pytest.fixture(scope="module")
def model() -> HydraForCausalLM:
    """Expert 2 is forced on letters and makes letters likely, expert 0 the same for digits."""
    made = planted.one_block_model(0, feature=planted.LETTERS, other=planted.DIGITS)
    planted.tie_experts(made, (2,), (0,))
    return made


def probe_of(model: HydraForCausalLM, samples: Samples) -> Probe:
    return Probe(model=model, tokenizer=planted.byte_tokenizer(), name="planted", samples=samples)


SETTINGS: dict[str, Any] = {"num_resamplings": 199, "num_controls": 2, "batch_size": 24}


def quiet(_line: str) -> None: ...


def test_an_expert_forced_to_a_domain_is_found(model: HydraForCausalLM, samples: Samples) -> None:
    classes = measure.token_classes(planted.byte_tokenizer())
    seen = measure.observe(model, samples, classes, batch_size=5)
    assert (seen.routing.experts[0, ::2] == 2).all() and (seen.routing.experts[0, 1::2] == 0).all()
    assert (seen.heaviest[0, ::2] == 2).all()
    assert set(seen.tokens_class[0]) == {metrics.TOKEN_CLASSES.index("word piece")}
    increase = cost_of_each_expert(model, samples, seen.routing, batch_size=8, progress=quiet)
    assert (increase[0, 2, ::2] > 0.5).all() and (increase[0, 2, 1::2] == 0).all()
    assert (increase[0, [1, 3]] == 0).all()


def test_ablation_is_what_zeroed_expert_weights_cost(model: HydraForCausalLM, samples: Samples) -> None:
    seen = observe_routing(model, samples, batch_size=8)
    increase = cost_of_each_expert(model, samples, seen.record, batch_size=8, progress=quiet)
    down = model.get_parameter("model.layers.0.moe.down_proj")
    kept = down[2].detach().clone()
    before = sample_losses(model, samples)
    with torch.no_grad():
        down[2] = 0.0
        after = sample_losses(model, samples)
        down[2] = kept
    np.testing.assert_allclose(increase[0, 2], after - before, atol=1e-5)  # fp32 sums in another order


def test_random_removals_cost_what_their_load_does(model: HydraForCausalLM, samples: Samples) -> None:
    """A choice in four is dropped, so a quarter of what all choices cost."""
    seen = observe_routing(model, samples, batch_size=8)
    random = cost_of_random_removals(
        model, samples, seen.record, num_draws=8, seed=0, batch_size=5, progress=quiet
    )
    assert random.shape == (1, 8, 24)
    with model.cut("moe"):
        whole = (sample_losses(model, samples)).mean()
    whole -= sample_losses(model, samples).mean()
    # 8 draws of 72 choices: the share that is dropped has a standard error of 0.018
    assert random.mean() == pytest.approx(whole / 4, rel=0.25)


def test_the_margin_is_the_distance_to_the_next_expert(model: HydraForCausalLM, samples: Samples) -> None:
    """The router's logits are 5 h and -5 h for the two experts and 0 for the others."""
    seen = observe_routing(model, samples, batch_size=8)
    np.testing.assert_allclose(seen.margin[0], seen.logits[0].max(axis=-1), rtol=1e-6)
    assert (seen.margin > 1).all()


def test_the_study_of_a_planted_model(model: HydraForCausalLM, samples: Samples) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    outcome = run.STUDY.run(probe_of(model, samples), SETTINGS)
    about_domain, about_class = corrected(outcome.findings)
    # all of log 2 nats but what chance would show
    assert 0.5 < about_domain.estimate < np.log(2)
    assert about_domain.is_claimed() and about_domain.layer == 0 and about_domain.n == 24
    assert about_domain.causal is not None and about_domain.causal.is_claimed()
    assert about_domain.causal.estimate > 0.5
    assert "specialized by domain" in about_domain.verdict
    assert not about_class.is_claimed()  # inside a domain there is one class
    assert {(each["name"], each["expert"]) for each in outcome.tables["domain_preferences"]} == {
        ("letters", 2),
        ("digits", 0),
    }
    assert outcome.tables["ablation"]["experts_costliest_where_preferred"] == [2]
    assert list(outcome.figures) == [
        "information", "by_domain", "by_token_class", "causal", "agreement", "path_use",
    ]  # fmt: skip
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])  # the study leaves the model as it was


def test_the_study_claims_nothing_of_shuffled_labels(model: HydraForCausalLM, samples: Samples) -> None:
    half = tuple("letters" if row % 4 < 2 else "digits" for row in range(24))
    shuffled = Samples(samples.tokens, samples.scored, samples.length, half)
    found = run.findings(run.gather(probe_of(model, shuffled), SETTINGS))
    about_domain, about_class = corrected(found)
    assert not about_domain.is_claimed() and "no evidence" in about_domain.verdict
    assert about_class.is_claimed()  # letters and digits are still told apart
    assert claims_anything(found)


def domain_finding(**changes: Any) -> Finding:
    evidence = run.Evidence(
        analysis.associate(
            observation(np.random.default_rng(6), domain=0.9, token=0.0), num_resamplings=99, seed=0
        ),
        analysis.Control(np.zeros((2, 1))),
        analysis.compare_with_ablation(
            observation(np.random.default_rng(7), domain=0.9, token=0.0),
            np.zeros((1, 3, 16)),
            tuple("ab" * 8),
            num_resamplings=99,
            seed=0,
        ),
        path_use(**changes),
    )
    return run.findings(evidence)[0]


def path_use(share: float, cost: float) -> metrics.PathUse:
    return metrics.PathUse(
        (0,), ("ssm", "moe"), np.array([[1 - share, share]]), np.ones((1, 2)), ("a",), np.ones(1),
        np.array([[3.0], [cost]]), np.zeros((2, 1)), np.ones(1, dtype=int), np.ones(1, dtype=int),
    )  # fmt: skip


def test_an_unused_path_is_called_idle_whatever_its_routing_shows() -> None:
    assert "idle" in domain_finding(share=0.01, cost=0.5).verdict
    used = domain_finding(share=0.5, cost=0.5)
    assert "that this matters for the loss is not shown" in used.verdict
    assert used.causal is not None and used.causal.p_value == 1.0


def test_random_routers_differ_and_leave_the_model_alone(model: HydraForCausalLM) -> None:
    before = model.get_parameter("model.layers.0.moe.router.weight").clone()
    first, second = (measure.with_random_routers(model, seed) for seed in (0, 1))
    weights = [each.get_parameter("model.layers.0.moe.router.weight") for each in (first, second)]
    assert not torch.equal(weights[0], weights[1])
    assert weights[0].std().item() == pytest.approx(before.std().item(), rel=0.25)
    assert torch.equal(model.get_parameter("model.layers.0.moe.router.weight"), before)


def test_token_classes() -> None:
    tokenizer = planted.byte_tokenizer()
    classes = measure.token_classes(tokenizer)
    for text, name in (("a", "word piece"), ("7", "digit"), (";", "punctuation")):
        token = tokenizer.convert_tokens_to_ids(text)
        assert metrics.TOKEN_CLASSES[classes[token]] == name
    (end,) = tokenizer.encode("<|endoftext|>")
    assert metrics.TOKEN_CLASSES[classes[end]] == "special"


def test_too_few_samples_are_named(model: HydraForCausalLM, samples: Samples) -> None:
    with pytest.raises(ValueError, match=r"too few samples \(letters 1, digits 1\)"):
        run.gather(probe_of(model, samples.take([0, 1])), SETTINGS)
    with pytest.raises(ValueError, match="of one domain"):
        run.gather(probe_of(model, samples.take(range(0, 24, 2))), SETTINGS)

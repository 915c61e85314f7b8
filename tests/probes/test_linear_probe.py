"""The study on features and models whose answer is known."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import hydra_lab
from hydra_lab.capture.path_use import sample_losses
from hydra_lab.data.samples import Samples
from hydra_lab.probing import Probe, corrected, planted
from probes.linear_probe import run
from probes.linear_probe.analysis import (
    SiteScore,
    best_of,
    directions,
    folds_by_sample,
    permutations,
    score_site,
    sign_test,
)
from probes.linear_probe.features import Site, collect, sites_of
from probes.linear_probe.tasks import Task, binding_task, depth_task, domain_task, position_task
from tests.helpers import lively_model

SITE = Site("residual", 0)
NUM_SAMPLES, NUM_OBSERVATIONS = 20, 6


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def texts(rng: np.random.Generator) -> Samples:
    return planted.letters_and_digits(rng, num_samples=NUM_SAMPLES, num_chunks=NUM_OBSERVATIONS, purity=1.0)


def task_of(label: str, seed: int = 0) -> Task:
    make = {"domain": domain_task, "position": position_task}[label]
    return make(texts(generator(seed)), every=planted.CHUNK_SIZE, rng=generator(seed))


def score(features: np.ndarray[Any, Any], task: Task, num_permutations: int = 99) -> SiteScore:
    rng = generator()
    folds = folds_by_sample(task, 4, rng)
    permuted = permutations(task, num_permutations, rng)
    return score_site(SITE, features.astype(np.float32), task, permuted, folds, ridge=1.0, rng=rng)


# --- tasks ---------------------------------------------------------------------------------------------------------


def test_observations_of_texts() -> None:
    samples = texts(generator())
    short = dataclasses.replace(samples, length=np.where(np.arange(NUM_SAMPLES) == 3, 20, samples.length))
    task = position_task(short, every=planted.CHUNK_SIZE, rng=generator())
    assert task.position[task.row == 3].tolist() == [7, 15]  # a third stretch of 8 tokens is not complete
    assert task.label[task.row == 0].tolist() == [1, 2, 3, 4, 5, 6]
    tokens = short.tokens[task.row, task.position]
    for token in np.unique(tokens):  # a control label follows the kind of token
        assert len(np.unique(task.control[tokens == token])) == 1


def test_depth_counts_open_brackets() -> None:
    tokenizer = planted.byte_tokenizer()
    task = depth_task(tokenizer, num_problems=30, rng=generator())
    for n in range(30):
        text = tokenizer.decode(task.samples.tokens[n, : task.samples.length[n]])
        assert task.label[n] == text.count("(") - text.count(")")
        assert task.position[n] == task.samples.length[n] - 1
    assert task.label.min() >= 0 and len(np.unique(task.label)) > 3


def test_binding_asks_for_a_value_and_sees_no_answer() -> None:
    tokenizer = planted.byte_tokenizer()
    task = binding_task(tokenizer, num_problems=20, rng=generator())
    for n in range(20):
        ids = task.samples.tokens[n, : task.samples.length[n]]
        text = str(tokenizer.decode(ids[: task.position[n] + 1]))
        given, asked = text.split(" ?")
        pairs = dict(pair.strip().split(" = ") for pair in given.removeprefix("recall:").split(";") if pair)
        answer = pairs[asked.removesuffix(" =").strip()]
        assert "ABCDEFGH"[int(task.label[n])] == answer == tokenizer.decode(ids[-1:])
        assert "ABCDEFGH"[int(task.control[n])] in set(pairs.values()) - {answer}
        assert task.samples.scored[n].nonzero()[0].tolist() == [len(ids) - 1]


# --- probes --------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_ridge_fitted_fold_by_fold() -> None:
    task = task_of("position")
    rng = generator(1)
    features = rng.standard_normal((len(task.row), 5)) + task.label[:, None] * [1, 0, 0, 0, 0]
    found = score(features, task)
    predicted = np.zeros(len(task.row))
    for fit, test in folds_by_sample(task, 4, generator()):
        mean, spread = features[fit].mean(axis=0), features[fit].std(axis=0)
        model = Ridge(alpha=1.0).fit((features[fit] - mean) / spread, task.label[fit])
        predicted[test] = model.predict((features[test] - mean) / spread)
    expected = 1 - ((predicted - task.label) ** 2).sum() / ((task.label - task.label.mean()) ** 2).sum()
    assert found.score == pytest.approx(expected, abs=1e-4)  # fp32 against fp64
    assert found.interval[0] < found.score < found.interval[1]
    assert best_of([found]).p_value == 0.01


def test_balanced_accuracy_weighs_classes_alike() -> None:
    """All of one class right and none of the other is one half, whatever their sizes."""
    samples = texts(generator()).take([0, 2, 4, 6, 8, 10, 12, 14, 1, 3])
    task = domain_task(samples, every=planted.CHUNK_SIZE, rng=generator())
    found = score(np.zeros((len(task.row), 2)), task)
    assert found.score == pytest.approx(0.5)


def test_no_sample_is_fitted_on_and_predicted() -> None:
    task = task_of("domain")
    for fit, test in folds_by_sample(task, 4, generator()):
        assert not set(task.row[fit]) & set(task.row[test])
    with pytest.raises(ValueError, match="20 samples are too few for 21 folds"):
        folds_by_sample(task, 21, generator())


def test_permutations_keep_what_they_should() -> None:
    domain, position = task_of("domain"), task_of("position")
    for permuted in permutations(domain, 20, generator()):
        labels = permuted.reshape(NUM_SAMPLES, NUM_OBSERVATIONS)
        assert (labels == labels[:, :1]).all()  # one label per sample
        assert permuted.sum() == domain.label.sum()
    turned = permutations(position, 20, generator()).reshape(20, NUM_SAMPLES, NUM_OBSERVATIONS)
    steps = np.diff(turned, axis=-1)
    assert np.isin(steps, [1, 1 - NUM_OBSERVATIONS]).all()  # neighbours stay neighbours
    assert len(np.unique(turned[:, :, 0])) == NUM_OBSERVATIONS
    binding = binding_task(planted.byte_tokenizer(), num_problems=12, rng=generator())
    assert binding.choices is not None
    drawn = permutations(binding, 60, generator())
    for n in range(12):  # each of the four values of the problem, the right one among them
        assert set(drawn[:, n]) == set(binding.choices[n]) and binding.label[n] in binding.choices[n]


@pytest.mark.parametrize("label", ["domain", "position"])
def test_false_positive_rate_where_observations_of_a_sample_resemble_each_other(label: str) -> None:
    """Random walks that start anywhere and wander: of 60, 3 false claims are expected; more than 10 have a chance of
    0.02%."""
    rng = generator(2)
    claims = 0
    for seed in range(60):
        task = task_of(label, seed)
        walk = rng.standard_normal((NUM_SAMPLES, NUM_OBSERVATIONS, 4))
        if label == "domain":
            walk = walk.cumsum(axis=1) + 3 * rng.standard_normal((NUM_SAMPLES, 1, 4))
        claims += best_of([score(walk.reshape(-1, 4), task, num_permutations=39)]).p_value <= 0.05
    assert claims <= 10


def test_the_best_of_several_sites_is_held_against_the_best_of_the_null() -> None:
    null = np.array([[0.1, 0.9], [0.8, 0.2]])
    scores = [
        SiteScore(Site("residual", n), value, (0, 1), 0.0, null[n]) for n, value in enumerate((0.5, 0.7))
    ]
    found = best_of(scores)
    assert found.best.site.layer == 1
    assert found.p_value == 1.0  # both permutations have a site above 0.7
    assert found.null_mean == pytest.approx(0.85)


def test_directions_find_the_planted_one() -> None:
    task = task_of("domain")
    rng = generator(3)
    features = rng.standard_normal((len(task.row), 6))
    features[:, 2] += 6 * task.label
    found = directions(features.astype(np.float32), task.label, task, np.arange(len(task.row)), ridge=1.0)
    assert found.shape == (1, 6)
    assert abs(found[0, 2]) > 0.9  # the rest is noise: 120 observations of 6 channels
    assert np.linalg.norm(found[0]) == pytest.approx(1.0)


def test_the_sign_test_is_one_sided() -> None:
    assert sign_test(np.full(12, 1.0), 999, generator()) <= 0.01
    assert sign_test(np.full(12, -1.0), 999, generator()) == 1.0
    assert sign_test(np.zeros(12), 999, generator()) == 1.0


# --- whole models ----------------------------------------------------------------------------------------------------


def test_what_is_collected_is_what_the_model_holds() -> None:
    model = lively_model(vocab_size=len(planted.byte_tokenizer()))
    samples = texts(generator())
    task = domain_task(samples, every=planted.CHUNK_SIZE, rng=generator())
    features = collect(model, task, most_features=10_000, seed=0, batch_size=7)
    assert tuple(features) == sites_of(model)
    ids = torch.from_numpy(samples.tokens[4:5, :24])
    recording = hydra_lab.record(model, ids, taps=["ssm.states", "moe.routing"], hidden=True)
    third = np.flatnonzero((task.row == 4) & (task.position == 23))[0]
    # the batch and the length differ, so sums run in another order
    close = partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
    close(features[Site("residual", 1)][third], recording.hidden[1][0, 23])
    logits = recording["layers.2.moe.routing"].logits[0, 2]
    close(features[Site("router", 2)][third], logits)
    states = recording["layers.3.ssm.states"].states[0, 2].flatten()
    close(features[Site("state", 3)][third], states)
    # the slots that tokens 16 to 23 read are those after 16 tokens
    with torch.no_grad():
        cache = model(input_ids=ids[:, :16], use_cache=True).past_key_values
    slots = cache.states[1]["workspace"].slots[0].flatten()
    close(features[Site("slots", 1)][third], slots)


def test_states_are_projected_alike_for_every_observation() -> None:
    model = lively_model(vocab_size=len(planted.byte_tokenizer()))
    task = domain_task(texts(generator()), every=planted.CHUNK_SIZE, rng=generator())
    whole = collect(model, task, most_features=10_000, seed=0, batch_size=8)[Site("state", 0)]
    first, again, other = (
        collect(model, task, most_features=16, seed=seed, batch_size=size)[Site("state", 0)]
        for seed, size in ((0, 8), (0, 3), (1, 8))
    )
    assert first.shape == (len(task.row), 16) and not np.allclose(first, other)
    np.testing.assert_allclose(first, again, atol=1e-4)
    matrix, *_ = np.linalg.lstsq(whole, first, rcond=None)
    np.testing.assert_allclose(whole @ matrix, first, atol=1e-3)  # linear


def test_a_state_is_not_known_inside_a_chunk() -> None:
    model = lively_model(vocab_size=len(planted.byte_tokenizer()))
    task = domain_task(texts(generator()), every=12, rng=generator())
    with pytest.raises(ValueError, match="end of every 8 tokens"):
        collect(model, task, most_features=16, seed=0, batch_size=8)


def test_directions_are_taken_out_of_the_residual_stream() -> None:
    model = lively_model(vocab_size=len(planted.byte_tokenizer()))
    ids = torch.from_numpy(texts(generator()).tokens[:2])
    basis = np.linalg.qr(generator().standard_normal((32, 3)))[0].T
    centre = generator(1).standard_normal(32).astype(np.float32)
    before = hydra_lab.record(model, ids, hidden=True)
    with run.without_directions(model, 1, basis, centre):
        changed = hydra_lab.record(model, ids, hidden=True)
    after = hydra_lab.record(model, ids, hidden=True)
    assert torch.equal(before.logits, after.logits)
    along = changed.hidden[1].double().numpy() @ basis.T
    np.testing.assert_allclose(along, np.broadcast_to(centre @ basis.T, along.shape), atol=1e-4)
    moved = (changed.hidden[1] - before.hidden[1]).double().numpy()
    np.testing.assert_allclose(moved @ basis.T @ basis, moved, atol=1e-4)  # along the directions alone
    assert torch.equal(changed.hidden[0], before.hidden[0])


SETTINGS: dict[str, Any] = {
    "tasks": ["domain", "position", "depth", "binding"], "every": planted.CHUNK_SIZE, "num_problems": 16,
    "most_features": 16, "ridge": 30.0, "num_folds": 4, "num_permutations": 199, "num_controls": 2, "batch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def probe() -> Probe:
    model = planted.one_block_model(0, feature=planted.LETTERS, other=planted.DIGITS)
    return Probe(model=model, tokenizer=planted.byte_tokenizer(), name="planted", samples=texts(generator()))


def test_the_study_of_a_planted_model(probe: Probe) -> None:
    before = sample_losses(probe.model, probe.samples)
    outcome = run.STUDY.run(probe, SETTINGS | {"tasks": ["domain"]})
    told = {finding.name: finding for finding in corrected(outcome.findings)}
    residual = told["domain in the residual stream"]
    assert residual.estimate > 0.95 and residual.is_claimed()
    assert residual.causal is not None and residual.causal.is_claimed() and residual.causal.estimate > 0.1
    assert told["domain in the router logits"].causal is None
    assert list(outcome.figures) == ["domain", "removal"]
    np.testing.assert_array_equal(sample_losses(probe.model, probe.samples), before)


def test_every_task_runs(probe: Probe) -> None:
    outcome = run.STUDY.run(probe, SETTINGS)
    assert len(outcome.findings) == 12 and len(outcome.figures) == 5
    assert set(outcome.tables["removal"]) == set(SETTINGS["tasks"])


def test_unknown_tasks_and_short_texts_are_named(probe: Probe) -> None:
    with pytest.raises(
        ValueError, match=r"tasks=\['mood'\] must name some of domain, position, depth, binding"
    ):
        run.gather(probe, SETTINGS | {"tasks": ["mood"]})
    with pytest.raises(ValueError, match="samples of at least every=64 tokens"):
        run.gather(probe, SETTINGS | {"every": 64, "tasks": ["position"]})

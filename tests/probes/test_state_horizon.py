"""The study of horizons on half-lives and models whose answer is known."""

import numpy as np
import pytest
import torch

from hydra_lab.capture import record
from hydra_lab.data.samples import Samples
from hydra_lab.data.tokenizer import train_tokenizer
from hydra_lab.interventions import intervened
from hydra_lab.interventions.ssm import PatchState
from hydra_lab.probing import Probe
from hydra_lab.probing.continuation import divergence, read_on, with_memory_of
from probes.state_horizon import analysis, calibration, run
from probes.state_horizon.measure import choose_texts, replacements
from probes.state_horizon.settings import Settings
from tests.helpers import lively_model, random_ids

SETTINGS = {"num_samples": 3, "context": 6, "horizon": 16, "num_resamplings": 99, "batch_size": 2}


def test_half_life_of_exponentials() -> None:
    """Exact up to the grid of half-lives, which is 3% wide; what does not fall is endless, nothing is unknown."""
    half_life = np.array([0.5, 2.0, 10.0, 50.0, 400.0])
    amplitude = 3.0 * 2.0 ** (-np.arange(64) / half_life[:, None])
    np.testing.assert_allclose(analysis.exponential_half_life(amplitude), half_life, rtol=0.02)
    odd = analysis.exponential_half_life(np.stack([np.ones(64), np.arange(64.0), np.zeros(64)]))
    assert np.isinf(odd[:2]).all() and np.isnan(odd[2])


def test_gaps_are_filled_exponentially() -> None:
    distance = np.array([3, 7, 15])
    amplitude = np.stack([2.0 ** (-distance / 5.0), np.zeros(3)])
    filled = analysis.filled_in(distance, amplitude)
    np.testing.assert_allclose(filled[0], 2.0 ** (-np.arange(3, 16) / 5.0))
    assert (filled[1] == 0).all()


def test_divergence_of_small_and_large_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, generator=generator)
    other = logits + torch.randn(4, 50, generator=generator)
    expected = (
        logits.double().softmax(-1) * (logits.double().log_softmax(-1) - other.double().log_softmax(-1))
    ).sum(-1)
    np.testing.assert_allclose(divergence(logits, other), expected.numpy(), rtol=1e-5)
    small = logits + 1e-3 * torch.randn(4, 50, generator=generator)
    expected = (
        logits.double().softmax(-1) * (logits.double().log_softmax(-1) - small.double().log_softmax(-1))
    ).sum(-1)
    np.testing.assert_allclose(
        divergence(logits, small), expected.numpy(), rtol=1e-2
    )  # fp32 differences of 1e-3
    assert (divergence(logits, logits) == 0).all()


def test_planted_half_lives_are_measured() -> None:
    """The states' half-lives within a tenth of those that were built in; the attention, which adds little,
    carries little."""
    model, half_life = calibration.planted_model(3)
    measurement = calibration.followed(model, 3)
    np.testing.assert_allclose(measurement.decay_half_life, half_life, rtol=1e-4)
    np.testing.assert_allclose(analysis.horizon(measurement).state_half_life, half_life, rtol=0.1)
    assert calibration.finds_planted(3)


def test_a_state_that_nothing_reads_changes_nothing() -> None:
    measurement = calibration.followed(calibration.unread_model(0), 0)
    assert (measurement.state_change > 0).any()
    assert (measurement.output_change[:, 1:] == 0).all() and (measurement.head_change == 0).all()
    assert np.isnan(analysis.horizon(measurement).output_half_life).all()
    assert not any(calibration.claims_nothing_there(seed) for seed in range(3))


def test_exchanged_memory_is_a_write_patch() -> None:
    """One head's state from another run is the intervention `ssm[i].patch` at the chunk's end: same logits
    after it."""
    model = lively_model()
    layer, head, chunk = 1, 2, model.config.ssm_chunk_size
    ids, others = random_ids(model.config, 1, 20), random_ids(model.config, 1, 20, seed=1)
    (_, mine), (_, theirs) = (read_on(model, row[:, :chunk]) for row in (ids, others))
    given = theirs.states[layer]["ssm"]
    theirs.states[layer]["ssm"] = given._replace(
        state=100 * given.state
    )  # one head does little in this model
    logits, _ = read_on(model, ids[:, chunk:], with_memory_of(mine, theirs, "ssm", layer=layer, head=head))
    states = record(model, others, taps="ssm.states").by_layer("ssm.states")[layer].states
    patch = PatchState(
        block=layer, position=chunk - 1, state=(100 * states[0, 0, head]).tolist(), head=head, kind="write"
    )
    with intervened(model, patch), torch.no_grad():
        patched = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, patched[:, chunk:], rtol=1e-4, atol=1e-4)
    plain, _ = read_on(model, ids[:, chunk:], mine)
    assert (logits - plain).abs().max() > 1e-3


def test_all_memories_together_are_the_other_run() -> None:
    model = lively_model()
    ids, others = random_ids(model.config, 2, 12), random_ids(model.config, 2, 12, seed=1)
    (_, mine), (_, theirs) = (read_on(model, row[:, :8]) for row in (ids, others))
    for path in ("ssm", "attention", "moe", "workspace"):
        mine = with_memory_of(mine, theirs, path)
    torch.testing.assert_close(read_on(model, ids[:, 8:], mine)[0], read_on(model, ids[:, 8:], theirs)[0])


def test_the_study_leaves_the_model_as_it_was() -> None:
    tokenizer = train_tokenizer(["abc 123"], vocabulary_size=260)
    model = lively_model(vocab_size=len(tokenizer))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    outcome = run.STUDY.run(
        Probe(model=model, tokenizer=tokenizer, name="lively", samples=samples_of(8, 40)), dict(SETTINGS)
    )
    names = [each.name for each in outcome.findings]
    assert len(names) == 7 and "workspace: share of the far change that its memory carries" in names
    assert list(outcome.figures) == ["output_change", "half_lives"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not any(module._forward_hooks for module in model.modules())


def test_texts_come_from_all_domains_and_replacements_differ() -> None:
    texts = choose_texts(samples_of(24, 12), num_samples=4, size=10, seed=0)
    assert texts.shape == (4, 10)
    assert sorted(int(row[0] >= 50) for row in texts) == [0, 0, 1, 1]
    assert (replacements(texts, 5, 0) != texts[:, 5]).all()


def test_bad_input_gives_one_line() -> None:
    with pytest.raises(ValueError, match=r"0 of 24 samples have the 99 tokens .* longest has 12"):
        choose_texts(samples_of(24, 12), num_samples=4, size=99, seed=0)
    with pytest.raises(ValueError, match="text 0 is one token over and over"):
        replacements(np.zeros((1, 4), dtype=np.int64), 2, 0)
    with pytest.raises(ValueError, match="horizon=3 must be at least 8"):
        Settings(**{**SETTINGS, "horizon": 3})


def samples_of(num_samples: int, size: int) -> Samples:
    """Two domains by turns: tokens below 50 and from 50 on."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, size=(num_samples, size)) + 50 * (np.arange(num_samples) % 2)[:, None]
    return Samples(
        tokens,
        np.ones_like(tokens, dtype=bool),
        np.full(num_samples, size),
        ("low", "high") * (num_samples // 2),
    )

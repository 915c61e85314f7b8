"""The study of distant premises on answers and models whose truth is known."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hydra_lab.data.samples import Samples
from hydra_lab.data.tasks import SYMBOLS
from hydra_lab.data.tokenizer import train_tokenizer
from hydra_lab.probing import Probe
from probes.distant_premise import analysis, calibration, run
from probes.distant_premise.measure import CUT, FORCED, ask, forbidden
from probes.distant_premise.problems import make_problems
from probes.distant_premise.settings import Settings
from tests.helpers import lively_model

SETTINGS = {
    "distances": [8, 40],
    "num_problems": 3,
    "num_pairs": 4,
    "num_questions": 2,
    "num_resamplings": 99,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["recall: ? ="], symbols=SYMBOLS, vocabulary_size=700)


@pytest.fixture(scope="module")
def samples() -> Samples:
    tokens = np.random.default_rng(0).integers(2, 200, size=(4, 32))
    return Samples(tokens, np.ones_like(tokens, dtype=bool), np.full(4, 32), ("a", "b") * 2)


def test_the_planted_selection_is_found() -> None:
    assert calibration.finds_planted(0)


def test_random_keys_are_not_taken_for_a_selection() -> None:
    assert sum(calibration.claims_nothing_there(seed) for seed in range(3)) <= 1


def test_interventions_do_what_they_say() -> None:
    """In the planted model the attention alone answers: forbidden or cut, the answer is a guess; forced, it
    is right."""
    problems = calibration.problems(1)
    (answers,) = ask(calibration.finding_model(1), problems, [16])
    asked = problems.asked
    assert analysis.is_right(answers.score, asked).mean() > 0.9
    assert analysis.is_right(answers.score_under[FORCED], asked).mean() > 0.9
    for name in (CUT, forbidden(0)):
        assert analysis.is_right(answers.score_under[name], asked).mean() < 0.5
    assert (answers.selected[0, ..., 0, 0] == answers.premise).mean() > 0.9
    assert analysis.is_selectable(answers)
    # 44 tokens are read before the question's; blocks of 4 that end 8 tokens before it, less the sink
    assert answers.num_candidates == 9


def test_distances_are_read_once_and_in_order() -> None:
    """What is answered at a distance does not depend on the shorter ones that were asked before."""
    problems = calibration.problems(2)
    model = calibration.finding_model(2)
    _, later = ask(model, problems, [16, 40])
    (alone,) = ask(model, problems, [40])
    np.testing.assert_allclose(later.score, alone.score, atol=1e-4)
    np.testing.assert_array_equal(later.selected, alone.selected)


def test_matching_is_not_fooled_by_what_is_found_for_every_question() -> None:
    always = np.zeros((10, 4, 4), dtype=bool)
    always[..., 1] = True  # the second pair, whatever is asked
    own, test = analysis.matching_test(always, num_resamplings=199, seed=0)
    assert own.shape == (10,) and test.value == test.null_value == 0.25 and test.p_value == 1.0
    own, test = analysis.matching_test(
        np.tile(np.eye(4, dtype=bool), (10, 1, 1)), num_resamplings=199, seed=0
    )
    assert (own == 1).all() and test.p_value == 1 / 200 and test.null_value == pytest.approx(0.25, abs=0.05)


def test_margin_does_not_fall_under_noise() -> None:
    """The log-probability of a guess falls when its scores are disturbed, the margin does not: 4 standard errors."""
    rng = np.random.default_rng(0)
    asked = np.arange(4)
    noise = rng.normal(size=(4000, 4, 6))
    score = noise - np.log(np.exp(noise).sum(axis=-1, keepdims=True))
    change = analysis.margin(score, asked).mean(axis=1)
    assert abs(change.mean()) < 4 * change.std() / np.sqrt(len(change))
    assert (score[:, asked, asked].mean(axis=1)).mean() < -np.log(6) - 0.1


def test_problems_lie_at_the_same_places(tokenizer: PreTrainedTokenizerFast, samples: Samples) -> None:
    problems = make_problems(
        tokenizer, samples, num_problems=5, num_pairs=4, num_questions=2, largest_distance=30, lead=16, seed=0
    )
    assert problems.given.shape[0] == 5 and problems.filler.shape == (5, 30)
    np.testing.assert_array_equal(problems.asked, [0, 3])
    for n in range(5):
        text = str(tokenizer.decode(problems.given[n, 16:]))
        for a, pair in enumerate(problems.asked):
            asked = str(tokenizer.decode(problems.questions[n, a]))
            value = str(tokenizer.decode(problems.values[n, pair]))
            assert asked.startswith(" ?") and asked[2:] + value + ";" in text
            assert problems.given[n, problems.place[a]] == problems.values[n, pair]


def test_the_study_leaves_the_model_as_it_was(tokenizer: PreTrainedTokenizerFast, samples: Samples) -> None:
    model = lively_model(vocab_size=len(tokenizer))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    outcome = run.STUDY.run(
        Probe(model=model, tokenizer=tokenizer, name="lively", samples=samples), dict(SETTINGS)
    )
    names = [each.name for each in outcome.findings]
    assert len(names) == len(set(names)) and "8 tokens: block 1 selects the premise's block" in names
    assert list(outcome.figures) == ["accuracy", "selection"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_gives_one_line(tokenizer: PreTrainedTokenizerFast, samples: Samples) -> None:
    blind = lively_model(vocab_size=len(tokenizer), attention_num_selected=0)
    with pytest.raises(ValueError, match="selects no blocks"):
        run.STUDY.run(Probe(model=blind, tokenizer=tokenizer, name="blind", samples=samples), dict(SETTINGS))
    size = {"num_problems": 2, "num_questions": 2, "largest_distance": 8, "seed": 0}
    with pytest.raises(ValueError, match="num_pairs=27 must be at most 26"):
        make_problems(tokenizer, samples, num_pairs=27, lead=16, **size)
    with pytest.raises(ValueError, match="no sample has the 63 tokens"):
        make_problems(tokenizer, samples, num_pairs=4, lead=64, **size)
    with pytest.raises(ValueError, match=r"distances=\[40, 8\] must be rising"):
        Settings(**{**SETTINGS, "distances": [40, 8]})
    with pytest.raises(ValueError, match="num_questions=9 must be at most num_pairs=4"):
        Settings(**{**SETTINGS, "num_questions": 9})

"""The study of copying on models that copy by a known path, or not at all."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hydra_lab.data.samples import Samples
from hydra_lab.data.tasks import SYMBOLS
from hydra_lab.data.tokenizer import train_tokenizer
from hydra_lab.probing import Probe
from probes.induction import analysis, calibration, run
from probes.induction.episodes import random_episodes, recall_episodes, whole_words
from probes.induction.measure import CopyGain, block_cuts, copy_gain, path_cuts
from probes.induction.settings import Settings
from tests.helpers import lively_model

SETTINGS = {
    "distances": [8, 16],
    "block_distance": 16,
    "num_sequences": 2,
    "repeat": 8,
    "num_pairs": 3,
    "num_resamplings": 99,
    "batch_size": 2,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["recall: ? ="], symbols=SYMBOLS, vocabulary_size=700)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_planted_path_is_found(seed: int) -> None:
    assert calibration.finds_planted(seed)


def test_a_model_that_does_not_copy_is_not_said_to() -> None:
    assert sum(calibration.claims_nothing_there(seed) for seed in range(3)) <= 1


def test_the_control_differs_in_the_cues_alone() -> None:
    episodes = random_episodes(np.arange(100, 160), num_sequences=5, distance=16, repeat=8, seed=0)
    context, control, repeat = episodes.context.ids, episodes.control.ids, episodes.repeat.ids
    assert context.shape == control.shape == (5, 16) and repeat.shape == (5, 8)
    assert (context[:, :8] == repeat).all()
    different = (context != control).numpy()
    assert (different == np.arange(16).__mod__(2).__eq__(0) * (np.arange(16) < 8)).all()
    for row in range(5):
        assert not set(control[row, 0:8:2].tolist()) & set(context[row].tolist())
        assert len(set(context[row].tolist())) == 16
    assert (episodes.scored == (np.arange(8) % 2 == 1)).all()


def test_recall_episodes_ask_every_pair(tokenizer: PreTrainedTokenizerFast) -> None:
    episodes = recall_episodes(tokenizer, num_problems=3, num_pairs=4, seed=0)
    for n in range(3):
        sides = {}
        for side, rows in (("context", episodes.context), ("control", episodes.control)):
            sides[side] = str(tokenizer.decode(rows.ids[n][rows.present[n] == 1]))
        repeat = episodes.repeat.ids[n][episodes.repeat.present[n] == 1]
        asked = str(tokenizer.decode(repeat)).removesuffix(";").split(";")
        assert len(asked) == 4
        for question in asked:
            assert question.removeprefix(" ?") + ";" in sides["context"]
            assert question.removeprefix(" ?").split(" =")[0] + " =" not in sides["control"]
        answers = [
            str(tokenizer.decode([int(token)])) for token in episodes.repeat.ids[n][episodes.scored[n]]
        ]
        assert answers == [question.split(" =")[1] for question in asked]


def test_gain_and_cuts_are_those_of_whole_texts() -> None:
    """Reading the context first and the repeat after it is reading both at once; 1e-4 for sums in another order."""
    model = lively_model()
    episodes = random_episodes(np.arange(1, 97), num_sequences=3, distance=16, repeat=8, seed=1)
    gain = copy_gain(model, episodes, path_cuts(model), batch_size=2)
    losses = []
    for beginning in (episodes.context.ids, episodes.control.ids):
        with torch.no_grad():
            logits = model(torch.cat([beginning, episodes.repeat.ids], dim=1), use_cache=False).logits
        chosen = logits[:, 16:-1].log_softmax(-1).gather(-1, episodes.repeat.ids[:, 1:, None])[..., 0]
        losses.append(-chosen[:, ::2].mean(dim=1).numpy())
    np.testing.assert_allclose(gain.loss, losses[0], atol=1e-4)
    np.testing.assert_allclose(gain.intact, losses[1] - losses[0], atol=1e-4)
    assert set(gain.under) == {((path, None),) for path in ("ssm", "attention", "moe", "workspace", "memory")}
    assert all(np.abs(lost).max() > 1e-4 for lost in map(gain.lost, gain.under))


@pytest.mark.parametrize(
    ("first", "second", "both", "expected"),
    [(3.0, 1.0, 0.0, 0.0), (4.0, 4.0, 0.0, 4.0), (0.0, 0.0, 0.0, -4.0)],
    ids=["they add up", "one stands in for the other", "both are needed"],
)
def test_interaction_by_hand(first: float, second: float, both: float, expected: float) -> None:
    """Of a gain of 4 nats `first`, `second` and `both` are left under the cuts."""
    one, other = ("ssm", None), ("attention", None)
    left = {(one,): first, (other,): second, (one, other): both}
    gain = CopyGain(
        "", 8.0, np.zeros(2), np.full(2, 4.0), {cut: np.full(2, value) for cut, value in left.items()}
    )
    np.testing.assert_array_equal(analysis.interaction(gain, (one, other)), [expected] * 2)


def test_the_study_leaves_the_model_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    model = lively_model(vocab_size=len(tokenizer))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    empty = Samples(
        np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1), dtype=bool), np.zeros(0, dtype=np.int64), ()
    )
    outcome = run.STUDY.run(
        Probe(model=model, tokenizer=tokenizer, name="lively", samples=empty), dict(SETTINGS)
    )
    names = [each.name for each in outcome.findings]
    assert len(names) == len(set(names))
    # at two distances the gain and 5 paths; where blocks are cut, their paths and one interaction besides
    assert len(names) == 3 * 6 + 2 * (len(block_cuts(model)) + 1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_gives_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(whole_words(tokenizer)) > 100
    with pytest.raises(ValueError, match="distance=64 needs 68 different tokens, and there are 10"):
        random_episodes(np.arange(10), num_sequences=2, distance=64, repeat=8, seed=0)
    with pytest.raises(ValueError, match="must be even numbers from 2 on"):
        Settings(**{**SETTINGS, "distances": [7, 16]})
    with pytest.raises(ValueError, match=r"block_distance=9 must be one of distances=\[8, 16\]"):
        Settings(**{**SETTINGS, "block_distance": 9})

"""The n-gram baseline: a probability distribution, equal to a slow one that reads like the formula."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_lab.data.ngram import NgramModel, heldout_bits_per_byte, main

VOCABULARY = 11
texts = st.lists(st.integers(0, VOCABULARY - 1), min_size=5, max_size=300)


class SlowKneserNey:
    """Interpolated modified Kneser-Ney by dictionaries, with the same discount estimates."""

    def __init__(self, tokens: list[int], order: int) -> None:
        self.order = order
        self.counts: dict[int, Counter[tuple[int, ...]]] = {}
        self.counts[order] = Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))
        for length in range(order - 1, 0, -1):
            before = {gram for gram in self.counts[length + 1]}
            self.counts[length] = Counter(gram[1:] for gram in before)

    def discount(self, length: int, count: int) -> float:
        n = Counter(self.counts[length].values())
        if count == 0:
            return 0.0
        if 0 in (n[1], n[2], n[3]):
            return 0.5
        y = n[1] / (n[1] + 2 * n[2])
        k = min(count, 3)
        return min(max(k - (k + 1) * y * n[k + 1] / n[k], 0.05), k - 0.05)

    def probability(self, context: tuple[int, ...], token: int, length: int) -> float:
        if length == 0:
            return 1 / VOCABULARY
        history = context[len(context) - (length - 1) :]
        lower = self.probability(context, token, length - 1)
        after = {gram: count for gram, count in self.counts[length].items() if gram[:-1] == history}
        total = sum(after.values())
        if total == 0:
            return lower
        count = after.get((*history, token), 0)
        removed = sum(self.discount(length, c) for c in after.values())
        return (count - self.discount(length, count) + removed * lower) / total


@settings(max_examples=60, deadline=None)
@given(
    text=texts,
    order=st.integers(1, 5),
    context=st.lists(st.integers(0, VOCABULARY - 1), min_size=4, max_size=6),
)
def test_sums_to_one(text: list[int], order: int, context: list[int]) -> None:
    model = NgramModel(np.array(text), VOCABULARY, order)
    everything = np.arange(VOCABULARY)
    for row in (context, text[:4]):
        probabilities = model.probabilities(np.tile(row, (VOCABULARY, 1)), everything)
        assert (probabilities > 0).all()
        assert math.isclose(probabilities.sum(), 1.0, rel_tol=1e-12)


@settings(max_examples=40, deadline=None)
@given(text=texts, order=st.integers(1, 4), seed=st.integers(0, 100))
def test_equals_the_formula(text: list[int], order: int, seed: int) -> None:
    fast, slow = NgramModel(np.array(text), VOCABULARY, order), SlowKneserNey(text, order)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(text) - 4, size=4)
    contexts = np.stack([*(np.array(text[s : s + 4]) for s in starts), rng.integers(0, VOCABULARY, 4)])
    tokens = rng.integers(0, VOCABULARY, size=5)
    expected = [
        slow.probability(tuple(c.tolist()), int(t), order) for c, t in zip(contexts, tokens, strict=True)
    ]
    np.testing.assert_allclose(fast.probabilities(contexts, tokens), expected, rtol=1e-10)


def test_longer_contexts_help_on_text_that_repeats() -> None:
    text = np.tile(np.array([1, 2, 3, 1, 2, 4, 5, 2, 6]), 40)
    model = NgramModel(text, VOCABULARY)
    assert model.probabilities(np.array([[5, 2, 6, 1, 2]]), np.array([3]))[0] > 0.95
    assert model.probabilities(np.array([[2, 3, 1, 2]]), np.array([4]))[0] > 0.95


def test_a_short_context_is_enough() -> None:
    model = NgramModel(np.array([1, 2, 3, 1, 2, 4]), VOCABULARY)
    empty = model.probabilities(np.zeros((VOCABULARY, 0), dtype=int), np.arange(VOCABULARY))
    assert math.isclose(empty.sum(), 1.0)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "order", "match"),
    [
        ([1, 2, 3], 4096, 6, "bits"),
        ([1, 2, 3], 3, 2, "below"),
        ([1], 4, 2, "at least 2"),
        ([1, 2], 4, 0, "order 0"),
    ],
)
def test_bad_input(tokens: list[int], vocabulary: int, order: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NgramModel(np.array(tokens), vocabulary, order)


def test_scores_of_a_corpus(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    five, one = heldout_bits_per_byte(corpus, ("prose",)), heldout_bits_per_byte(corpus, ("prose",), order=1)
    assert 1.0 < five["prose"] < one["prose"] < 8.0
    assert main([str(corpus), "--natural", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"]["prose"] == five["prose"]

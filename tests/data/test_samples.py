"""Rows of tokens made of texts and of a packed corpus."""

from pathlib import Path

import numpy as np
import pytest

from hydra_lab.data.document import Document
from hydra_lab.data.domains import DOMAINS
from hydra_lab.data.packing import PackedTokens
from hydra_lab.data.samples import Samples, samples_from_corpus, samples_from_texts, samples_from_tokens
from hydra_lab.data.tokenizer import train_tokenizer


def test_a_document_feeds_one_row_only() -> None:
    tokenizer = train_tokenizer(["abc def"], vocabulary_size=260)
    eos = tokenizer.eos_token_id
    a, b, c, x = (tokenizer.encode(letter)[0] for letter in "abcx")
    samples = samples_from_texts(
        {"one": ["a" * 10, "bb", "c"], "two": [Document("xxx", spans=((1, 3),))]}, tokenizer, num_tokens=4
    )
    assert samples.domains == ("one", "one", "two")
    np.testing.assert_array_equal(samples.tokens, [[a, a, a, a], [b, b, eos, c], [x, x, x, eos]])
    np.testing.assert_array_equal(samples.length, [4, 4, 4])
    np.testing.assert_array_equal(samples.scored[2], [False, True, True, False])
    assert samples.scored[:2].all()
    assert samples.take([2]).domains == ("two",)


def test_limits_and_short_rows() -> None:
    tokenizer = train_tokenizer(["abc"], vocabulary_size=260)
    samples = samples_from_texts({"one": ["a", "b", "c"]}, tokenizer, num_tokens=4)
    np.testing.assert_array_equal(samples.length, [4, 2])
    assert not samples.scored[1, 2:].any()
    assert len(samples_from_texts({"one": ["a", "b", "c"]}, tokenizer, num_tokens=4, num_samples=1)) == 1
    with pytest.raises(ValueError, match="no text"):
        samples_from_texts({}, tokenizer, num_tokens=4)
    with pytest.raises(ValueError, match="num_tokens=1"):
        samples_from_texts({"one": ["a"]}, tokenizer, num_tokens=1)


def test_held_out_rows_of_a_corpus(tmp_path: Path) -> None:
    for code, domain in enumerate(DOMAINS):
        tokens = np.arange(6, dtype=np.uint16) + 10 * code
        PackedTokens(tokens, np.ones(6, np.uint8), np.array([0, 2, 5])).save(tmp_path, f"{domain}.heldout")
    samples = samples_from_corpus(tmp_path, num_tokens=3)
    assert samples.domains[:2] == ("code", "code")
    np.testing.assert_array_equal(
        samples.tokens[:2], [[0, 1, 2], [5, 0, 0]]
    )  # the second document was cut off
    np.testing.assert_array_equal(samples.length[:2], [3, 1])


def test_rows_of_token_ids_as_they_are() -> None:
    samples = samples_from_tokens([(7, 8, 9), (5,)], domain="asked")
    np.testing.assert_array_equal(samples.tokens, [[7, 8, 9], [5, 0, 0]])
    np.testing.assert_array_equal(samples.length, [3, 1])
    np.testing.assert_array_equal(samples.scored, [[True] * 3, [True, False, False]])
    assert samples.domains == ("asked", "asked")
    for rows in ([], [(1,), ()]):
        with pytest.raises(ValueError, match="at least one token"):
            samples_from_tokens(rows)


def test_first_rows_of_each_domain() -> None:
    rows = samples_from_tokens([(1,), (2,), (3,), (4,)])
    samples = Samples(rows.tokens, rows.scored, rows.length, ("a", "b", "a", "a"))
    assert samples.first_of_each(2).tokens[:, 0].tolist() == [1, 2, 3]

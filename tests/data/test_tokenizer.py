"""The tokenizer loses nothing and keeps symbols and digits whole."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hydra_lab.data import load_tokenizer
from hydra_lab.data.tasks import SYMBOLS
from hydra_lab.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(corpus / "tokenizer")


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 4096
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.unk_token is None
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id]
    assert tokenizer("a", return_tensors=None).keys() == {"input_ids", "attention_mask"}


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_symbols_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for symbol in SYMBOLS:
        assert len(tokenizer.encode(symbol)) == 1
    line = "recall: b Q k D ? k D"
    assert tokenizer.tokenize(line) == [
        *("recall", ":", "Ġb", "ĠQ", "Ġk", "ĠD", "Ġ?", "Ġk", "ĠD"),
    ]


@settings(max_examples=100, deadline=None)
@given(number=st.integers(min_value=0))
def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast, number: int) -> None:
    assert tokenizer.tokenize(f"{number}") == list(str(number))
    assert tokenizer.tokenize(f"{number}+1=")[: len(str(number))] == list(str(number))


def test_same_texts_same_tokenizer() -> None:
    texts = [f"word{i % 7} other words {'ab' * (i % 5)}\n" for i in range(200)]
    first, second = (
        train_tokenizer(texts, symbols=(" k", " ?"), vocabulary_size=300).backend_tokenizer.to_str()
        for _ in range(2)
    )
    assert first == second


def test_vocabulary_too_small_for_the_symbols() -> None:
    with pytest.raises(ValueError, match="' abc' is not a single token"):
        train_tokenizer(["x"], symbols=(" abc",), vocabulary_size=259)

"""A small model on which every path has something to say, and lenses on it."""

import pytest
from torch import Tensor

from hydra_lab.lens import HydraLens
from hydra_lab.modeling import HydraForCausalLM
from tests.helpers import lively_model, random_ids


class WordTokenizer:
    """As much of a tokenizer as a lens asks for: a word is its length."""

    pad_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


@pytest.fixture(scope="session")
def model() -> HydraForCausalLM:
    return lively_model().requires_grad_(False)


@pytest.fixture
def lens(model: HydraForCausalLM) -> HydraLens:
    return HydraLens(model, WordTokenizer())


@pytest.fixture(scope="session")
def ids(model: HydraForCausalLM) -> Tensor:
    """[2, 21]: two whole chunks and a part of one."""
    return random_ids(model.config, 2, 21)

"""Small models and texts whose truth is known, for the calibration of studies and for their tests.

The texts are strings of letters and digits. The models have one block; what one of them does is written into its
weights by hand.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from hydra_lab.config import HydraConfig
from hydra_lab.data.samples import Samples
from hydra_lab.data.tokenizer import train_tokenizer
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.moe import MoEPath

LETTERS = "abcdefgh"
DIGITS = "12345678"
CHUNK_SIZE = 8
"""Tokens per routing decision of the planted models."""

_FEATURE = 0.5
_SPREAD = 0.25  # of the other channels; were the feature all there is, the experts could add nothing to it


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    return train_tokenizer(["abc 123"], vocabulary_size=258)


def token_ids(text: str) -> NDArray[np.int64]:
    """[len(text)] id of each character."""
    return np.array(byte_tokenizer().convert_tokens_to_ids(list(text)), dtype=np.int64)


def rows_of_samples(tokens_NL: NDArray[np.int64], domains: tuple[str, ...]) -> Samples:
    """Rows of equal length whose every token counts."""
    length = np.full(len(tokens_NL), tokens_NL.shape[1], dtype=np.int64)
    return Samples(tokens_NL, np.ones_like(tokens_NL, dtype=bool), length, domains)


def letters_and_digits(
    rng: np.random.Generator, *, num_samples: int, num_chunks: int, purity: float
) -> Samples:
    """Domains "letters" and "digits" by turns: each chunk is of the domain's own kind with chance `purity`, else of the
    other kind."""
    kind_N = np.arange(num_samples) % 2
    other_NC = rng.random((num_samples, num_chunks)) > purity
    kind_NL = (kind_N[:, None] ^ other_NC).repeat(CHUNK_SIZE, axis=1)
    drawn_NL = rng.integers(len(LETTERS), size=kind_NL.shape)
    tokens_NL = np.where(kind_NL == 0, token_ids(LETTERS)[drawn_NL], token_ids(DIGITS)[drawn_NL])
    return rows_of_samples(tokens_NL, tuple(("letters", "digits")[kind] for kind in kind_N))


def texts_of_two_tastes(rng: np.random.Generator, *, num_samples: int, num_chunks: int) -> Samples:
    """Texts whose domain ("one" or "two", as many of each) has nothing to do with what they hold.

    Each text has a taste of its own: its chunks are of the first or of the second half of the letters and digits, so
    that the chunks of a text resemble each other. Letters and digits are mixed evenly, whatever the half.
    """
    taste_N1 = rng.beta(0.5, 0.5, size=(num_samples, 1))
    half_NL = (rng.random((num_samples, num_chunks)) < taste_N1).repeat(CHUNK_SIZE, axis=1)
    drawn_NL = rng.integers(len(LETTERS) // 2, size=half_NL.shape) + np.where(half_NL, len(LETTERS) // 2, 0)
    is_letter_NL = rng.random(half_NL.shape) < 0.5
    tokens_NL = np.where(is_letter_NL, token_ids(LETTERS)[drawn_NL], token_ids(DIGITS)[drawn_NL])
    domains = np.array(["one", "two"] * (num_samples // 2))
    return rows_of_samples(tokens_NL, tuple(map(str, rng.permutation(domains))))


def one_block_model(seed: int, *, feature: str, other: str, **fields: object) -> HydraForCausalLM:
    """A one-block model with experts whose embedding knows one thing for certain: channel 0 is above 0 at the tokens
    of `feature`, below 0 at those of `other`, and 0 elsewhere."""
    torch.manual_seed(seed)
    config = HydraConfig.from_preset(
        "nano",
        **{
            "vocab_size": len(byte_tokenizer()),
            "num_hidden_layers": 1,
            "attention_every": 0,
            "moe_layers": [0],
            "moe_top_k": 1,
            "moe_chunk_size": CHUNK_SIZE,
            "workspace_layers": [],
            "memory_layers": [],
            **fields,
        },
    )
    model = HydraForCausalLM(config).eval()
    with torch.no_grad():
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding.normal_(std=_SPREAD)
        embedding[:, 0] = 0.0
        embedding[token_ids(feature), 0] = _FEATURE
        embedding[token_ids(other), 0] = -_FEATURE
    return model


def taste_model(seed: int, **fields: object) -> HydraForCausalLM:
    """A `one_block_model` that knows the taste of `texts_of_two_tastes`: 1 at the first half of the alphabet."""
    first, second = (
        "".join(text[part] for text in (LETTERS, DIGITS))
        for part in (slice(0, len(LETTERS) // 2), slice(len(LETTERS) // 2, None))
    )
    return one_block_model(seed, feature=first, other=second, **fields)


def tie_experts(
    model: HydraForCausalLM, feature: tuple[int, ...], other: tuple[int, ...], *, strength: float = 1.0
) -> None:
    """Route chunks that begin with the feature of `one_block_model` to the experts `feature`, those that begin with the
    other to the experts `other`, and let all of them make the tokens of their own kind likelier.

    Args:
        strength: of what an expert adds to channel 0.
    """
    moe = model.get_submodule("model.layers.0.moe")
    assert isinstance(moe, MoEPath)
    hidden = moe.gate_up_proj.shape[1] // 2
    with torch.no_grad():
        moe.router.weight.zero_()
        for experts, sign in ((feature, 1.0), (other, -1.0)):
            for expert in experts:
                moe.router.weight[expert, 0] = 5.0 * sign
                moe.gate_up_proj[expert] = 0.0
                moe.gate_up_proj[expert, 0, 0] = moe.gate_up_proj[expert, hidden, 0] = sign  # silu(|x|) |x|
                moe.down_proj[expert, 0, 0] = sign * strength


def forget_at_once(model: HydraForCausalLM) -> None:
    """Let the state of the ssm decay within a token, so that nothing of the model tells how far into a text it is."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ssm.A_log"):
                parameter.fill_(float(np.log(16.0)))
            elif name.endswith("ssm.dt_bias"):
                parameter.fill_(2.0)  # with A = -16 a state keeps e^-34 of itself

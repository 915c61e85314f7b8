"""Next-token losses and greedy hits of many token sequences of unequal length, in batches.

A Hydra is causal, so sequences are padded on the right and what stands there is not looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What a model says of one sequence of n tokens.

    Attributes:
        loss: [n - 1] negative log-likelihood of tokens 1 to n - 1 given those before, in nats.
        hit: [n - 1] whether each of those tokens is the most likely one.
    """

    loss: NDArray[np.float64]
    hit: NDArray[np.bool_]


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences in groups of similar length, each of at most `max_tokens` padded tokens.

    A sequence longer than that makes a group of its own. Longest first.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Sequences as one [B, L] tensor, zeros on the right."""
    tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return tokens.to(device)


@torch.no_grad()
def score(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, max_tokens: int = 8192, bf16: bool = False
) -> list[TokenScores]:
    """Score sequences of at least one token each, in the order in which they are given.

    Args:
        model: a causal language model in evaluation mode.
        max_tokens: tokens per batch, padding included.
        bf16: compute under bfloat16 autocast.
    """
    scores: list[TokenScores | None] = [None] * len(sequences)
    device = next(model.parameters()).device
    for group in batches([len(sequence) for sequence in sequences], max_tokens):
        tokens = padded([sequences[index] for index in group], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        targets = tokens[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        hit = (logits.argmax(dim=-1) == targets).cpu().numpy()
        loss = loss.double().cpu().numpy()
        for row, index in enumerate(group):
            last = len(sequences[index]) - 1
            scores[index] = TokenScores(loss[row, :last].copy(), hit[row, :last].copy())
    return [found for found in scores if found is not None]


@dataclass(frozen=True)
class Stretch:
    """A window of a document and the first of its tokens that it is scored on."""

    tokens: tuple[int, ...]
    begin: int


def stretches(tokens: Sequence[int], window: int, stride: int) -> Iterator[Stretch]:
    """Cut a document into overlapping windows so that each token but the first is scored exactly once.

    After the first window a token has at least `window - stride` tokens before it.

    Raises:
        ValueError: unless 0 < stride < window.
    """
    if not 0 < stride < window:
        raise ValueError(f"stride={stride} must lie between 0 and window={window}")
    scored = 1
    start = 0
    while scored < len(tokens):
        end = min(start + window, len(tokens))
        yield Stretch(tuple(tokens[start:end]), scored - start)
        scored = end
        start += stride

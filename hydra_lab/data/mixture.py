"""Training windows drawn from the packed domains by weight."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hydra_lab.data.domains import DOMAINS
from hydra_lab.data.packing import PackedTokens

IGNORED_LABEL = -100

# The plane's most uniform additive sequence (powers of the inverse plastic number, x^3 = x + 1): any stretch of items
# takes the domains close to their weights and spreads its windows evenly over each domain's tokens.
_STEP_DOMAIN = 0.7548776662466927
_STEP_OFFSET = 0.5698402909980532


class Window(TypedDict):
    """One training sample.

    `input_ids` [L] int64; `labels` [L] int64, equal to `input_ids` where the loss counts the token and -100
    elsewhere (not shifted: the model shifts); `domain` the index of the sample's domain in `DOMAINS`.
    """

    input_ids: Tensor
    labels: Tensor
    domain: int


class MixtureDataset(Dataset[Window]):
    """Map-style windows of one domain each; item i depends on the seed, the weights and i only.

    A window starts at a document's first token where the document fits into a window, otherwise anywhere in it.

    Args:
        corpus_dir: folder that `build_corpus` wrote.
        sequence_length: tokens per window, L.
        weights: domain -> non-negative share of the windows; they need not sum to 1.
        seed: chooses the sequence of windows.
        length: number of items, for samplers; the windows themselves never run out.
        split: "train", or "heldout" for the held-out documents.

    Raises:
        ValueError: for a weight that is negative, a domain the corpus lacks or one shorter than a window.
    """

    def __init__(
        self,
        corpus_dir: str | Path,
        sequence_length: int,
        weights: Mapping[str, float],
        seed: int,
        *,
        length: int = 1_000_000,
        split: str = "train",
    ) -> None:
        if split not in ("train", "heldout"):
            raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
        self.sequence_length = sequence_length
        self.length = length
        self._shift = np.random.default_rng(seed).random(2)
        self._packed: list[PackedTokens] = []
        self.domains = DOMAINS
        for domain in DOMAINS:
            packed = PackedTokens.open(corpus_dir, domain if split == "train" else f"{domain}.heldout")
            if len(packed.tokens) < sequence_length:
                raise ValueError(
                    f"{domain} has {len(packed.tokens)} tokens, fewer than a window of {sequence_length}"
                )
            self._packed.append(packed)
        self.set_weights(weights)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Changes the shares of the domains from the next item on; a domain that is not named gets none."""
        unknown = sorted(set(weights) - set(self.domains))
        if unknown:
            raise ValueError(f"unknown domains {unknown}, the corpus has {list(self.domains)}")
        shares = np.array([float(weights.get(domain, 0.0)) for domain in self.domains])
        if not np.all(np.isfinite(shares)) or np.any(shares < 0) or shares.sum() == 0:
            raise ValueError(f"weights must be non-negative, finite and not all zero, got {dict(weights)}")
        self.weights = dict(zip(self.domains, (shares / shares.sum()).tolist(), strict=True))
        self._bounds = np.cumsum(shares / shares.sum())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        domain_point = (self._shift[0] + index * _STEP_DOMAIN) % 1.0
        offset_point = (self._shift[1] + index * _STEP_OFFSET) % 1.0
        domain = min(int(np.searchsorted(self._bounds, domain_point, side="right")), len(self.domains) - 1)
        packed = self._packed[domain]
        last = len(packed.tokens) - self.sequence_length
        offset = int(offset_point * (last + 1))
        document = int(np.searchsorted(packed.starts, offset, side="right")) - 1
        start = int(packed.starts[document])
        end = int(packed.starts[document + 1]) if document + 1 < len(packed.starts) else len(packed.tokens)
        if end - start <= self.sequence_length:
            offset = start
        window = slice(offset, offset + self.sequence_length)
        input_ids = torch.from_numpy(packed.tokens[window].astype(np.int64))
        supervised = torch.from_numpy(packed.mask[window].astype(bool))
        return {
            "input_ids": input_ids,
            "labels": input_ids.where(supervised, IGNORED_LABEL),
            "domain": domain,
        }

"""Rows of tokens to evaluate or record a model on: one domain per row, so that a row is an independent
sample."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hydra_lab.data.document import Document
from hydra_lab.data.domains import DOMAINS
from hydra_lab.data.packing import PackedTokens, pack


@dataclass(frozen=True, eq=False)
class Samples:
    """Rows of tokens, padded on the right.

    Attributes:
        tokens: [N, L] int64 token ids; 0 past a row's end.
        scored: [N, L] bool, True where the loss counts the token as a target.
        length: [N] int64 tokens of each row.
        domains: [N] name of each row's domain.
    """

    tokens: NDArray[np.int64]
    scored: NDArray[np.bool_]
    length: NDArray[np.int64]
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.length)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Samples":
        """The given rows, in the given order."""
        rows = np.asarray(rows, dtype=np.int64)
        domains = tuple(self.domains[row] for row in rows)
        return Samples(self.tokens[rows], self.scored[rows], self.length[rows], domains)

    def first_of_each(self, num_samples: int) -> "Samples":
        """The first `num_samples` rows of every domain."""
        seen: dict[str, int] = {}
        rows: list[int] = []
        for row, domain in enumerate(self.domains):
            seen[domain] = seen.get(domain, 0) + 1
            if seen[domain] <= num_samples:
                rows.append(row)
        return self.take(rows)


def samples_from_texts(
    texts_by_domain: Mapping[str, Iterable[str | Document]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    num_samples: int | None = None,
) -> Samples:
    """Rows of at most `num_tokens` tokens from texts.

    A row starts with a document and takes further ones, each closed by the end-of-text token as in training,
    until it is full; what does not fit is left out. So a document never feeds two rows.

    Args:
        texts_by_domain: domain -> its texts; every token of a plain text is scored, of a `Document` those it
            marks.
        tokenizer: with an end-of-text token.
        num_tokens: L.
        num_samples: most rows per domain; None takes all.

    Raises:
        TypeError: the tokenizer is not a fast one (the marks of a `Document` need character offsets).
        ValueError: there is no text.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(f"tokenizer must be a PreTrainedTokenizerFast, got {type(tokenizer).__name__}")
    packed = {
        domain: pack((text if isinstance(text, Document) else Document(text) for text in texts), tokenizer)
        for domain, texts in ((name, list(each)) for name, each in texts_by_domain.items())
        if texts
    }
    return _samples(packed, num_tokens, num_samples)


def samples_from_tokens(rows: Sequence[Sequence[int]], domain: str = "") -> Samples:
    """Rows of token ids as they are, all of one domain and all scored.

    Raises:
        ValueError: there is no row, or one of them is empty.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("every row needs at least one token, and there must be one row")
    length = np.array([len(row) for row in rows], dtype=np.int64)
    inside = np.arange(length.max()) < length[:, None]
    tokens = np.zeros(inside.shape, dtype=np.int64)
    tokens[inside] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return Samples(tokens, inside, length, (domain,) * len(rows))


def samples_from_corpus(
    corpus_dir: str | Path, *, num_tokens: int, num_samples: int | None = None
) -> Samples:
    """Rows of the held-out documents of a corpus that `build_corpus` wrote; else as `samples_from_texts`."""
    packed = {domain: PackedTokens.open(corpus_dir, f"{domain}.heldout") for domain in DOMAINS}
    return _samples(packed, num_tokens, num_samples)


def _samples(packed: Mapping[str, PackedTokens], num_tokens: int, num_samples: int | None) -> Samples:
    if num_tokens < 2:
        raise ValueError(f"num_tokens={num_tokens} must be at least 2: a loss needs a next token")
    rows: list[tuple[str, NDArray[np.int64], NDArray[np.bool_]]] = []
    for domain, each in packed.items():
        start_of_row = 0
        found = 0
        while start_of_row < len(each.tokens) and (num_samples is None or found < num_samples):
            end = min(start_of_row + num_tokens, len(each.tokens))
            rows.append(
                (domain, each.tokens[start_of_row:end].astype(np.int64), each.mask[start_of_row:end] > 0)
            )
            found += 1
            later = np.searchsorted(each.starts, end)
            start_of_row = int(each.starts[later]) if later < len(each.starts) else len(each.tokens)
    if not rows:
        raise ValueError("there is no text to make samples of")
    size = max(len(tokens) for _, tokens, _ in rows)
    samples = Samples(
        tokens=np.zeros((len(rows), size), dtype=np.int64),
        scored=np.zeros((len(rows), size), dtype=bool),
        length=np.array([len(tokens) for _, tokens, _ in rows], dtype=np.int64),
        domains=tuple(domain for domain, _, _ in rows),
    )
    for row, (_, tokens, scored) in enumerate(rows):
        samples.tokens[row, : len(tokens)] = tokens
        samples.scored[row, : len(tokens)] = scored
    return samples

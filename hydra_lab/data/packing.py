"""Documents to the two flat arrays that training reads: token ids and which of them the loss counts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from hydra_lab.data.document import Document

_BATCH = 1024


@dataclass(frozen=True)
class PackedTokens:
    """Documents one after the other, each closed by the end-of-text token.

    Attributes:
        tokens: [N] uint16 token ids.
        mask: [N] uint8, 1 where the loss counts the token as a target.
        starts: [D] int64 index of each document's first token.
    """

    tokens: np.ndarray
    mask: np.ndarray
    starts: np.ndarray

    def save(self, directory: Path, name: str) -> list[Path]:
        """Writes `<name>.tokens.npy`, `<name>.mask.npy` and `<name>.starts.npy`; returns their paths."""
        paths: list[Path] = []
        for part in ("tokens", "mask", "starts"):
            paths.append(directory / f"{name}.{part}.npy")
            np.save(paths[-1], getattr(self, part))
        return paths

    @classmethod
    def open(cls, directory: str | Path, name: str) -> "PackedTokens":
        """Memory-maps what `save` wrote."""
        return cls(
            *(
                np.load(Path(directory) / f"{name}.{part}.npy", mmap_mode="r")
                for part in ("tokens", "mask", "starts")
            )
        )


def _document_mask(offsets: Sequence[tuple[int, int]], document: Document) -> np.ndarray:
    # offsets: character range of each token. A token is supervised where its first character is: symbols and answers
    # are cut so that their tokens start at a span's first character.
    starts = np.fromiter((start for start, _ in offsets), dtype=np.int64, count=len(offsets))
    if document.spans is None:
        return np.ones(len(starts) + 1, dtype=np.uint8)
    mask = np.zeros(len(starts) + 1, dtype=np.uint8)  # the end of a task is no part of its answer
    bounds = np.asarray(document.spans, dtype=np.int64).reshape(-1)
    mask[:-1] = np.searchsorted(bounds, starts, side="right") % 2
    return mask


def shared_share(documents: PackedTokens, other: PackedTokens, *, length: int = 16) -> np.ndarray:
    """How much of each document stands word for word in other text.

    Args:
        documents: the documents to judge.
        other: the text to look in.
        length: tokens of a run that counts as the same.

    Returns:
        [D] share of the document's runs of `length` tokens that occur in `other`; 0 for a shorter document.
    """

    def runs(tokens_N: np.ndarray) -> np.ndarray:
        # A 64-bit polynomial hash (it wraps around on purpose) stands for each run.
        tokens = tokens_N.astype(np.uint64)
        hashed = np.zeros(max(0, len(tokens) - length + 1), dtype=np.uint64)
        for offset in range(length):
            mixed = (tokens[offset : offset + len(hashed)] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            hashed = hashed * np.uint64(0x100000001B3) + mixed
        return hashed

    found = np.isin(runs(documents.tokens), runs(other.tokens))
    counted = np.concatenate([[0], np.cumsum(found)])
    ends = np.append(documents.starts[1:], len(documents.tokens))
    first = np.minimum(documents.starts, len(found))
    last = np.maximum(np.minimum(ends - length + 1, len(found)), first)
    return (counted[last] - counted[first]) / np.maximum(last - first, 1)


def pack(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, *, max_tokens: int | None = None
) -> PackedTokens:
    """Tokenizes and joins documents, stopping at the first one that reaches `max_tokens` (it is kept whole).

    Args:
        documents: finite, or endless when `max_tokens` is given.
        tokenizer: its end-of-text token closes each document.
        max_tokens: smallest number of tokens at which to stop; `None` takes every document.

    Raises:
        ValueError: where the vocabulary does not fit into 16 bits.
    """
    if len(tokenizer) > 1 << 16:
        raise ValueError(f"token ids are stored in 16 bits, the vocabulary has {len(tokenizer)} tokens")
    eos = tokenizer.eos_token_id
    backend = tokenizer.backend_tokenizer
    source: Iterator[Document] = iter(documents)
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    starts: list[int] = []
    total = 0
    while (max_tokens is None or total < max_tokens) and (batch := list(islice(source, _BATCH))):
        encodings = backend.encode_batch([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            starts.append(total)
            tokens.append(np.asarray([*encoding.ids, eos], dtype=np.uint16))
            masks.append(_document_mask(encoding.offsets, document))
            total += len(tokens[-1])
            if max_tokens is not None and total >= max_tokens:
                break
    return PackedTokens(
        tokens=np.concatenate(tokens), mask=np.concatenate(masks), starts=np.asarray(starts, dtype=np.int64)
    )

"""The baseline that a trained model must beat: an n-gram model with interpolated modified Kneser-Ney smoothing.

    python -m hydra_lab.data.ngram CORPUS --json

Notation: V vocabulary size, N tokens, n order. For a context h of k tokens and a token w,

    p_k(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + gamma(h) p_{k-1}(w | h without its first token)

with gamma(h) the discounted mass over c(h .), so that p sums to 1 over w; p_{-1} is uniform, 1/V. Below the highest
order c counts the distinct tokens that precede (continuation counts). A context that was never seen gives its whole
mass to the shorter one. The discounts D1, D2, D3+ of each order are Chen & Goodman's estimates (1999, eq. 26).

An n-gram is packed into one 64-bit integer, so that counting is a sort and reading is a binary search.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hydra_lab.data.domains import DOMAINS, NATURAL_DOMAINS
from hydra_lab.data.packing import PackedTokens

ORDER = 5


@dataclass(frozen=True)
class _Level:
    """The counts of one order.

    Attributes:
        grams: [G] sorted packed n-grams.
        counts: [G] their counts (continuation counts below the highest order).
        contexts: [H] sorted packed contexts, the n-grams without their last token.
        totals: [H] sum of the counts of the context's n-grams.
        backoff: [H] discounted mass, gamma(h) c(h .).
        discounts: [4] discount of an n-gram seen 0, 1, 2, and 3 or more times.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray
    discounts: np.ndarray


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each wanted value among sorted keys (0 where it is absent), and whether it is there."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[place] == wanted
    return np.where(found, place, 0), found


def _discounts(counts: np.ndarray) -> np.ndarray:
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:
        # Too little text for the estimate: absolute discounting by one half.
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    estimates = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # A discount may not exceed the smallest count that it applies to, nor fall to nothing.
    return np.concatenate([[0.0], np.clip(estimates, 0.05, [0.95, 1.95, 2.95])])


class NgramModel:
    """An interpolated modified Kneser-Ney model over token ids.

    Args:
        tokens: [N] training token ids; documents follow one another, closed by their end-of-text token.
        vocabulary_size: V; every id lies below it.
        order: longest n-gram, at least 1.

    Raises:
        ValueError: where a token lies outside the vocabulary, the text is shorter than an n-gram, or an n-gram of
            this order and vocabulary does not fit into 63 bits.
    """

    def __init__(self, tokens: np.ndarray, vocabulary_size: int, order: int = ORDER) -> None:
        self.bits = max(1, (vocabulary_size - 1).bit_length())
        if order < 1 or order * self.bits > 63:
            raise ValueError(
                f"order {order} over {vocabulary_size} tokens needs {order * self.bits} bits, 63 fit"
            )
        if len(tokens) < order or int(tokens.max()) >= vocabulary_size:
            raise ValueError(f"need at least {order} tokens, all below the vocabulary size {vocabulary_size}")
        self.vocabulary_size = vocabulary_size
        self.order = order
        self._levels: list[_Level] = []
        packed = self._pack(np.asarray(tokens, dtype=np.int64), order)
        grams, counts = np.unique(packed, return_counts=True)
        for length in range(order, 0, -1):
            self._levels.insert(0, self._level(grams, counts.astype(np.int64)))
            if length > 1:
                # The number of distinct tokens before each shorter n-gram. The text's first n-gram has none
                # before it and is not counted unless it occurs again.
                grams, counts = np.unique(grams & ((1 << self.bits * (length - 1)) - 1), return_counts=True)

    def _pack(self, tokens_N: np.ndarray, length: int) -> np.ndarray:
        """[N - length + 1] the n-gram that ends at each position from `length - 1` on; oldest token highest."""
        size = len(tokens_N) - length + 1
        packed = np.zeros(size, dtype=np.int64)
        for offset in range(length):
            packed = (packed << self.bits) | tokens_N[offset : offset + size]
        return packed

    def _level(self, grams: np.ndarray, counts: np.ndarray) -> _Level:
        discounts = _discounts(counts)
        contexts, first = np.unique(grams >> self.bits, return_index=True)
        totals = np.add.reduceat(counts, first)
        backoff = np.add.reduceat(discounts[np.minimum(counts, 3)], first)
        return _Level(grams, counts, contexts, totals, backoff, discounts)

    def probabilities(self, contexts_QK: np.ndarray, tokens_Q: np.ndarray) -> np.ndarray:
        """Probability of each token after its context.

        Args:
            contexts_QK: [Q, K] preceding token ids, the nearest last; any K, of which the last order - 1 count.
            tokens_Q: [Q] token ids.

        Returns:
            [Q] float64 probabilities; over all V tokens of one context they sum to 1.
        """
        contexts_QK = np.asarray(contexts_QK, dtype=np.int64)
        tokens_Q = np.asarray(tokens_Q, dtype=np.int64)
        probability = np.full(len(tokens_Q), 1.0 / self.vocabulary_size)
        context = np.zeros(len(tokens_Q), dtype=np.int64)
        for used, level in enumerate(self._levels):
            if used > contexts_QK.shape[1]:
                break
            if used:
                context = context | (contexts_QK[:, -used] << self.bits * (used - 1))
            probability = self._interpolate(level, context, tokens_Q, probability)
        return probability

    def _interpolate(
        self, level: _Level, context_Q: np.ndarray, tokens_Q: np.ndarray, lower_Q: np.ndarray
    ) -> np.ndarray:
        place, known = _find(level.contexts, context_Q)
        gram, found = _find(level.grams, (context_Q << self.bits) | tokens_Q)
        count = np.where(found, level.counts[gram], 0)
        kept = count - level.discounts[np.minimum(count, 3)]
        higher = (kept + level.backoff[place] * lower_Q) / level.totals[place]
        return np.where(known, higher, lower_Q)

    def bits_of_documents(self, packed: PackedTokens) -> float:
        """Total code length in bits of packed documents, their end-of-text tokens included.

        Each document is read on its own, after an end-of-text token as in training.
        """
        eos = int(packed.tokens[-1])
        total = 0.0
        ends = [*packed.starts[1:].tolist(), len(packed.tokens)]
        for start, end in zip(packed.starts.tolist(), ends, strict=True):
            document = np.asarray(packed.tokens[start:end], dtype=np.int64)
            padded = np.concatenate([np.full(self.order - 1, eos), document])
            contexts = np.lib.stride_tricks.sliding_window_view(padded, self.order)[:, :-1]
            total -= float(np.log2(self.probabilities(contexts, document)).sum())
        return total


def heldout_bits_per_byte(
    corpus_dir: str | Path, domains: Sequence[str] = DOMAINS, order: int = ORDER
) -> dict[str, float]:
    """Bits per UTF-8 byte of held-out text, each domain under the model of its own training text.

    A domain's own text is the harder baseline than all domains together.
    """
    directory = Path(corpus_dir)
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    result: dict[str, float] = {}
    for domain in domains:
        model = NgramModel(PackedTokens.open(directory, domain).tokens, manifest["vocabulary"], order)
        bits = model.bits_of_documents(PackedTokens.open(directory, f"{domain}.heldout"))
        result[domain] = bits / manifest["domains"][domain]["held_out"]["bytes"]
        assert math.isfinite(result[domain])
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m hydra_lab.data.ngram`."""
    parser = argparse.ArgumentParser(
        prog="python -m hydra_lab.data.ngram", description="Score the n-gram baseline."
    )
    parser.add_argument("corpus", type=Path, help="folder that hydra_lab.data.build wrote")
    parser.add_argument("--order", type=int, default=ORDER, help=f"longest n-gram (default {ORDER})")
    parser.add_argument("--natural", action="store_true", help="the natural domains only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    scores = heldout_bits_per_byte(
        options.corpus, NATURAL_DOMAINS if options.natural else DOMAINS, options.order
    )
    if options.json:
        print(json.dumps({"order": options.order, "bits_per_byte": scores}))
    else:
        for domain, score in scores.items():
            print(f"{domain:12s} {score:.4f} bits per byte")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

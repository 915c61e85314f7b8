"""What the study asks of the model: one token is replaced, and what changes after it is followed.

Shape suffixes: N texts, D distances, H ssm heads of all blocks, M distances at which states are compared, L
    positions,
T tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_lab import metrics
from hydra_lab.cache import HydraCache
from hydra_lab.capture import record
from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing.continuation import MEMORIES, divergence, read_on, with_memory_of
from hydra_lab.taps import StateSummary

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measurement:
    """How a replaced token changes what comes after it.

    A distance counts tokens from the replaced one: at distance 0 stands the replaced token itself.

    Attributes:
        heads: [H] (block, head) of every ssm head.
        window: tokens that the attention's window shows; 0 for a model without attention.
        settled: the distance at which memories are exchanged: the ssm's convolution has taken the token in.
        decay_half_life: [H] tokens, ln 2 over the mean decay rate that the tap `ssm.state` reports after the token.
        state_distance: [M] distances at which states are compared; the first is `settled - 1`.
        state_change: [N, M, H] Frobenius norm of the difference between the two runs' states.
        output_change: [N, D] divergence of the next-token distribution between the two runs, nats, at
            distances 0, 1, ..
        head_change: [H, N, D - settled] the same where only this head's state comes from the run with the replaced
            token, at distances settled, settled + 1, ..
        kept_by: path -> [N, D - settled] the same where the path's memory alone comes from the run with the
            replaced token.
        left_without: path -> [N, D - settled] the same where all but the path's memory come from it.
    """

    heads: tuple[tuple[int, int], ...]
    window: int
    settled: int
    decay_half_life: Floats
    state_distance: NDArray[np.int64]
    state_change: Floats
    output_change: Floats
    head_change: Floats
    kept_by: Mapping[str, Floats]
    left_without: Mapping[str, Floats]

    @property
    def later(self) -> NDArray[np.int64]:
        """[D - settled] the distances of `head_change`, `kept_by` and `left_without`."""
        return np.arange(self.settled, self.output_change.shape[1])

    @property
    def far(self) -> NDArray[np.bool_]:
        """[D - settled] those beyond the attention's window, where the token can only be remembered."""
        return self.later >= max(self.window, self.settled)


def choose_texts(samples: Samples, *, num_samples: int, size: int, seed: int) -> NDArray[np.int64]:
    """[N, size] first tokens of texts that are long enough, the domains by turns, drawn at random within each.

    Raises:
        ValueError: fewer than two texts are that long.
    """
    rng = np.random.default_rng(seed)
    waiting = {
        domain: rng.permutation([
            row for row, label in enumerate(samples.domains) if label == domain and samples.length[row] >= size
        ]).tolist()
        for domain in dict.fromkeys(samples.domains)
    }  # fmt: skip
    chosen: list[int] = []
    while len(chosen) < num_samples and any(waiting.values()):
        chosen += [rows.pop() for rows in waiting.values() if rows]
    if len(chosen) < 2:
        raise ValueError(
            f"{len(chosen)} of {len(samples)} samples have the {size} tokens that context and horizon ask "
            f"for; the longest has {int(samples.length.max())}, and the study needs at least 2"
        )
    return samples.tokens[chosen[:num_samples], :size]


def replacements(texts_NL: NDArray[np.int64], position: int, seed: int) -> NDArray[np.int64]:
    """[N] another token of the same text, to stand in the place of the one at `position`.

    Raises:
        ValueError: a text is one token over and over.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros(len(texts_NL), dtype=np.int64)
    for row, text in enumerate(texts_NL):
        others = text[text != text[position]]
        if len(others) == 0:
            raise ValueError(f"text {row} is one token over and over, so nothing can replace it")
        drawn[row] = rng.choice(others)
    return drawn


def measure(
    model: HydraForCausalLM,
    texts_NL: NDArray[np.int64],
    *,
    context: int,
    batch_size: int,
    seed: int,
    progress: Callable[[str], None] = lambda _line: None,
) -> Measurement:
    """Replace the token at index `context` of each text and follow the change to the text's end."""
    other_N = replacements(texts_NL, context, seed)
    parts = []
    for start in range(0, len(texts_NL), batch_size):
        rows = slice(start, start + batch_size)
        progress(f"texts {start + 1} to {min(start + batch_size, len(texts_NL))} of {len(texts_NL)}")
        parts.append(_measure_batch(model, torch.from_numpy(texts_NL[rows]), other_N[rows], context))
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts], axis=axis)
        for name, axis in (("state_change", 0), ("output_change", 0), ("head_change", 1))
    }
    first = parts[0]
    rates = np.array([1 / part.decay_half_life for part in parts])
    weight = np.array([len(part.output_change) for part in parts])
    with np.errstate(divide="ignore"):
        half_life_H = 1 / np.average(rates, axis=0, weights=weight)
    return Measurement(
        heads=first.heads,
        window=first.window,
        settled=first.settled,
        decay_half_life=half_life_H,
        state_distance=first.state_distance,
        kept_by={path: np.concatenate([part.kept_by[path] for part in parts]) for path in first.kept_by},
        left_without={
            path: np.concatenate([part.left_without[path] for part in parts]) for path in first.kept_by
        },
        **joined,
    )


def _measure_batch(
    model: HydraForCausalLM, texts_NL: Tensor, other_N: NDArray[np.int64], context: int
) -> Measurement:
    config = model.config
    settled = min(config.ssm_conv_kernel, texts_NL.shape[1] - context - 1)
    replaced_NL = texts_NL.clone()
    replaced_NL[:, context] = torch.from_numpy(other_N)
    _, before = read_on(model, texts_NL[:, :context], last_only=True)

    # Pieces that double, so that the states are seen at distances that lie evenly on a log scale.
    num_tokens = texts_NL.shape[1] - context
    ends = [settled]
    while ends[-1] < num_tokens:
        ends.append(min(2 * ends[-1], num_tokens))
    runs = [_read_in_pieces(model, ids[:, context:], before, ends) for ids in (texts_NL, replaced_NL)]
    (intact_NTV, intact), (changed_NTV, changed) = runs
    state_change = [_state_difference(mine, theirs) for mine, theirs in zip(intact, changed, strict=True)]

    # In one piece, as the runs that are compared with it: other pieces are other roundings, which a router may magnify.
    rest_NT = texts_NL[:, context + settled :]
    later_NTV, _ = read_on(model, rest_NT, intact[0])

    def change_with(memory: HydraCache) -> Floats:
        return divergence(later_NTV, read_on(model, rest_NT, memory)[0])

    heads = tuple(
        (layer, head) for layer in config.layers_with("ssm") for head in range(config.ssm_num_heads)
    )
    return Measurement(
        heads=heads,
        window=config.attention_window if config.attention_layers else 0,
        settled=settled,
        decay_half_life=_decay_half_lives(model, texts_NL, context),
        state_distance=np.array(ends) - 1,
        state_change=np.stack(state_change, axis=1),
        output_change=divergence(intact_NTV, changed_NTV),
        head_change=np.stack([
            change_with(with_memory_of(intact[0], changed[0], "ssm", layer=layer, head=head))
            for layer, head in heads
        ]),
        kept_by={
            path: change_with(with_memory_of(intact[0], changed[0], path)) for path in _memories(model)
        },
        left_without={
            path: change_with(with_memory_of(changed[0], intact[0], path)) for path in _memories(model)
        },
    )  # fmt: skip


def _memories(model: HydraForCausalLM) -> tuple[str, ...]:
    return tuple(path for path in MEMORIES if model.config.layers_with(path))


def _read_in_pieces(
    model: HydraForCausalLM, ids_NT: Tensor, before: HydraCache, ends: list[int]
) -> tuple[Tensor, list[HydraCache]]:
    """Logits [N, T, V] of all pieces, and what the model kept after each."""
    logits, kept = [], []
    cache, start = before, 0
    for end in ends:
        piece_logits, cache = read_on(model, ids_NT[:, start:end], cache)
        logits.append(piece_logits)
        kept.append(cache)
        start = end
    return torch.cat(logits, dim=1), kept


def _state_difference(first: HydraCache, second: HydraCache) -> Floats:
    """[N, H] Frobenius norm of the difference of every head's state, block after block."""
    norms = [
        torch.linalg.matrix_norm(mine["ssm"].state - theirs["ssm"].state)
        for mine, theirs in zip(first.states, second.states, strict=True)
    ]
    return torch.cat(norms, dim=1).double().cpu().numpy()


def _decay_half_lives(model: HydraForCausalLM, texts_NL: Tensor, context: int) -> Floats:
    """[H] half-life in tokens at the mean decay rate of the tokens after index `context`."""
    recording = record(model, texts_NL, taps="ssm.state")
    length = np.full(len(texts_NL), texts_NL.shape[1] - context - 1)
    half_lives = []
    for layer, summary in recording.by_layer("ssm.state").items():
        assert isinstance(summary, StateSummary)
        seen = metrics.StateRecord(
            layer=layer,
            norms=summary.norms.cpu().numpy(),
            decay=summary.decay[:, context + 1 :].cpu().numpy(),
            length=length,
            chunk_size=model.config.ssm_chunk_size,
        )
        half_lives.append(metrics.half_life(seen).half_life)
    return np.concatenate(half_lives)

"""Taps: every decision of the model is the output of an identity module, so it can be read and overwritten.

Shape suffixes used here and in `hydra_lab.nn`:

    B  rows of the batch        L  positions (a row's own tokens, counted from 0 whatever the padding)
    C  chunks                   E  experts                 K  entries of a top-k
    S  workspace slots          H  heads                   T  tokens of one chunk

What a `Tap` returns is what the model goes on to use: a forward hook or an nnsight trace that reads it sees the
truth, and one that replaces it changes the model. The first axis of every tensor is the batch; nothing is
flattened to [B*L], because nnsight slices that axis per invoke.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

Decision = TypeVar("Decision", bound=tuple[Tensor, ...])


class Routing(NamedTuple):
    """Decision of a mixture-of-experts path, once per chunk.

    Attributes:
        logits: [B, C, E] router logits `z_c` of each chunk.
        experts: [B, C, K] int64 chosen experts, best first.
        weights: [B, L, K] weight of each chosen expert for each token; sums to 1 over K.
    """

    logits: Tensor
    experts: Tensor
    weights: Tensor


class Selection(NamedTuple):
    """Decision of a sparse attention path: the earlier blocks that each query sees beyond window and sink.

    Attributes:
        blocks: [B, L, H, K] int64 block indices per key-value head, best first; -1 where fewer blocks qualify.
        scores: [B, L, H, K] `query . mean(key)` of those blocks; -inf where `blocks` is -1.
    """

    blocks: Tensor
    scores: Tensor


class WorkspaceWrite(NamedTuple):
    """What each workspace slot writes at the end of each chunk.

    Attributes:
        address: [B, C, S, T] attention of each slot over the chunk's tokens; sums to 1 over the tokens present.
        gate: [B, C, S] share of the slot that is replaced (`1 - f_c`), in (0, 1).
    """

    address: Tensor
    gate: Tensor


class WorkspaceRead(NamedTuple):
    """What each token reads from the workspace.

    Attributes:
        address: [B, L, S] attention of each token over the slots; sums to 1 over S.
        gate: [B, L, 1] read gate in (0, 1).
    """

    address: Tensor
    gate: Tensor


class Lookup(NamedTuple):
    """Decision of a product-key memory path.

    Attributes:
        addresses: [B, L, H, K] int64 rows of the value table, `i1 * n2 + i2`, best first.
        weights: [B, L, H, K] softmax weights of those rows; sums to 1 over K.
        gate: [B, L, 1] the memory gate beta in (0, 1).
    """

    addresses: Tensor
    weights: Tensor
    gate: Tensor


class StateSummary(NamedTuple):
    """What a state-space path reports of its state.

    Attributes:
        norms: [B, C, H] Frobenius norm of each head's state at the end of each chunk (or after the row's last
            token, in the chunk that holds it).
        decay: [B, L, H] log of the factor by which each head's state decays at each token, `dt * A` (<= 0).
    """

    norms: Tensor
    decay: Tensor


class ChunkStates(NamedTuple):
    """The states of a state-space path, whole.

    Attributes:
        states: [B, C, H, P, N] fp32 state of each head at the end of each chunk (or after the row's last token, in the
            chunk that holds it).
    """

    states: Tensor


class AttentionMass(NamedTuple):
    """Where the probability of a sparse attention path went.

    Attributes:
        mass: [B, L, H, 3] fp32 share of each query head's probability that its window, the sink block and the selected
            blocks received; sums to 1. A key that qualifies twice counts for the first of the three.
    """

    mass: Tensor


class Tap(nn.Module):
    """Identity on a decision; the place to hook."""

    def forward(self, decision: Decision) -> Decision:
        return decision


class RequestedTap(Tap):
    """A tap that carries something only while somebody asks (`requested`), because it costs work or memory.

    Attributes:
        num_requests: how many ask at the moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0


@contextmanager
def requested(taps: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, those of `taps` that are a `RequestedTap` carry what they have to say."""
    asked = [tap for tap in taps if isinstance(tap, RequestedTap)]
    for tap in asked:
        tap.num_requests += 1
    try:
        yield
    finally:
        for tap in asked:
            tap.num_requests -= 1


TAPS: dict[str, type] = {
    "moe.routing": Routing,
    "attention.selection": Selection,
    "workspace.write": WorkspaceWrite,
    "workspace.read": WorkspaceRead,
    "memory.lookup": Lookup,
    "ssm.state": StateSummary,
}
"""Tap points below `model.layers.<i>.` and the decision that each carries."""

REQUESTED_TAPS: dict[str, type] = {
    "ssm.states": ChunkStates,
    "ssm.readout": ChunkStates,
    "attention.mass": AttentionMass,
}
"""Tap points that carry something only while they are requested.

`ssm.states` is what a chunk hands to the next one: a state written there is where all later tokens go on from.
`ssm.readout` is what the chunk's last token reads: a state written there changes the output of that token alone.
`attention.mass` is a measurement; writing it raises ValueError."""

PATHS: tuple[str, ...] = ("ssm", "attention", "moe", "workspace", "memory")
"""The paths of a block, in the order in which the curriculum switches them on."""

"""Taps: every decision of the model is the output of an identity module, so it can be read and overwritten.

Shape suffixes used here and in `hydra_lab.nn`:

    B  rows of the batch        L  positions (a row's own tokens, counted from 0 whatever the padding)
    C  chunks                   E  experts                 K  entries of a top-k
    S  workspace slots          H  heads                   T  tokens of one chunk

What a `Tap` returns is what the model goes on to use: a forward hook or an nnsight trace that reads it sees the
truth, and one that replaces it changes the model. The first axis of every tensor is the batch; nothing is
flattened to [B*L], because nnsight slices that axis per invoke.
"""

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


class Tap(nn.Module):
    """Identity on a decision; the place to hook."""

    def forward(self, decision: Decision) -> Decision:
        return decision


TAPS: dict[str, type] = {
    "moe.routing": Routing,
    "attention.selection": Selection,
    "workspace.write": WorkspaceWrite,
    "workspace.read": WorkspaceRead,
    "memory.lookup": Lookup,
    "ssm.state": StateSummary,
}
"""Tap points below `model.layers.<i>.` and the decision that each carries."""

PATHS: tuple[str, ...] = ("ssm", "attention", "moe", "workspace", "memory")
"""The paths of a block, in the order in which the curriculum switches them on."""

"""One change of every kind, for the small model of these tests."""

import torch

from hydra_lab.interventions import Intervention, PatchState, parse

STATE = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(11))
"""[H, P, N] a state that no run has left."""

VOCABULARY: tuple[Intervention, ...] = (
    *parse(
        "moe[0].ablate(expert=1); moe[2].ablate(expert=0, renormalize=false); moe[*].force(expert=2);"
        "moe[2].force(experts=[3, 1]); moe[0].route(experts=[[2], [], [0, 3], [3]]); moe[*].temperature(value=0.25);"
        "memory[2].mask(addresses=[1, 9, 17, 20, 33, 40, 57]); memory[*].swap(first=9, second=33);"
        "memory[2].mask(addresses=[1, 9, 17, 20, 33, 40, 57], renormalize=true); memory[2].beta(value=0.9);"
        "memory[2].replace(source=9, target=60); workspace[1].zero(slot=2); workspace[3].freeze(slot=0);"
        "workspace[*].freeze(slot=4, from_chunk=2); workspace[1].swap(first=0, second=3);"
        "ssm[1].scale_decay(head=2, factor=0.25); attention[1].forbid(blocks=[1, 2, 4, 6]);"
        "attention[*].select(blocks=[3, 1]); ssm[2].cut(); moe[*].cut(); attention[3].scale(factor=-1.5);"
    ),
    *parse(f"memory[2].edit(address=9, value={[round(0.1 * n - 1.5, 1) for n in range(32)]})"),
    PatchState(block=1, position=15, state=STATE),
    PatchState(block=0, position=7, state=STATE[1], head=3),
    PatchState(block=3, position=31, state=STATE, kind="read"),
)


def name(change: Intervention) -> str:
    """Short enough for a test's id."""
    return str(change)[:60]

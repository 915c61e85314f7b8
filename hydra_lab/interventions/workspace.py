"""Changes to the slots of a workspace.

What readers see of the slots is the input of `slot_norm`, [B, C, S, V]: the slots that enter each chunk. A reader also
knows each slot by a learned name, which no change touches: it may go on looking at a slot that has nothing to give.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hydra_lab.config import HydraConfig
from hydra_lab.interventions.arguments import Index
from hydra_lab.interventions.base import Intervention
from hydra_lab.interventions.hooks import edited, noted
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import WorkspaceWrite


@dataclass(frozen=True, kw_only=True)
class ZeroSlot(Intervention):
    """What the slot hands to its readers is zero; it goes on being written.

    Attributes:
        slot: the slot.
    """

    action: ClassVar[str] = "zero"
    path: str = field(default="workspace", init=False)
    slot: Index

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("slot", self.slot, config.workspace_num_slots)

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        def zeroed(slots_BCSV: Tensor) -> Tensor:
            is_slot_S1 = torch.arange(slots_BCSV.shape[2], device=slots_BCSV.device)[:, None] == self.slot
            return slots_BCSV.masked_fill(is_slot_S1, 0.0)

        with edited(model.model.blocks[block].workspace.slot_norm, zeroed):
            yield


@dataclass(frozen=True, kw_only=True)
class FreezeSlot(Intervention):
    """The slot keeps what it holds: nothing is written to it any more.

    Attributes:
        slot: the slot.
        from_chunk: first chunk whose tokens are not written, counted from a row's first token; 0 leaves the slot as it
            starts.
    """

    action: ClassVar[str] = "freeze"
    path: str = field(default="workspace", init=False)
    slot: Index
    from_chunk: Index = 0

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("slot", self.slot, config.workspace_num_slots)

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        path = model.model.blocks[block].workspace

        def frozen(written: WorkspaceWrite) -> WorkspaceWrite:
            is_late_BC = passage.chunk_indices(passage.grid(path.chunk_size)) >= self.from_chunk
            is_slot_S = torch.arange(written.gate.shape[2], device=written.gate.device) == self.slot
            return written._replace(gate=written.gate.masked_fill(is_late_BC[..., None] & is_slot_S, 0.0))

        with noted(path) as passage, edited(path.write, frozen):
            yield


@dataclass(frozen=True, kw_only=True)
class SwapSlots(Intervention):
    """Readers find in each of two slots what the other holds; writing goes on as it was.

    Attributes:
        first, second: the slots.
    """

    action: ClassVar[str] = "swap"
    path: str = field(default="workspace", init=False)
    first: Index
    second: Index

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("slot", (self.first, self.second), config.workspace_num_slots)

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        def swapped(slots_BCSV: Tensor) -> Tensor:
            order = list(range(slots_BCSV.shape[2]))
            order[self.first], order[self.second] = self.second, self.first
            return slots_BCSV[:, :, order]

        with edited(model.model.blocks[block].workspace.slot_norm, swapped):
            yield

"""Changes to a product-key memory, at the tap `memory.lookup`, and to its table of values.

Shape suffixes: B rows, L positions, H memory heads, K rows that a head reads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch

from hydra_lab.config import HydraConfig
from hydra_lab.interventions.arguments import Flag, Index, Indices, Vector, number
from hydra_lab.interventions.base import Intervention
from hydra_lab.interventions.hooks import edited, removed
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import Lookup


def _num_addresses(config: HydraConfig) -> int:
    return config.memory_num_keys[0] * config.memory_num_keys[1]


@dataclass(frozen=True, kw_only=True)
class MaskAddresses(Intervention):
    """Nothing is read at these addresses.

    Attributes:
        addresses: rows of the value table.
        renormalize: whether a masked row's weight goes to the other rows that the head reads, in proportion (a head
            that reads masked rows alone gets nothing either way). By default it is lost, as if the row's value were
            zero, so that all other facts weigh what they did.
    """

    action: ClassVar[str] = "mask"
    path: str = field(default="memory", init=False)
    addresses: Indices
    renormalize: Flag = False

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("address", self.addresses, _num_addresses(config))

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        def masked(lookup: Lookup) -> Lookup:
            addresses = torch.tensor(self.addresses, dtype=torch.long, device=lookup.addresses.device)
            is_masked_BLHK = torch.isin(lookup.addresses, addresses)
            return lookup._replace(weights=removed(lookup.weights, is_masked_BLHK, self.renormalize))

        with edited(model.model.blocks[block].memory.lookup, masked):
            yield


@dataclass(frozen=True, kw_only=True)
class ReplaceAddress(Intervention):
    """Whoever reads at one address reads at another, with the same weight.

    Attributes:
        source: the address that is no longer read.
        target: the address that is read in its place.
    """

    action: ClassVar[str] = "replace"
    path: str = field(default="memory", init=False)
    source: Index
    target: Index

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("address", (self.source, self.target), _num_addresses(config))

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        def replaced(lookup: Lookup) -> Lookup:
            is_source = lookup.addresses == self.source
            return lookup._replace(addresses=lookup.addresses.masked_fill(is_source, self.target))

        with edited(model.model.blocks[block].memory.lookup, replaced):
            yield


@dataclass(frozen=True, kw_only=True)
class SwapAddresses(Intervention):
    """Whoever reads at one of two addresses reads at the other.

    Attributes:
        first, second: the addresses.
    """

    action: ClassVar[str] = "swap"
    path: str = field(default="memory", init=False)
    first: Index
    second: Index

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("address", (self.first, self.second), _num_addresses(config))

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        def swapped(lookup: Lookup) -> Lookup:
            is_first, is_second = (lookup.addresses == each for each in (self.first, self.second))
            moved = lookup.addresses.masked_fill(is_first, self.second).masked_fill(is_second, self.first)
            return lookup._replace(addresses=moved)

        with edited(model.model.blocks[block].memory.lookup, swapped):
            yield


@dataclass(frozen=True, kw_only=True)
class ClampBeta(Intervention):
    """The memory's gate has one value for every token.

    Attributes:
        value: beta, 0 (the memory is shut) to 1.
    """

    action: ClassVar[str] = "beta"
    path: str = field(default="memory", init=False)
    value: Annotated[float, number(0.0, 1.0)]

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        def clamped(lookup: Lookup) -> Lookup:
            return lookup._replace(gate=torch.full_like(lookup.gate, self.value))

        with edited(model.model.blocks[block].memory.lookup, clamped):
            yield


@dataclass(frozen=True, kw_only=True)
class EditValue(Intervention):
    """A row of the value table holds another value: a fact is edited.

    The one change that is made in the weights themselves; on exit the row gets back what it held, to the bit.

    Attributes:
        address: the row.
        value: [memory_value_size] its new value.
    """

    action: ClassVar[str] = "edit"
    path: str = field(default="memory", init=False)
    address: Index
    value: Vector

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("address", self.address, _num_addresses(config))
        if len(self.value) != config.memory_value_size:
            raise self.wrong(
                f"value has {len(self.value)} numbers, a row of this model {config.memory_value_size}"
            )

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        values = model.model.blocks[block].memory.values
        kept = values[self.address].detach().clone()
        with torch.no_grad():
            values[self.address] = torch.tensor(self.value, dtype=values.dtype, device=values.device)
        try:
            yield
        finally:
            with torch.no_grad():
                values[self.address] = kept

"""What every intervention has: a path and a block to change, arguments, a text form and a JSON form."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal, get_type_hints

from hydra_lab.config import HydraConfig
from hydra_lab.interventions.arguments import Reader, index, reader_of
from hydra_lab.modeling import HydraForCausalLM


@dataclass(frozen=True, kw_only=True)
class Intervention(ABC):
    """One change to a model. `str(change)` is its text form, which `hydra_lab.interventions.parse` reads.

    Two changes are equal where they do the same, and can be keys of a dictionary.

    Attributes:
        path: the path that it changes, one of `hydra_lab.taps.PATHS`.
        block: index of the block, or "*" for every block that has the path.
        action: what it does, a word of the vocabulary.
    """

    path: str
    block: int | Literal["*"]
    action: ClassVar[str]

    def __post_init__(self) -> None:
        if self.block != "*":
            self._read("block", index)
        defaults = self.argument_defaults()
        for name, read in _readers(type(self)).items():
            if getattr(self, name) is not None or defaults[name] is not None:
                self._read(name, read)

    def _read(self, name: str, read: Reader) -> None:
        try:
            value = read(getattr(self, name))
        except ValueError as error:
            raise self.wrong(f"{name} {error}") from None
        object.__setattr__(self, name, value)

    @classmethod
    def argument_defaults(cls) -> dict[str, Any]:
        """Default of each argument by name; `dataclasses.MISSING` for those that must be given."""
        return {each.name: each.default for each in fields(cls) if each.name in _readers(cls)}

    @property
    def arguments(self) -> dict[str, Any]:
        """Its arguments, without those that have their default; arrays as nested lists."""
        values = {name: getattr(self, name) for name in _readers(type(self))}
        defaults = self.argument_defaults()
        return {name: _plain(value) for name, value in values.items() if value != defaults[name]}

    def __str__(self) -> str:
        given = ", ".join(f"{name}={json.dumps(value)}" for name, value in self.arguments.items())
        return f"{self.path}[{self.block}].{self.action}({given})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers come back to the bit."""
        return {
            "path": self.path,
            "block": self.block,
            "action": self.action,
            "arguments": self.arguments,
        }

    def blocks_in(self, config: HydraConfig) -> tuple[int, ...]:
        """The blocks that it changes in a model of this configuration.

        Raises:
            ValueError: a block lacks the path, or an argument is out of range; the message says what there is.
        """
        present = config.layers_with(self.path)
        if not present:
            raise self.wrong(f"no block of this model has a {self.path} path")
        if self.block != "*" and self.block not in present:
            raise self.wrong(f"block {self.block} has no {self.path} path; blocks {present} have one")
        self.check_arguments(config)
        return tuple(present) if self.block == "*" else (self.block,)

    def check_arguments(self, config: HydraConfig) -> None:  # noqa: B027 (most are checked, some have no bounds)
        """Raise ValueError where an argument is out of range for such a model."""

    def check_below(self, name: str, values: int | Sequence[int], bound: int) -> None:
        """Raise ValueError unless every one of `values` lies in 0 .. bound - 1."""
        for value in (values,) if isinstance(values, int) else values:
            if value >= bound:
                raise self.wrong(f"{name} {value} is out of range: 0 to {bound - 1} in this model")

    def wrong(self, reason: str) -> ValueError:
        """What to raise where this change cannot be made."""
        return ValueError(f"{self.path}.{self.action}: {reason}")

    @abstractmethod
    def on(self, model: HydraForCausalLM, block: int) -> AbstractContextManager[None]:
        """The change in one block, for as long as the context is open."""


@cache
def _readers(change: type[Intervention]) -> dict[str, Reader]:
    """How each argument of a kind of change is read, by name."""
    hints = get_type_hints(change, include_extras=True)
    found = {each.name: reader_of(hints[each.name]) for each in fields(change)}
    return {name: read for name, read in found.items() if read is not None}


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, tuple) else value

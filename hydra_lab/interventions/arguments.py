"""Arguments of interventions: what a person, a program or a file gives, checked and brought into one form.

A reader takes a value and returns it as an intervention keeps it: hashable, and equal after a trip through JSON or
text. What it raises finishes the sentence "<argument> ...". A field of an intervention names its reader in its type:
`expert: Index`.
"""

import reprlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

Reader = Callable[[Any], Any]

LARGEST = float(np.finfo(np.float32).max)
"""Largest number that the model's fp32 tensors hold."""


def index(value: Any) -> int:
    """Number of an expert, slot, address, head, block or token."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"must be a whole number from 0 up, got {reprlib.repr(value)}")
    return int(value)


def indices(value: Any) -> tuple[int, ...]:
    """A list of different numbers."""
    listed = _listed(value)
    read = tuple(index(each) for each in listed)
    if len(set(read)) != len(read):
        raise ValueError(f"must not name one number twice, got {reprlib.repr(listed)}")
    return read


def table(value: Any) -> tuple[tuple[int, ...], ...]:
    """A list of such lists."""
    return tuple(indices(row) for row in _listed(value))


def flag(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {reprlib.repr(value)}")
    return value


def number(least: float = -LARGEST, most: float = LARGEST) -> Reader:
    """A number in `least` .. `most`."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            raise ValueError(f"must be a number, got {reprlib.repr(value)}")
        if not least <= value <= most:  # NaN lies nowhere
            raise ValueError(f"must be a number from {least:g} to {most:g}, got {reprlib.repr(value)}")
        return float(value)

    return read


def one_of(*choices: str) -> Reader:
    """One of some words."""

    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be {' or '.join(map(repr, choices))}, got {reprlib.repr(value)}")
        return value

    return read


def array(*dimensions: int) -> Reader:
    """Finite numbers with one of these numbers of axes: nested lists, a numpy array or a tensor."""

    def read(value: Any) -> tuple[Any, ...]:
        given = value.detach().to("cpu", torch.float64).numpy() if isinstance(value, Tensor) else value
        try:
            values = np.asarray(given)
        except (ValueError, OverflowError):
            values = np.asarray(None)  # rows of different lengths, or too many levels
        if values.dtype.kind not in "iuf" or values.ndim not in dimensions or values.size == 0:
            axes = " or ".join(map(str, dimensions))
            raise ValueError(f"must be numbers with {axes} axes, all rows alike, got {reprlib.repr(value)}")
        if not (np.abs(values) <= LARGEST).all():
            raise ValueError("must hold finite numbers that fp32 can hold")
        return _nested(values.astype(np.float64).tolist())

    return read


Index = Annotated[int, index]
Indices = Annotated[Sequence[int], indices]
Table = Annotated[Sequence[Sequence[int]], table]
Flag = Annotated[bool, flag]
Vector = Annotated[Any, array(1)]
State = Annotated[Any, array(2, 3)]


def reader_of(hint: Any) -> Reader | None:
    """The reader that a field's type hint carries, alone or beside None."""
    for each in (hint, *get_args(hint)):
        if get_origin(each) is Annotated:
            return each.__metadata__[0]
    return None


def shape(values: Any) -> list[int]:
    """Sizes of the axes of `values`."""
    sizes: list[int] = []
    while isinstance(values, tuple):
        sizes.append(len(values))
        values = values[0]
    return sizes


def _listed(value: Any) -> Sequence[Any]:
    if isinstance(value, np.ndarray | Tensor):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list, got {reprlib.repr(value)}")
    return value


def _nested(values: Any) -> Any:
    return tuple(_nested(each) for each in values) if isinstance(values, list) else values

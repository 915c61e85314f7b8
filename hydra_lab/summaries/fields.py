"""What an array of a summary is: its axes, its meaning and unit, and how the arrays of two parts become one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""The arrays of one group by name."""

Merge = Literal["sum", "least", "contexts"]
"""How two parts become one: added; the smaller of the two; the best of both (see `contexts_fields`)."""

NO_SCORE = -1.0
"""Score of a place of a context list that nothing fills; scores of contexts are never negative."""


@dataclass(frozen=True)
class Field:
    """One array of a group.

    Attributes:
        axes: names of its axes (see `hydra_lab.summaries`).
        about: what it holds, with its unit.
        merge: how the arrays of two parts become one.
    """

    axes: tuple[str, ...]
    about: str
    merge: Merge = "sum"


Fields = dict[str, Field]


def contexts_fields(name: str, item: tuple[str, ...], about: str) -> Fields:
    """The three arrays of a list of the best contexts of each item: `<name>_score`, `<name>_sample`, `<name>_position`.

    A context is a token of a sample. Each sample offers its best one (the earliest of equals), so that the contexts of
    an item come from different samples; they are sorted by falling score, equals by sample. Places that nothing fills
    have score `NO_SCORE`, sample and position -1.
    """
    axes = (*item, "context")
    return {
        f"{name}_score": Field(axes, f"score: {about}; float16", "contexts"),
        f"{name}_sample": Field(axes, "index of the context's sample in the capture; int32", "contexts"),
        f"{name}_position": Field(axes, "position of the context's token in its sample; int32", "contexts"),
    }


def merge_arrays(
    fields: Fields, first: Mapping[str, NDArray[Any]], second: Mapping[str, NDArray[Any]]
) -> Arrays:
    """One group of `first` followed by `second`.

    Raises:
        ValueError: the two do not hold the same arrays in the same shapes.
    """
    if set(first) != set(second):
        differing = ", ".join(sorted(set(first) ^ set(second)))
        raise ValueError(f"the summaries to merge do not hold the same arrays: only one has {differing}")
    merged: Arrays = {}
    for name, array in first.items():
        other = second[name]
        if array.shape != other.shape:
            raise ValueError(f"the summaries to merge hold {name} in shapes {array.shape} and {other.shape}")
        if fields[name].merge == "sum":
            merged[name] = array + other
        elif fields[name].merge == "least":
            merged[name] = np.minimum(array, other)
    for name in first:
        if name.endswith("_score") and fields[name].merge == "contexts":
            merged |= _merge_contexts(name.removesuffix("_score"), first, second)
    return {name: merged[name] for name in first}


def _merge_contexts(
    name: str, first: Mapping[str, NDArray[Any]], second: Mapping[str, NDArray[Any]]
) -> Arrays:
    """The best contexts of both; `first`'s samples come before `second`'s, so among equals its own stay."""
    parts = ("score", "sample", "position")
    best = [first[f"{name}_{part}"].copy() for part in parts]
    num_contexts = best[0].shape[-1]
    changed = second[f"{name}_score"][..., 0] > best[0][..., -1]
    both = [
        np.concatenate([array[changed], second[f"{name}_{part}"][changed]], axis=-1)
        for array, part in zip(best, parts, strict=True)
    ]
    order = np.argsort(-both[0].astype(np.float32), axis=-1, kind="stable")[:, :num_contexts]
    for array, candidates in zip(best, both, strict=True):
        array[changed] = np.take_along_axis(candidates, order, axis=-1)
    return {f"{name}_{part}": array for part, array in zip(parts, best, strict=True)}

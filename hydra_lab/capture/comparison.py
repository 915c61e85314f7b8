"""Two captures of the same text beside each other: two checkpoints, or an intervention and its baseline.

Shape suffixes: N samples of one block of them, Y layers that have the path, L positions, C chunks, K entries of a
top-k, Z domains.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from hydra_lab.capture.in_memory import InMemoryCapture
from hydra_lab.capture.store import Capture

SAMPLES_AT_ONCE = 64
"""Samples read at a time, so that captures of any size fit in memory."""

Array = NDArray[Any]
Compared = Capture | InMemoryCapture
Measure = Callable[[Array, Array], Array]


@dataclass(frozen=True, eq=False)
class Change:
    """A mean by layer and domain.

    Attributes:
        layers: [Y] blocks that have the path.
        mean: [Y, Z] the mean; NaN where nothing was counted.
        count: [Y, Z] what it is a mean over.
    """

    layers: tuple[int, ...]
    mean: NDArray[np.float64]
    count: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What changed from capture `first` to capture `second`. Differences are second minus first; a part is None
    where one of them has not captured it.

    Attributes:
        first, second: the captures.
        domains: Z labels, in order of first appearance.
        num_samples, num_tokens: [Z].
        loss: [Z] mean loss of `first`, nats per token.
        loss_change: [Z] mean difference of the losses, nats per token.
        expert_set: share of chunks, 0..1, whose set of experts differs.
        first_expert: share of chunks, 0..1, whose best expert differs.
        addresses: share, 0..1, of a head's memory addresses that were replaced, per token and head.
        memory_gate: difference of beta, per token.
        selected_blocks: share, 0..1, of the selected attention blocks that were replaced, per token and head that
            selects any.
        read_gate: difference of the workspace's read gate, per token.
        write_gate: difference of its write gates, per chunk and slot.
        state_norm: natural logarithm of the ratio of the ssm state norms, per chunk and head.
        path_share: by path, difference of its share of the block's update, per sample.
    """

    first: Compared
    second: Compared
    domains: tuple[str, ...]
    num_samples: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    loss: NDArray[np.float64]
    loss_change: NDArray[np.float64]
    expert_set: Change | None
    first_expert: Change | None
    addresses: Change | None
    memory_gate: Change | None
    selected_blocks: Change | None
    read_gate: Change | None
    write_gate: Change | None
    state_norm: Change | None
    path_share: dict[str, Change]

    @property
    def loss_difference(self) -> xr.DataArray:
        """[sample, position] difference of the losses, nats; NaN at position 0 and behind a sample's end. Computed
        when it is read, where dask is installed."""
        return self.second["tokens"]["loss"] - self.first["tokens"]["loss"]

    @property
    def expert_set_changed(self) -> xr.DataArray:
        """[sample, layer, chunk] whether the set of experts differs; False behind a sample's end. Computed when it is
        read, where dask is installed.

        Raises:
            KeyError: a capture has no routing.
        """
        first, second = (each["routing"]["experts"] for each in (self.first, self.second))
        return xr.apply_ufunc(
            lambda a, b: (np.sort(a, axis=-1) != np.sort(b, axis=-1)).any(axis=-1),
            first,
            second,
            input_core_dims=[["rank"], ["rank"]],
            dask="parallelized",
            output_dtypes=[bool],
        )


def compare(first: Compared, second: Compared) -> Comparison:
    """Align two captures of the same text and measure what changed; a few samples are in memory at a time.

    Raises:
        ValueError: they are not of the same text in the same windows by the same tokenizer, or the layers or sizes
            of a group differ; the message names what.
    """
    _check_same_text(first, second)
    labels = np.array(first.domains)
    domains = tuple(dict.fromkeys(first.domains))
    member_SZ = labels[:, None] == np.array(domains)
    length_S = first["tokens"]["length"].to_numpy().astype(np.int64)

    num_losses, loss_sum, change_sum = np.zeros((3, len(domains)))
    for rows, (a, b) in _blocks(first, second, "tokens", "loss"):
        member_NZ = member_SZ[rows].astype(float)
        num_losses += (~np.isnan(a)).sum(axis=1) @ member_NZ
        loss_sum += np.nansum(a.astype(float), axis=1) @ member_NZ
        change_sum += np.nansum(b.astype(float) - a, axis=1) @ member_NZ
    with np.errstate(invalid="ignore"):
        loss, loss_change = loss_sum / num_losses, change_sum / num_losses

    shared = [group for group in first if group != "tokens" and group in list(second)]
    for group in shared:
        _check_same_form(first, second, group)
    means = _Means(first, second, shared, member_SZ)
    return Comparison(
        first=first,
        second=second,
        domains=domains,
        num_samples=member_SZ.sum(axis=0),
        num_tokens=length_S @ member_SZ,
        loss=loss,
        loss_change=loss_change,
        expert_set=means.of("routing", "experts", _set_differs),
        first_expert=means.of("routing", "experts", _first_differs),
        addresses=means.of("memory", "addresses", _replaced),
        memory_gate=means.of("memory", "gate", _difference),
        selected_blocks=means.of("attention", "blocks", _replaced),
        read_gate=means.of("workspace", "read_gate", _difference),
        write_gate=means.of("workspace", "write_gate", _difference),
        state_norm=means.of("ssm", "norms", _log_ratio),
        path_share=means.path_shares(),
    )


def _check_same_text(first: Compared, second: Compared) -> None:
    for name, said in (("tokenizer_sha256", "tokenizer"), ("sequence_length", "windows (sequence_length)")):
        ours, theirs = first.attributes.get(name), second.attributes.get(name)
        if ours != theirs:
            raise ValueError(f"the captures have different {said}: {ours} and {theirs}")
    sizes = [len(capture.domains) for capture in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the captures have different numbers of samples: {sizes[0]} and {sizes[1]}")
    for sample, (ours, theirs) in enumerate(zip(first.domains, second.domains, strict=True)):
        if ours != theirs:
            raise ValueError(f"the captures have different domains at sample {sample}: {ours} and {theirs}")
    for name in ("length", "token"):
        for rows, (a, b) in _blocks(first, second, "tokens", name):
            if a.shape != b.shape:
                raise ValueError(
                    f"the captures have windows of different sizes: {a.shape[1]} and {b.shape[1]}"
                )
            differs = (a != b).reshape(len(a), -1).any(axis=1)
            if differs.any():
                sample = rows.start + int(differs.argmax())
                raise ValueError(f"the captures have different tokens, first in sample {sample}")


def _check_same_form(first: Compared, second: Compared, group: str) -> None:
    ours, theirs = first[group], second[group]
    if ours["layer"].to_numpy().tolist() != theirs["layer"].to_numpy().tolist() or ours.sizes != theirs.sizes:
        raise ValueError(
            f"the captures have different {group}: blocks {ours['layer'].to_numpy().tolist()} of sizes "
            f"{dict(ours.sizes)}, and {theirs['layer'].to_numpy().tolist()} of {dict(theirs.sizes)}"
        )


def _blocks(
    first: Compared, second: Compared, group: str, name: str
) -> Iterator[tuple[slice, tuple[Array, Array]]]:
    """The same rows of an array of both, a few samples at a time."""
    ours, theirs = first.plain(group)[name], second.plain(group)[name]
    for start in range(0, ours.sizes["sample"], SAMPLES_AT_ONCE):
        rows = slice(start, start + SAMPLES_AT_ONCE)
        yield rows, (ours.isel(sample=rows).to_numpy(), theirs.isel(sample=rows).to_numpy())


class _Means:
    """Means by layer and domain of what a measure makes of the same array of both captures.

    A measure takes rows [N, Y, ...] of both and gives [N, Y, ...], NaN where there is nothing to count.
    """

    def __init__(
        self, first: Compared, second: Compared, shared: Sequence[str], member_SZ: NDArray[np.bool_]
    ) -> None:
        self.first, self.second, self.shared, self.member_SZ = first, second, shared, member_SZ

    def of(self, group: str, name: str, measure: Measure) -> Change | None:
        return self._mean(group, name, measure) if group in self.shared else None

    def path_shares(self) -> dict[str, Change]:
        if "paths" not in self.shared:
            return {}
        paths = [str(path) for path in self.first["paths"]["path"].to_numpy()]
        changes: dict[str, Change] = {}
        for p, path in enumerate(paths):
            change = self._mean("paths", "share", lambda a, b, p=p: _difference(a[..., p], b[..., p]))
            if change.count.any():
                changes[path] = change
        return changes

    def _mean(self, group: str, name: str, measure: Measure) -> Change:
        layers = tuple(int(layer) for layer in self.first[group]["layer"].to_numpy())
        total_YZ, count_YZ = np.zeros((2, len(layers), self.member_SZ.shape[1]))
        for rows, (a, b) in _blocks(self.first, self.second, group, name):
            values = np.asarray(measure(a, b), dtype=np.float64).reshape(len(a), len(layers), -1)
            member_NZ = self.member_SZ[rows].astype(np.float64)
            total_YZ += np.nansum(values, axis=2).T @ member_NZ
            count_YZ += (~np.isnan(values)).sum(axis=2).T @ member_NZ
        mean_YZ = np.full_like(total_YZ, np.nan)
        np.divide(total_YZ, count_YZ, out=mean_YZ, where=count_YZ > 0)
        return Change(layers, mean_YZ, count_YZ.astype(np.int64))


def _set_differs(a: Array, b: Array) -> Array:
    """[N, Y, C] whether the experts [N, Y, C, K] differ, in whatever order."""
    return np.where(_present(a)[..., 0], (np.sort(a, axis=-1) != np.sort(b, axis=-1)).any(axis=-1), np.nan)


def _first_differs(a: Array, b: Array) -> Array:
    return np.where(_present(a)[..., 0], a[..., 0] != b[..., 0], np.nan)


def _replaced(a: Array, b: Array) -> Array:
    """[...] share of the entries of two sets [..., K] that one has and the other has not; NaN where both are empty."""
    in_a, in_b = _present(a), _present(b)
    common = ((a[..., :, None] == b[..., None, :]) & in_a[..., :, None]).any(axis=-1).sum(axis=-1)
    size = np.maximum(in_a.sum(axis=-1), in_b.sum(axis=-1))
    share = np.full(size.shape, np.nan)
    np.divide(size - common, size, out=share, where=size > 0)
    return share


def _difference(a: Array, b: Array) -> Array:
    return b.astype(np.float64) - a.astype(np.float64)


def _log_ratio(a: Array, b: Array) -> Array:
    ratio = np.full(a.shape, np.nan)
    np.divide(b, a, out=ratio, where=(a > 0) & (b > 0))
    return np.log(ratio)


def _present(indices: Array) -> NDArray[np.bool_]:
    """Where an integer array of a capture holds an index, and not the value behind a sample's end or for none."""
    missing = np.iinfo(indices.dtype).max if indices.dtype.kind == "u" else -1
    return indices != missing

"""The records that the metrics read, taken from a capture: on disk (`hydra_lab.open_capture`) or of one batch
(`hydra_lab.capture.in_memory.capture_batch`).

What a capture's running summary serves comes from the `summarized_...` functions, without any raw array.

Only the arrays that a record needs are read, for one block where the record speaks of one, in the width in
which they are stored.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from hydra_lab.metrics.arrays import IntArray, ratio, summarized_group
from hydra_lab.metrics.attention_counts import SelectionCounts, SelectionRecord
from hydra_lab.metrics.memory_counts import LookupCounts, LookupRecord
from hydra_lab.metrics.routing_counts import RoutingCounts, RoutingRecord
from hydra_lab.metrics.ssm_counts import StateCounts, StateRecord
from hydra_lab.metrics.workspace_counts import WorkspaceCounts, WorkspaceRecord
from hydra_lab.path_use import PathUse
from hydra_lab.summaries import Summary
from hydra_lab.summaries.paths import token_sums
from hydra_lab.taps import PATHS

Rows = slice | Sequence[int] | NDArray[np.integer[Any]]
"""Which samples to read."""

ALL = slice(None)


class CaptureLike(Protocol):
    """What the functions below need of a capture."""

    @property
    def attributes(self) -> dict[str, Any]:
        """With `config`, the model's configuration as a dict."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain label of each sample."""
        ...

    def plain(self, group: str) -> xr.Dataset:
        """One group, not in Dask's chunks (see `hydra_lab.capture.layout`)."""
        ...


class SummarizedCapture(Protocol):
    """What the functions below need of a capture with a running summary."""

    @property
    def attributes(self) -> dict[str, Any]:
        """With `config`, the model's configuration as a dict, and `domains`, the labels of the summary's domains."""
        ...

    @property
    def summary(self) -> Summary:
        """The running summary (see `hydra_lab.summaries`)."""
        ...


def layers_of(capture: CaptureLike, group: str) -> tuple[int, ...]:
    """The blocks that a group was captured in."""
    return tuple(int(layer) for layer in capture.plain(group)["layer"].to_numpy())


def routing_record(
    capture: CaptureLike,
    *,
    samples: Rows = ALL,
    weights: bool = True,
    logits: bool = False,
    tokens: bool = False,
) -> RoutingRecord:
    """Routing of all blocks with experts.

    Args:
        samples: which samples; all unless given.
        weights: whether to read the token weights too (they are larger by far than the choices).
        logits: whether to read the router's logits too (`routing_margin` needs them).
        tokens: whether to read the token ids too (`expert_by_token_class` needs them).
    """
    group = capture.plain("routing").isel(sample=samples)
    return RoutingRecord(
        layers=layers_of(capture, "routing"),
        experts=_array(group, "experts", "layer", "sample", "chunk", "rank").astype(np.int64),
        num_experts=int(capture.attributes["config"]["moe_num_experts"]),
        chunk_size=int(group.attrs["chunk_size"]),
        length=_length(capture, samples),
        domains=_domains(capture, samples),
        weights=_array(group, "weights", "layer", "sample", "position", "rank") if weights else None,
        logits=_array(group, "logits", "layer", "sample", "chunk", "expert") if logits else None,
        tokens=_array(capture.plain("tokens").isel(sample=samples), "token", "sample", "position")
        if tokens
        else None,
    )


def summarized_routing(capture: SummarizedCapture) -> RoutingCounts:
    """Routing of the whole capture, from its summary; the metrics take it in place of a record.

    Raises:
        ValueError: the summary holds no routing.
    """
    attributes = capture.attributes
    return RoutingCounts.from_summary(
        capture.summary, config=attributes["config"], domains=attributes["domains"]
    )


def summarized_lookups(capture: SummarizedCapture, layer: int) -> LookupCounts:
    """Memory lookups of block `layer` in the whole capture, from its summary; the metrics take it in place of a
    record.

    Raises:
        ValueError: the summary holds no memory, or the block has none.
    """
    attributes = capture.attributes
    return LookupCounts.from_summary(
        capture.summary, layer, config=attributes["config"], domains=attributes["domains"]
    )


def summarized_workspace(capture: SummarizedCapture, layer: int) -> WorkspaceCounts:
    """Workspace reads and writes of block `layer` in the whole capture, from its summary; the metrics take it in place
    of a record.

    Raises:
        ValueError: the summary holds no workspace, or the block has none.
    """
    return WorkspaceCounts.from_summary(capture.summary, layer, config=capture.attributes["config"])


def summarized_states(capture: SummarizedCapture, layer: int) -> StateCounts:
    """States of block `layer` in the whole capture, from its summary; the metrics of size and half-life take it in
    place of a record.

    Raises:
        ValueError: the summary holds no states, or there is no such block.
    """
    attributes = capture.attributes
    return StateCounts.from_summary(
        capture.summary, layer, config=attributes["config"], domains=attributes["domains"]
    )


def summarized_selections(capture: SummarizedCapture, layer: int) -> SelectionCounts:
    """Block selections of the attention of block `layer` in the whole capture, from its summary; `selection_use` takes
    it in place of a record.

    Raises:
        ValueError: the summary holds no attention, or the block has none.
    """
    return SelectionCounts.from_summary(capture.summary, layer, config=capture.attributes["config"])


def lookup_record(capture: CaptureLike, layer: int, *, samples: Rows = ALL) -> LookupRecord:
    """Memory lookups of block `layer`."""
    group = _block(capture, "memory", layer, samples)
    n1, n2 = capture.attributes["config"]["memory_num_keys"]
    return LookupRecord(
        layer=layer,
        addresses=_array(group, "addresses", "sample", "position", "head", "k"),
        weights=_array(group, "weights", "sample", "position", "head", "k"),
        gate=_array(group, "gate", "sample", "position"),
        tokens=_array(capture.plain("tokens").isel(sample=samples), "token", "sample", "position"),
        length=_length(capture, samples),
        domains=_domains(capture, samples),
        num_keys=(int(n1), int(n2)),
    )


def workspace_record(capture: CaptureLike, layer: int, *, samples: Rows = ALL) -> WorkspaceRecord:
    """Workspace reads and writes of block `layer`."""
    group = _block(capture, "workspace", layer, samples)
    return WorkspaceRecord(
        layer=layer,
        read_address=_array(group, "read_address", "sample", "position", "slot"),
        read_gate=_array(group, "read_gate", "sample", "position"),
        write_gate=_array(group, "write_gate", "sample", "chunk", "slot"),
        write_address=_array(group, "write_address", "sample", "position", "slot"),
        length=_length(capture, samples),
        chunk_size=int(group.attrs["chunk_size"]),
    )


def state_record(capture: CaptureLike, layer: int, *, samples: Rows = ALL) -> StateRecord:
    """State norms and decays of block `layer`."""
    group = _block(capture, "ssm", layer, samples)
    return StateRecord(
        layer=layer,
        norms=_array(group, "norms", "sample", "chunk", "head"),
        decay=_array(group, "decay", "sample", "position", "head"),
        length=_length(capture, samples),
        domains=_domains(capture, samples),
        chunk_size=int(group.attrs["chunk_size"]),
    )


def selection_record(capture: CaptureLike, layer: int, *, samples: Rows = ALL) -> SelectionRecord:
    """Block selections of the attention of block `layer`."""
    group = _block(capture, "attention", layer, samples)
    config = capture.attributes["config"]
    return SelectionRecord(
        layer=layer,
        blocks=_array(group, "blocks", "sample", "position", "head", "k"),
        length=_length(capture, samples),
        window=int(config["attention_window"]),
        block_size=int(config["attention_block_size"]),
        tiled=config["attention_selection"] == "tile",
    )


def captured_path_use(capture: CaptureLike, *, samples: Rows = ALL) -> PathUse:
    """Share and cosine of every path over the captured tokens; a capture does not know what cutting a path
    costs."""
    group = capture.plain("paths").isel(sample=samples)
    fields = {name: _array(group, name, "sample", "layer", "path") for name in ("share", "cosine")}
    paths = tuple(str(path) for path in group["path"].to_numpy())
    return _path_use(
        layers_of(capture, "paths"),
        paths,
        token_sums(fields["share"], fields["cosine"], _length(capture, samples)),
    )


def summarized_path_use(capture: SummarizedCapture) -> PathUse:
    """`captured_path_use` of the whole capture, from its summary.

    Raises:
        ValueError: the summary holds no paths.
    """
    layers = tuple(range(int(capture.attributes["config"]["num_hidden_layers"])))
    return _path_use(layers, PATHS, summarized_group(capture.summary, "paths"))


def _path_use(layers: tuple[int, ...], paths: Sequence[str], sums: Mapping[str, NDArray[Any]]) -> PathUse:
    share, cosine = (
        ratio(sums[f"{name}_sum"], sums[f"{name}_tokens"].astype(np.float64)) for name in ("share", "cosine")
    )
    kept: list[int] = np.flatnonzero(~np.isnan(share).all(axis=0)).tolist()
    none = np.zeros((len(kept), 0))
    return PathUse(
        layers=layers,
        paths=tuple(paths[p] for p in kept),
        share=share[:, kept],
        cosine=cosine[:, kept],
        domains=(),
        loss=np.zeros(0),
        loss_increase=none,
        loss_increase_error=none,
        num_samples=np.zeros(0, dtype=np.int64),
        num_tokens=np.zeros(0, dtype=np.int64),
    )


def _block(capture: CaptureLike, group: str, layer: int, samples: Rows) -> xr.Dataset:
    layers = layers_of(capture, group)
    if layer not in layers:
        raise ValueError(f"block {layer} has no {group}; blocks {', '.join(map(str, layers))} have")
    return capture.plain(group).isel(sample=samples, layer=layers.index(layer))


def _array(group: xr.Dataset, name: str, *dims: str) -> NDArray[Any]:
    return group[name].transpose(*dims).to_numpy()


def _length(capture: CaptureLike, samples: Rows) -> IntArray:
    return _array(capture.plain("tokens").isel(sample=samples), "length", "sample").astype(np.int64)


def _domains(capture: CaptureLike, samples: Rows) -> tuple[str, ...]:
    labels = capture.domains  # reads them from disk, so once
    return labels[samples] if isinstance(samples, slice) else tuple(labels[row] for row in samples)

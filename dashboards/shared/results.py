"""Metrics of the chosen capture, kept between runs of a page, and drawn with the use of their path."""

from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from dashboards.shared.charts import chart, theme
from dashboards.shared.view import CaptureKey, OpenCapture, whole_capture
from hydra_lab import figures, metrics
from hydra_lab.capture import open_capture

# By group of the capture: readers of its running summary and of its raw arrays. Routing is read for all blocks at once.
READERS: dict[str, tuple[Any, Any]] = {
    "routing": (metrics.summarized_routing, metrics.routing_record),
    "memory": (metrics.summarized_lookups, metrics.lookup_record),
    "workspace": (metrics.summarized_workspace, metrics.workspace_record),
    "ssm": (metrics.summarized_states, metrics.state_record),
    "attention": (metrics.summarized_selections, metrics.selection_record),
    "mass": (metrics.summarized_mass, metrics.mass_record),
}
_OF_ALL_BLOCKS = ("routing", "mass")

NEEDS = {"expert_by_position": ("weights",), "routing_margin": ("logits",)}
"""Arrays of the routing, beside the choices, that a metric reads; they are larger by far than the choices."""


def measured(
    opened: OpenCapture,
    group: str,
    name: str,
    layer: int | None = None,
    rows: NDArray[np.int64] | None = None,
) -> Any:
    """The metric `name` of a group of the capture.

    Args:
        layer: the block; None for a group that is read for all blocks at once.
        rows: samples whose raw arrays are read; None for all samples where the capture keeps a summary, else for those
            that pages read.
    """
    return _measured(opened.key, group, name, layer, _rows(opened, rows))


def source(
    opened: OpenCapture, group: str, layer: int | None = None, rows: NDArray[np.int64] | None = None
) -> Any:
    """What the metrics of a group read (see `measured`): its counts of all samples, or a record of `rows`."""
    return _source(opened.key, group, layer, _rows(opened, rows))


def _rows(opened: OpenCapture, rows: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    return opened.rows if rows is None and opened.whole is None else rows


@st.cache_data(max_entries=256, show_spinner="Reading the capture …")
def _measured(
    key: CaptureKey, group: str, name: str, layer: int | None, rows: NDArray[np.int64] | None
) -> Any:
    return getattr(metrics, name)(_source(key, group, layer, rows, NEEDS.get(name, ())))


@st.cache_resource(max_entries=8, show_spinner="Reading the capture …")
def _source(
    key: CaptureKey,
    group: str,
    layer: int | None,
    rows: NDArray[np.int64] | None,
    needs: tuple[str, ...] = (),
) -> Any:
    """What metrics of a group read; shared, not copied, because raw arrays are large."""
    summarized, read = READERS[group]
    where = () if group in _OF_ALL_BLOCKS else (layer,)
    if rows is None:
        return summarized(whole_capture(key), *where)
    options = {} if group != "routing" else {"weights": "weights" in needs, "logits": "logits" in needs}
    return read(open_capture(key[0]), *where, samples=rows, **options)


def draw(opened: OpenCapture, group: str, name: str, layer: int | None = None, **options: Any) -> None:
    """Draw the metric `name` of a group of the capture.

    Args:
        options: of `chart`, and `rows` of `measured`.
    """
    result = measured(opened, group, name, layer, options.pop("rows", None))
    figure = getattr(figures, name)(result, path_use=opened.path_use, theme=theme())
    chart(figure, f"{name}-{layer}" if layer is not None else name, **options)

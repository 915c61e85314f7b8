"""State: what the model carries along: workspace slots, state-space heads, and the blocks that attention selects."""

from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from dashboards.shared.charts import chart, theme
from dashboards.shared.page import introduce
from dashboards.shared.selection import linked
from dashboards.shared.view import (
    CaptureKey,
    OpenCapture,
    choose_block,
    current_capture,
    describe_capture,
    fragment,
    has_group,
    whole_capture,
)
from hydra_lab import figures, metrics
from hydra_lab.capture import open_capture

# Group of the capture (the path has the same name), readers of its summary and of its raw arrays, and the metrics
# (whose figures have the same names).
VIEWS = {
    "State space": (
        "ssm", metrics.summarized_states, metrics.state_record, ("state_norms", "half_life"),
    ),
    "Workspace": (
        "workspace", metrics.summarized_workspace, metrics.workspace_record, ("slot_reads", "slot_writes"),
    ),
    "Attention": (
        "attention", metrics.summarized_selections, metrics.selection_record, ("selection_use",),
    ),
}  # fmt: skip


@st.cache_data(max_entries=64, show_spinner="Reading the capture …")
def results(key: CaptureKey, view: str, layer: int, rows: NDArray[np.int64] | None) -> list[Any]:
    """The metrics of a view, of the samples `rows`; of all of them, from the summary, where that is None."""
    _, summarized, read, names = VIEWS[view]
    if rows is None:
        source: Any = summarized(whole_capture(key), layer)
    else:
        source = read(open_capture(key[0]), layer, samples=rows)
    return [getattr(metrics, name)(source) for name in names]


@fragment
def show(opened: OpenCapture) -> None:
    left, right = st.columns(2)
    with left:
        view = st.segmented_control("Show", list(VIEWS), required=True, key=linked("show", list(VIEWS)))
    assert view is not None
    group, *_, names = VIEWS[view]
    if not has_group(opened, group, group):
        return
    with right:
        layer = choose_block("Block", opened.layers_of(group))
    drawn = results(opened.key, view, layer, None if opened.whole is not None else opened.rows)
    # The workspace's figures are two plots wide each: one below the other.
    places = [st.container() for _ in names] if view == "Workspace" else st.columns(len(names))
    for place, name, result in zip(places, names, drawn, strict=True):
        with place:
            figure = getattr(figures, name)(result, path_use=opened.path_use, theme=theme())
            chart(figure, name)


introduce(
    "State",
    "What does the state-space path remember, and for how long?",
    "Norms say how much a head's state holds, half-lives how long it keeps it.",
    "03_ssm_as_attention",
)
opened = current_capture()
describe_capture(opened)
show(opened)

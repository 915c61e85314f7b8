"""State: what the model carries along: workspace slots, state-space heads, and the blocks that attention selects."""

from typing import Any

import streamlit as st

from dashboards.shared.charts import chart, theme
from dashboards.shared.view import (
    OpenCapture,
    choose_block,
    current_capture,
    describe_capture,
    fragment,
    has_group,
)
from hydra_lab import figures, metrics
from hydra_lab.capture import open_capture

# Group of the capture, path, reader of the record, and the metrics (whose figures have the same names).
VIEWS = {
    "State space": ("ssm", "ssm", metrics.state_record, ("state_norms", "half_life")),
    "Workspace": ("workspace", "workspace", metrics.workspace_record, ("slot_reads", "slot_writes")),
    "Attention": ("attention", "attention", metrics.selection_record, ("selection_use",)),
}


@st.cache_data(max_entries=64, show_spinner="Reading the capture …")
def results(key: tuple[str, str, int], view: str, layer: int, rows: tuple[int, ...]) -> list[Any]:
    """The metrics of a view."""
    _, _, read, names = VIEWS[view]
    record = read(open_capture(key[0]), layer, samples=list(rows))
    return [getattr(metrics, name)(record) for name in names]


@fragment
def show(opened: OpenCapture) -> None:
    left, right = st.columns(2)
    with left:
        view = st.segmented_control(
            "Show", list(VIEWS), default="State space", required=True, key="show", bind="query-params"
        )
    assert view is not None
    group, path, _, names = VIEWS[view]
    if not has_group(opened, group, path):
        return
    with right:
        layer = choose_block("Block", metrics.layers_of(opened.capture, group), f"{path}_block")
    rows = tuple(int(row) for row in opened.rows)
    drawn = results(opened.key, view, layer, rows)
    # The workspace's figures are two plots wide each: one below the other.
    places = [st.container() for _ in names] if view == "Workspace" else st.columns(len(names))
    for place, name, result in zip(places, names, drawn, strict=True):
        with place:
            figure = getattr(figures, name)(result, path_use=opened.path_use, theme=theme())
            chart(figure, name)


st.title("State")
opened = current_capture()
describe_capture(opened)
show(opened)

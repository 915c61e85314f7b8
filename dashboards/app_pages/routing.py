"""Routing: what the experts of a capture are used for."""

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from dashboards.shared.charts import chart, theme
from dashboards.shared.page import introduce
from dashboards.shared.selection import linked, linked_several
from dashboards.shared.view import (
    CaptureKey,
    OpenCapture,
    current_capture,
    describe_capture,
    fragment,
    has_group,
    has_raw,
    whole_capture,
)
from hydra_lab import metrics
from hydra_lab.capture import open_capture
from hydra_lab.figures import routing as figures

VIEWS = {
    "Load": ("expert_load",),
    "Domains": ("expert_by_domain",),
    "Position": ("expert_by_chunk", "expert_by_position"),
    "Pairs": ("co_activation",),
    "Switching": ("switch_rate",),
}


@st.cache_data(max_entries=64, show_spinner="Reading the routing …")
def result(key: CaptureKey, name: str, rows: NDArray[np.int64] | None) -> object:
    """The metric `name` of the samples `rows`; of all of them, from the summary, where that is None."""
    if rows is None:
        return getattr(metrics, name)(metrics.summarized_routing(whole_capture(key)))
    record = metrics.routing_record(open_capture(key[0]), samples=rows, weights=name == "expert_by_position")
    return getattr(metrics, name)(record)


@fragment
def show(opened: OpenCapture) -> None:
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    with left:
        view = st.segmented_control("Show", list(VIEWS), required=True, key=linked("show", list(VIEWS)))
    with right:
        domains = st.pills(
            "Domains", opened.domains, selection_mode="multi", key=linked_several("domains", opened.domains),
            help="None chosen: all of them.",
        )  # fmt: skip
    assert view is not None
    rows = None if opened.whole is not None else opened.rows
    if domains:
        if not has_raw(opened, "routing", "A choice of domains"):
            return
        labels = opened.capture.domains
        rows = np.array([row for row in opened.rows if labels[row] in domains], dtype=np.int64)
        if len(rows) == 0:
            st.info("None of the samples that are read has these domains: choose others.")
            return
        if len(opened.rows) < opened.capture.num_samples:
            st.caption(f"Drawn from {len(rows):,} samples of these domains, evenly spaced.")
    for name in VIEWS[view]:
        figure = getattr(figures, name)
        chart(figure(result(opened.key, name, rows), path_use=opened.path_use, theme=theme()), name)


introduce(
    "Routing",
    "Which experts take each chunk, and by what margin?",
    "All tokens of a chunk use the same experts, chosen at its first token.",
    "05_chunk_experts",
)
opened = current_capture()
describe_capture(opened)
if has_group(opened, "routing", "moe"):
    show(opened)

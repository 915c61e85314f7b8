"""Routing: which experts took each chunk, by what margin, and how the load spreads."""

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from dashboards.shared.changes import changes_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.components import routing_lanes
from dashboards.shared.page import introduce
from dashboards.shared.prompt import describe_prompt, prompt_ids, trace
from dashboards.shared.results import draw
from dashboards.shared.selection import linked, linked_several, pick, picked
from dashboards.shared.view import (
    OpenCapture,
    current_capture,
    current_job,
    current_model,
    describe_capture,
    fragment,
    has_group,
    has_raw,
)
from hydra_lab import figures, metrics
from hydra_lab.widgets import routing_lanes_payload
from hydra_lab.widgets.text import token_texts, visible

VIEWS = {
    "Load": ("expert_load",),
    "Margin": ("routing_margin",),
    "Domains": ("expert_by_domain",),
    "Position": ("expert_by_chunk", "expert_by_position"),
    "Pairs": ("co_activation",),
    "Flow": ("routing_flow",),
    "Switching": ("switch_rate",),
    "Sparsity": ("expert_sparsity",),
}
YOUR_PROMPT = "Your prompt"
ONLY_RAW = ("routing_flow",)
"""Metrics that follow a chunk through the blocks, which no summary keeps."""


@fragment
def show(opened: OpenCapture) -> None:
    views = [*VIEWS, YOUR_PROMPT]
    view = st.segmented_control("Show", views, required=True, key=linked("show", views))
    assert view is not None
    if view == YOUR_PROMPT:
        show_prompt()
        return
    domains = st.pills(
        "Domains", opened.domains, selection_mode="multi", key=linked_several("domains", opened.domains),
        help="None chosen: all of them.",
    )  # fmt: skip
    rows: NDArray[np.int64] | None = None
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
        if name in ONLY_RAW:
            if not has_raw(opened, "routing", "The flow between blocks"):
                continue
            draw(opened, "routing", name, rows=opened.rows if rows is None else rows)
        else:
            draw(opened, "routing", name, rows=rows)


def show_prompt() -> None:
    """The experts of every chunk of the prompt, untouched and with the interventions in force."""
    loaded = current_model()
    ids = prompt_ids(loaded)
    describe_prompt(loaded, ids)
    texts = token_texts(loaded.tokenizer, ids)
    chunk_size = loaded.model.config.moe_chunk_size
    words = [
        visible("".join(texts[start : start + chunk_size]))[:80].replace("<", "&lt;")
        for start in range(0, len(texts), chunk_size)
    ]
    routed = metrics.routing_map(metrics.routing_record(trace(loaded, ids, changes_in_force()).capture))
    position = min(int(picked("token", 0)), len(ids) - 1)
    payload = routing_lanes_payload(routed, words, theme=theme())
    routing_lanes(payload, "lanes", on_select=lambda cell: pick(block=cell[0], token=cell[1] * chunk_size))
    figure = figures.routing_map(routed, path_use=current_job().path_use, theme=theme(), chunk_texts=words)
    chart(figure, "your-routing")
    st.caption(
        f"Click a cell to pick its chunk. Picked: token {position}, in chunk {position // chunk_size}, "
        f"“{words[position // chunk_size]}”. To force another expert there, open Intervene."
    )
    st.page_link("app_pages/intervene.py", label="Force another expert", icon=":material/science:")


introduce(
    "Routing",
    "Which experts take each chunk, and by what margin?",
    "All tokens of a chunk use the same experts, chosen at its first token; an expert without load is dead.",
    "05_chunk_experts",
)
opened = current_capture()
describe_capture(opened)
if has_group(opened, "routing", "moe"):
    show(opened)

"""Memory: which rows of the product-key memory a capture reads, and when its gate opens."""

from typing import Any

import streamlit as st

from dashboards.shared.charts import chart, theme
from dashboards.shared.sources import tokenizer_of
from dashboards.shared.tokens import token_texts
from dashboards.shared.view import (
    OpenCapture,
    choose_block,
    current_capture,
    current_view,
    describe_capture,
    fragment,
    has_group,
)
from hydra_lab import metrics
from hydra_lab.capture import open_capture
from hydra_lab.figures import memory as figures


@st.cache_resource(max_entries=2, show_spinner="Reading the memory …")
def record(key: tuple[str, str, int], layer: int, rows: tuple[int, ...]) -> metrics.LookupRecord:
    """The lookups of one block; shared, not copied, because it is large."""
    return metrics.lookup_record(open_capture(key[0]), layer, samples=list(rows))


@st.cache_data(max_entries=16, show_spinner=False)
def results(key: tuple[str, str, int], layer: int, rows: tuple[int, ...]) -> tuple[Any, Any, Any, int]:
    """Use, gate by domain, map, and the most read row."""
    lookups = record(key, layer, rows)
    return (
        metrics.memory_use(lookups),
        metrics.beta_by_domain(lookups),
        metrics.memory_map(lookups),
        int(lookups.mass().argmax()),
    )


@fragment
def show(opened: OpenCapture) -> None:
    layer = choose_block("Block", metrics.layers_of(opened.capture, "memory"), "block")
    rows = tuple(int(row) for row in opened.rows)
    use, beta, heat_map, busiest = results(opened.key, layer, rows)
    options = {"path_use": opened.path_use, "theme": theme()}
    left, right = st.columns(2)
    with left:
        chart(figures.memory_use(use, **options), "use")
    with right:
        chart(figures.beta_by_domain(beta, **options), "beta")
    left, right = st.columns(2)
    with left:
        st.caption("Click a cell to see who reads its rows, or type the row beside the map.")
        picked = chart(
            figures.memory_map(heat_map, **options), "map", on_select="rerun", selection_mode="points"
        )
    with right:
        show_row(opened, layer, rows, heat_map, busiest, picked)


def show_row(
    opened: OpenCapture, layer: int, rows: tuple[int, ...], heat_map: Any, busiest: int, picked: Any
) -> None:
    n1, n2 = heat_map.num_keys
    points = picked.selection.points if picked else []
    if points and points != st.session_state.get("picked"):
        st.session_state["picked"] = points
        st.session_state["row"] = int(points[0]["y"]) * n2 + int(points[0]["x"])
    st.session_state.setdefault("row", busiest)
    address = int(
        st.number_input(
            f"Row of the value table (0 to {n1 * n2 - 1:,}; first key × {n2} + second key)",
            min_value=0,
            max_value=n1 * n2 - 1,
            step=1,
            key="row",
            bind="query-params",
        )
    )
    st.caption(
        f"Row {address:,} is first key {address // n2}, second key {address % n2}. The most read is {busiest:,}."
    )
    top = metrics.top_tokens(record(opened.key, layer, rows), address)
    tokenizer = tokenizer_of(opened.capture, current_view().shown)
    if tokenizer is None:
        labels = ["token"] * len(top.tokens)
        st.caption("The tokens' texts are unknown: open the capture together with the model that made it.")
    else:
        labels = token_texts(tokenizer, top.tokens.tolist())
    chart(figures.top_tokens(top, labels, path_use=opened.path_use, theme=theme()), "top-tokens")


st.title("Memory")
opened = current_capture()
describe_capture(opened)
if has_group(opened, "memory", "memory"):
    show(opened)

"""Memory: which rows of the product-key memory are read, on what text, when its gate opens, and what an edit moves."""

import streamlit as st

from dashboards.shared.charts import chart, theme
from dashboards.shared.contexts import draw_contexts, known_tokenizer
from dashboards.shared.facts import show_facts
from dashboards.shared.page import introduce
from dashboards.shared.results import draw, measured, source
from dashboards.shared.selection import linked, linked_flag
from dashboards.shared.view import (
    OpenCapture,
    choose_block,
    current_capture,
    describe_capture,
    fragment,
    has_group,
    has_raw,
)
from hydra_lab import figures, metrics
from hydra_lab.metrics.memory_counts import counts_of
from hydra_lab.widgets.text import token_texts

VIEWS = {
    "Rows": ("memory_use", "beta_by_domain"),
    "Dead rows": ("dead_addresses",),
    "By domain": ("memory_use_by_domain",),
    "By head": ("memory_use_by_head",),
    "Facts": (),
}


@fragment
def show(opened: OpenCapture) -> None:
    left, right = st.columns([3, 2])
    with left:
        view = st.segmented_control("Show", list(VIEWS), required=True, key=linked("memory", list(VIEWS)))
    assert view is not None
    with right:
        layer = choose_block("Block", opened.layers_of("memory"))
    if view == "Facts":
        show_facts(layer)
        return
    for place, name in zip(st.columns(len(VIEWS[view])), VIEWS[view], strict=True):
        with place:
            draw(opened, "memory", name, layer)
    if view == "Rows":
        show_rows(opened, layer)


def show_rows(opened: OpenCapture, layer: int) -> None:
    heat_map = measured(opened, "memory", "memory_map", layer)
    n1, n2 = heat_map.num_keys
    left, right = st.columns(2)
    with left:
        st.caption("Click a cell to see who reads its rows, or type the row beside the map.")
        draw(
            opened, "memory", "memory_map", layer,
            picks=lambda point: {"row": int(point["y"]) * n2 + int(point["x"])},
        )  # fmt: skip
    with right:
        busiest = int(counts_of(source(opened, "memory", layer)).weight.argmax())
        address = st.number_input(
            f"Row of the value table (0 to {n1 * n2 - 1:,}; first key × {n2} + second key)",
            min_value=0, max_value=n1 * n2 - 1, step=1, key=linked("row", range(n1 * n2), busiest),
        )  # fmt: skip
        st.caption(
            f"Row {address:,} is first key {address // n2}, second key {address % n2}. The most read is {busiest:,}."
        )
        if opened.whole is None:
            show_tokens(opened, layer, address)
            return
        draw_contexts(opened, "memory row", layer, address)
        if has_raw(opened, "memory", "The count of tokens that read a row") and st.toggle(
            "Count the tokens that read it", key=linked_flag("count"),
            help=f"Reads the lookups of {len(opened.rows):,} samples.",
        ):  # fmt: skip
            show_tokens(opened, layer, address)


def show_tokens(opened: OpenCapture, layer: int, address: int) -> None:
    """The tokens that read a row most, counted in the raw lookups."""
    top = metrics.top_tokens(source(opened, "memory", layer, opened.rows), address)
    ids = top.tokens.tolist()
    tokenizer = known_tokenizer(opened)
    labels = ["token"] * len(ids) if tokenizer is None else token_texts(tokenizer, ids)
    chart(figures.top_tokens(top, labels, path_use=opened.path_use, theme=theme()), "top-tokens")


introduce(
    "Memory",
    "Which rows of the table does the model read, and on what text?",
    "A row is named by two half-keys, the axes of the map; beta is how far the block opens to what was read.",
    "07_product_keys",
)
opened = current_capture()
describe_capture(opened)
if has_group(opened, "memory", "memory"):
    show(opened)

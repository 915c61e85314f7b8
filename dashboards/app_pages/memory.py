"""Memory: which rows of the product-key memory a capture reads, and when its gate opens."""

from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from dashboards.shared.charts import chart, theme
from dashboards.shared.page import introduce
from dashboards.shared.selection import linked, linked_flag
from dashboards.shared.sources import tokenizer_of
from dashboards.shared.tokens import token_texts
from dashboards.shared.view import (
    CaptureKey,
    OpenCapture,
    choose_block,
    current_capture,
    current_view,
    describe_capture,
    fragment,
    has_group,
    has_raw,
    whole_capture,
)
from hydra_lab import metrics
from hydra_lab.capture import open_capture
from hydra_lab.figures import memory as figures
from hydra_lab.figures.contexts import top_contexts

TOKENS_BEFORE = 8
"""Tokens shown before the one that reads a row."""


@st.cache_resource(max_entries=2, show_spinner="Reading the memory …")
def record(key: CaptureKey, layer: int, rows: NDArray[np.int64]) -> metrics.LookupRecord:
    """The lookups of one block; shared, not copied, because it is large."""
    return metrics.lookup_record(open_capture(key[0]), layer, samples=rows)


@st.cache_data(max_entries=16, show_spinner=False)
def results(key: CaptureKey, layer: int, rows: NDArray[np.int64] | None) -> tuple[Any, Any, Any, int]:
    """Use, gate by domain, map, and the most read row, of the samples `rows`; of all of them, from the summary, where
    that is None."""
    if rows is None:
        counts = metrics.summarized_lookups(whole_capture(key), layer)
    else:
        counts = record(key, layer, rows).counts
    return (
        metrics.memory_use(counts),
        metrics.beta_by_domain(counts),
        metrics.memory_map(counts),
        int(counts.weight.argmax()),
    )


@fragment
def show(opened: OpenCapture) -> None:
    layer = choose_block("Block", opened.layers_of("memory"))
    rows = None if opened.whole is not None else opened.rows
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
        n2 = heat_map.num_keys[1]
        chart(
            figures.memory_map(heat_map, **options),
            "map",
            picks=lambda point: {"row": int(point["y"]) * n2 + int(point["x"])},
        )
    with right:
        show_row(opened, layer, heat_map, busiest)


def show_row(opened: OpenCapture, layer: int, heat_map: Any, busiest: int) -> None:
    n1, n2 = heat_map.num_keys
    address = int(
        st.number_input(
            f"Row of the value table (0 to {n1 * n2 - 1:,}; first key × {n2} + second key)",
            min_value=0,
            max_value=n1 * n2 - 1,
            step=1,
            key=linked("row", range(n1 * n2), busiest),
        )
    )
    st.caption(
        f"Row {address:,} is first key {address // n2}, second key {address % n2}. The most read is {busiest:,}."
    )
    tokenizer = tokenizer_of(opened.capture, current_view().shown)
    if tokenizer is None:
        st.caption("The tokens' texts are unknown: open the capture together with the model that made it.")
    if opened.whole is None:
        show_tokens(opened, layer, address, tokenizer)
        return
    config = opened.capture.attributes["config"]
    top = metrics.top_contexts(opened.whole.summary, "memory row", layer, address, config=config)
    texts = context_texts(opened, top, tokenizer)
    chart(top_contexts(top, texts, path_use=opened.path_use, theme=theme()), "contexts")
    if has_raw(opened, "memory", "The count of tokens that read a row") and st.toggle(
        "Count the tokens that read it", key=linked_flag("count"),
        help=f"Reads the lookups of {len(opened.rows):,} samples.",
    ):  # fmt: skip
        show_tokens(opened, layer, address, tokenizer)


def show_tokens(opened: OpenCapture, layer: int, address: int, tokenizer: Any | None) -> None:
    """The tokens that read a row most, counted in the raw lookups."""
    top = metrics.top_tokens(record(opened.key, layer, opened.rows), address)
    ids = top.tokens.tolist()
    labels = ["token"] * len(ids) if tokenizer is None else token_texts(tokenizer, ids)
    chart(figures.top_tokens(top, labels, path_use=opened.path_use, theme=theme()), "top-tokens")


def context_texts(opened: OpenCapture, top: metrics.TopContexts, tokenizer: Any | None) -> list[str]:
    """The token of each context, after a few that stand before it."""
    tokens = opened.capture["tokens"]["token"].isel(sample=top.sample).to_numpy()
    texts: list[str] = []
    for ids, position in zip(tokens, top.position.tolist(), strict=True):
        if tokenizer is None:
            texts.append(f"token id {ids[position]}")
            continue
        start = max(0, position - TOKENS_BEFORE)
        *before, last = token_texts(tokenizer, ids[start : position + 1].tolist())
        texts.append(("…" if start else "") + "".join(before) + f"[{last}]")
    return texts


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

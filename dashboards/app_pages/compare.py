"""Compare: two captures of the same text: what moved in loss and decisions, by domain and token."""

from pathlib import Path

import numpy as np
import streamlit as st

from dashboards.shared.charts import chart, theme
from dashboards.shared.components import token_strip
from dashboards.shared.contexts import known_tokenizer
from dashboards.shared.page import introduce
from dashboards.shared.selection import linked
from dashboards.shared.view import (
    CaptureKey,
    OpenCapture,
    current_view,
    fragment,
    open_captures,
)
from hydra_lab import figures, metrics
from hydra_lab.capture import open_capture
from hydra_lab.capture.comparison import Comparison, compare
from hydra_lab.widgets import token_strip_payload
from hydra_lab.widgets.text import token_texts

VIEWS = ("What moved", "Token by token", "Router saturation")
MOST_SATURATION_SAMPLES = 256


@st.cache_resource(max_entries=4, show_spinner="Comparing …")
def comparison(first: CaptureKey, second: CaptureKey) -> Comparison:
    """The comparison of two captures; it holds them open, and no raw array."""
    return compare(open_capture(first[0]), open_capture(second[0]))


@st.cache_data(max_entries=8, show_spinner="Reading the routing …")
def saturation(keys: tuple[CaptureKey, ...], names: tuple[str, ...]) -> metrics.RouterSaturation:
    """How many of the last capture's choices the earlier ones made already, on the same first samples."""
    captures = [open_capture(key[0]) for key in keys]
    rows = np.arange(min(MOST_SATURATION_SAMPLES, *(each.num_samples for each in captures)))
    records = [metrics.routing_record(each, samples=rows, weights=False) for each in captures]
    return metrics.router_saturation(records[:-1], records[-1], labels=names[:-1])


@fragment
def show(captures: dict[str, OpenCapture]) -> None:
    names = list(captures)
    left, right = st.columns(2)
    with left:
        first = st.selectbox("First", names, key=linked("first", names))
    with right:
        second = st.selectbox("Second", names, key=linked("second", names, names[-1]))
    view = st.segmented_control("Show", VIEWS, required=True, key=linked("compare", VIEWS))
    if view == "Router saturation":
        result = saturation(tuple(each.key for each in captures.values()), tuple(map(short, names)))
        chart(figures.router_saturation(result, theme=theme()), "saturation")
        st.caption("In the order of the captures on the command line; the last one counts as final.")
        return
    if first == second:
        st.info("Both are the same capture: choose two.")
        return
    found = comparison(captures[first].key, captures[second].key)
    if view == "What moved":
        chart(figures.loss_change(found, theme=theme()), "loss-change")
        chart(figures.decision_changes(found, theme=theme()), "decision-changes")
    else:
        show_tokens(found, captures[first])


def show_tokens(found: Comparison, opened: OpenCapture) -> None:
    """The change of the loss of every token of one sample."""
    sample = int(
        st.number_input(
            f"Sample (0 to {opened.capture.num_samples - 1:,})", 0, opened.capture.num_samples - 1, step=1,
            key=linked("sample", range(opened.capture.num_samples)), width=220,
        )
    )  # fmt: skip
    tokenizer = known_tokenizer(opened)
    tokens = opened.capture.plain("tokens").isel(sample=sample)
    length = int(tokens["length"])
    ids = tokens["token"].to_numpy()[:length].tolist()
    texts = [f"⟨{each}⟩" for each in ids] if tokenizer is None else token_texts(tokenizer, ids)
    change = np.asarray(found.loss_difference.isel(sample=sample))[:length].astype(np.float64)
    reach = max(0.5, float(np.nanmax(np.abs(change), initial=0.0)))
    what = "change of the loss, nats"
    st.caption(f"Sample {sample:,} of domain {opened.capture.domains[sample]}: second minus first.")
    payload = token_strip_payload(
        texts, change, label=what, limits=(-reach, reach), diverging=True, theme=theme()
    )
    token_strip(payload, "compared-tokens")


def short(name: str) -> str:
    return Path(name).name


introduce(
    "Compare",
    "What moved from one capture to another of the same text?",
    "Differences are second minus first: of two checkpoints, or of a run with an intervention and one without.",
    "10_ablate_force_patch",
)
shown = current_view().shown
captures = open_captures()
if len(captures) < 2:
    model = next(iter(shown.models), "MODEL")
    st.info(
        f"Two captures of the same text are needed, and {len(captures)} {'is' if len(captures) == 1 else 'are'} open. "
        f"For example: `hydra-lab capture {model} notes.txt --out before.zarr`, then `hydra-lab capture "
        f"{model} notes.txt "
        f"--out after.zarr --intervene 'memory[*].cut()'`, then `hydra-lab dashboard {model} before.zarr after.zarr` "
        f"(or open them in the sidebar)."
    )
else:
    show(captures)

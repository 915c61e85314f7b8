"""Attention: which earlier blocks are selected, how far back, and what dense attention would have wanted."""

import streamlit as st
import torch

from dashboards.shared.changes import changes_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.page import introduce
from dashboards.shared.prompt import describe_prompt, prompt_ids
from dashboards.shared.results import draw
from dashboards.shared.selection import linked
from dashboards.shared.view import (
    OpenCapture,
    capture_again,
    choose_block,
    current_capture,
    current_job,
    current_model,
    describe_capture,
    fragment,
    has_group,
)
from hydra_lab import figures
from hydra_lab.attribution import dense_attention
from hydra_lab.interventions import intervened
from hydra_lab.locks import model_lock

VIEWS = ("Selected blocks", "Probability by kind", "Your prompt")


@fragment
def show(opened: OpenCapture) -> None:
    left, right = st.columns([3, 2])
    with left:
        view = st.segmented_control("Show", VIEWS, required=True, key=linked("attention", VIEWS))
    if view == "Probability by kind":
        show_mass(opened)
        return
    with right:
        layer = choose_block("Block", opened.layers_of("attention"))
    if view == "Selected blocks":
        draw(opened, "attention", "selection_use", layer)
    else:
        show_wanted(layer)


def show_mass(opened: OpenCapture) -> None:
    if "mass" in opened.capture.groups or (opened.whole is not None and "mass" in opened.whole.summary):
        draw(opened, "mass", "mass_by_kind")
    else:
        st.info(
            "Where the probability went (window, first block, selected blocks) is a signal that captures "
            "keep on request: "
            f"{capture_again(opened, 'mass')}"
        )


def show_wanted(layer: int) -> None:
    """Dense attention over the prompt, beside what the sparse one shows."""
    loaded = current_model()
    ids = prompt_ids(loaded)
    describe_prompt(loaded, ids)
    config = loaded.model.config
    st.caption(
        f"A query sees its last {config.attention_window:,} tokens, the first block, and "
        f"{config.attention_num_selected} "
        f"selected blocks of {config.attention_block_size}: only a longer prompt leaves something out."
    )
    with model_lock(loaded.model), intervened(loaded.model, *changes_in_force()):
        result = dense_attention(loaded.model, torch.tensor([ids]), layer)
    chart(figures.dense_attention(result, path_use=current_job().path_use, theme=theme()), "dense-attention")


introduce(
    "Attention",
    "Which earlier blocks does attention select, how far back, and what would it have wanted?",
    "Every query sees its window and the first block; beyond them only the few blocks that it selects.",
    "04_sparse_attention",
)
opened = current_capture()
describe_capture(opened)
if has_group(opened, "attention", "attention"):
    show(opened)

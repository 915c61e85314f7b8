"""State: what the state-space path remembers and for how long, and what another prompt's state would change."""

from typing import Any

import numpy as np
import streamlit as st
import torch

from dashboards.shared.changes import changes_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.components import token_strip
from dashboards.shared.page import introduce
from dashboards.shared.prompt import describe_prompt, encode, prompt_ids, trace
from dashboards.shared.results import draw
from dashboards.shared.selection import linked
from dashboards.shared.view import (
    OpenCapture,
    choose_block,
    current_capture,
    current_job,
    current_model,
    describe_capture,
    fragment,
    has_group,
    has_raw,
)
from hydra_lab import figures
from hydra_lab.attribution import ssm_attention
from hydra_lab.interventions import PatchState, capture_state
from hydra_lab.locks import model_lock
from hydra_lab.widgets import token_strip_payload
from hydra_lab.widgets.text import token_texts, visible

VIEWS = {
    "Norms": ("state_norms", "norm_growth"),
    "Half-lives": ("half_life", "receptive_field"),
    "By position": ("half_life_by_position", "state_saturation"),
    "By domain": ("half_life_by_domain",),
}
SAMPLE_BY_SAMPLE = {
    "norm_growth": "The growth of norms",
    "receptive_field": "The reach of a state",
    "state_saturation": "The saturation of states",
}
"""Metrics that look at every sample by itself, which a summary does not hold; and what to call them."""
ATTENTION, PATCH = "As attention", "Patch"
MOST_TOKENS = 512
"""Tokens of a prompt whose effective attention is drawn: a figure has at most 512 x 512 cells."""
OTHER_PROMPT = (
    "recall: Fenmar = Q; Kelgor = D; Zorlin = Z; Belquin = R; ? Zorlin = Z; ? Kelgor = D; ? Belquin = R;\n"
    * 2
)


@fragment
def show(opened: OpenCapture) -> None:
    left, right = st.columns([3, 2])
    views = [*VIEWS, ATTENTION, PATCH]
    with left:
        view = st.segmented_control("Show", views, required=True, key=linked("state", views))
    assert view is not None
    with right:
        layer = choose_block("Block", opened.layers_of("ssm"))
    if view == ATTENTION:
        show_attention(layer)
    elif view == PATCH:
        show_patch(layer)
    else:
        for place, name in zip(st.columns(len(VIEWS[view])), VIEWS[view], strict=True):
            with place:
                if name not in SAMPLE_BY_SAMPLE:
                    draw(opened, "ssm", name, layer)
                elif has_raw(opened, "ssm", SAMPLE_BY_SAMPLE[name]):
                    draw(opened, "ssm", name, layer, rows=opened.rows)


def show_attention(layer: int) -> None:
    """The path of one block on the prompt, written as an attention matrix."""
    loaded = current_model()
    ids = prompt_ids(loaded)
    describe_prompt(loaded, ids)
    if len(ids) > MOST_TOKENS:
        raise ValueError(
            f"The prompt has {len(ids):,} tokens, and at most {MOST_TOKENS} can be drawn: shorten it."
        )
    heads = ["mean of all heads", *map(str, range(loaded.model.config.ssm_num_heads))]
    head = st.selectbox("Head", heads, key=linked("head", heads))
    with model_lock(loaded.model):
        chosen = None if head == heads[0] else int(head)
        result = ssm_attention(loaded.model, torch.tensor([ids]), layer, heads=chosen)
    words = [visible(text) for text in token_texts(loaded.tokenizer, ids)]
    figure = figures.ssm_attention(result, words, path_use=current_job().path_use, theme=theme())
    chart(figure, "ssm-attention")


def show_patch(layer: int) -> None:
    """The state of another prompt put in place of this one's, and how far the predictions then move."""
    loaded = current_model()
    ids = prompt_ids(loaded)
    describe_prompt(loaded, ids)
    other = st.text_area(
        "The prompt whose state is taken, after its last whole chunk", height=90,
        key=linked("other", None, OTHER_PROMPT),
    )  # fmt: skip
    other_ids = encode(loaded.tokenizer, other)
    size = loaded.model.config.ssm_chunk_size
    ends = range(size - 1, len(ids), size)
    other_end = len(other_ids) // size * size - 1
    if not ends or other_end < 0:
        raise ValueError(f"Both prompts need a whole chunk of {size} tokens: lengthen the shorter one.")
    options = list(ends)
    where = st.select_slider(
        "Put it after token", options, key=linked("patched", options),
        help="Only a chunk's last token has a state to patch.",
    )  # fmt: skip
    with model_lock(loaded.model):
        states: Any = capture_state(
            loaded.model, torch.tensor([other_ids[: other_end + 1]]), block=layer, position=other_end
        )
    patch = PatchState(block=layer, position=int(where), state=states)
    run = trace(loaded, ids, (*changes_in_force(), patch))
    st.markdown(
        f"Predictions after token {where} move by {run.divergence[int(where) :].mean():.4f} nats on average, "
        f"the loss of the later tokens by {np.nanmean((run.loss - trace(loaded, ids).loss)[int(where) + 1 :]):+.4f}."
        if int(where) + 1 < len(ids)
        else "No token follows the patched state: choose an earlier one."
    )
    texts = token_texts(loaded.tokenizer, ids)
    limits = (0.0, max(0.1, float(run.divergence.max())))
    name = "shift of the prediction, nats"
    payload = token_strip_payload(
        texts, run.divergence, label=name, limits=limits, selected=int(where), theme=theme()
    )
    token_strip(payload, "patched-tokens")


introduce(
    "State",
    "What does the state-space path remember, and for how long?",
    "Norms say how much a head's state holds, half-lives after how many tokens half of it has decayed.",
    "03_ssm_as_attention",
)
opened = current_capture()
describe_capture(opened)
if has_group(opened, "ssm", "ssm"):
    show(opened)

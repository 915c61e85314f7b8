"""Workspace: what is written to, kept in and read from each slot."""

import streamlit as st

from dashboards.shared.changes import changes_in_force, put_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.contexts import draw_contexts
from dashboards.shared.page import introduce
from dashboards.shared.prompt import describe_prompt, prompt_ids, trace
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
)
from hydra_lab import figures, metrics
from hydra_lab.interventions import FreezeSlot, SwapSlots, ZeroSlot

VIEWS = {
    "Reads": ("slot_reads", "read_entropy"),
    "Writes": ("slot_writes", "write_entropy"),
    "Read after write": ("read_lag",),
}
CONTEXTS, YOUR_PROMPT = "Texts of a slot", "Your prompt"


@fragment
def show(opened: OpenCapture) -> None:
    left, right = st.columns([3, 2])
    views = [*VIEWS, CONTEXTS, YOUR_PROMPT]
    with left:
        view = st.segmented_control("Show", views, required=True, key=linked("workspace", views))
    assert view is not None
    with right:
        layer = choose_block("Block", opened.layers_of("workspace"))
    num_slots = int(opened.capture.attributes["config"]["workspace_num_slots"])
    if view == CONTEXTS:
        slot = choose_slot(num_slots)
        left, right = st.columns(2)
        with left:
            draw_contexts(opened, "slot write", layer, slot)
        with right:
            draw_contexts(opened, "slot read", layer, slot)
    elif view == YOUR_PROMPT:
        show_prompt(layer, num_slots)
    else:
        for name in VIEWS[view]:
            draw(opened, "workspace", name, layer)


def choose_slot(num_slots: int) -> int:
    return int(
        st.number_input(
            f"Slot (0 to {num_slots - 1})",
            0,
            num_slots - 1,
            step=1,
            key=linked("slot", range(num_slots)),
            width=200,
        )
    )


def show_prompt(layer: int, num_slots: int) -> None:
    """Reads and writes along the prompt; buttons that change a slot."""
    loaded = current_model()
    ids = prompt_ids(loaded)
    describe_prompt(loaded, ids)
    slot = choose_slot(num_slots)
    other = (slot + 1) % num_slots
    changes = {
        f"Zero slot {slot}": ZeroSlot(block=layer, slot=slot),
        f"Freeze slot {slot}": FreezeSlot(block=layer, slot=slot),
        f"Swap slots {slot} and {other}": SwapSlots(block=layer, first=slot, second=other),
    }
    in_force = changes_in_force()
    with st.container(horizontal=True):
        for label, change in changes.items():
            st.button(
                label, icon=":material/science:", on_click=put_in_force, args=([*in_force, change],),
                disabled=change in in_force or (slot == other),
            )  # fmt: skip
    run = trace(loaded, ids, in_force)
    if in_force:
        st.markdown(
            f"With the interventions in force the predictions move by {run.divergence.mean():.4f} nats per "
            f"token on average."
        )
    record = metrics.workspace_record(run.capture, layer)
    for name in ("slot_writes", "slot_reads"):
        result = getattr(metrics, name)(record)
        chart(getattr(figures, name)(result, path_use=current_job().path_use, theme=theme()), f"your-{name}")


introduce(
    "Workspace",
    "What is written to each slot, how long is it kept, and who reads it?",
    "A chunk writes all slots at once; its own tokens read what the chunks before it left there.",
    "06_workspace",
)
opened = current_capture()
describe_capture(opened)
if has_group(opened, "workspace", "workspace"):
    show(opened)

"""The interventions in force: what every page runs the model with, shown in the sidebar, removed by one click, and part
of the address as text."""

from collections.abc import Sequence

import streamlit as st

from dashboards.shared.selection import LONGEST_IN_ADDRESS, pick, picked
from hydra_lab.config import HydraConfig
from hydra_lab.interventions import Intervention, parse

KEY = "intervene"
_LONGEST_SHOWN = 120  # characters of one change in the sidebar


def changes_in_force() -> tuple[Intervention, ...]:
    """What the model runs with on every page.

    Raises:
        ValueError: the address asks for what is not in the vocabulary.
    """
    text = picked(KEY, "")
    return parse(text) if text else ()


def put_in_force(changes: Sequence[Intervention | str]) -> None:
    """Run the model with these, and no others, from now on; for callbacks."""
    pick(**{KEY: "; ".join(map(str, changes))})


def show_changes(config: HydraConfig | None) -> None:
    """Draw the interventions in force, each with a button that removes it.

    Args:
        config: of the chosen model, against which they are checked; None where no model is open.
    """
    try:
        changes = changes_in_force()
        if config is not None:
            for change in changes:
                change.blocks_in(config)  # raises where this model cannot take it
    except ValueError as error:
        st.error(f"The intervention is not applied: {error}", icon=":material/error:")
        st.button("Remove the intervention", key="remove-changes", on_click=put_in_force, args=((),))
        st.stop()
    if not changes:
        st.caption("Intervention in force: none.")
        return
    with st.container(border=True):
        st.markdown(f"**:material/science: In force: {len(changes)} of your changes**")
        for index, change in enumerate(changes):
            text = str(change)
            shown = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} …"
            with st.container(horizontal=True, vertical_alignment="center"):
                st.markdown(f"`{shown}`", width="stretch")
                st.button(
                    "Remove", icon=":material/close:", type="tertiary", key=f"remove-change-{index}",
                    on_click=put_in_force, args=([each for other, each in enumerate(changes) if other != index],),
                )  # fmt: skip
        if len(changes) > 1:
            st.button("Remove all", key="remove-changes", on_click=put_in_force, args=((),))
        if len("; ".join(map(str, changes))) > LONGEST_IN_ADDRESS:
            st.caption("Too long for the address: a link to this page does not carry it.")

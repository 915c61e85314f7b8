"""The widgets of `hydra_lab.widgets` in the dashboard, as Streamlit components over the same JavaScript."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.components.v2 import component

from hydra_lab.widgets import module_text, style_text
from hydra_lab.widgets.base import Payload


def _component(name: str, module: str) -> Any:
    return component(f"hydra_{name}", css=style_text(), js=module_text(module, "streamlit"))


_TOKEN_STRIP = _component("token_strip", "token_strip")
_BLOCK_DIAGRAM = _component("block_diagram", "scene")
_ROUTING_LANES = _component("routing_lanes", "scene")

_SCRIPTS = Path(st.__file__).parent / "static" / "static" / "js"
_LOAD_WHEN_IDLE = """
export default function () {
  const beside = document.querySelector("script[type=module][src]").src;
  const load = () => NAMES.forEach((name) => import(new URL(name, beside).href));
  setTimeout(() => requestIdleCallback(load), 1000);
}
"""
_PLOTLY = component(
    "hydra_plotly",
    js=_LOAD_WHEN_IDLE.replace(
        "NAMES", json.dumps([path.name for path in _SCRIPTS.glob("PlotlyChart.*.js")])
    ),
)


def token_strip(payload: Payload, key: str, *, on_select: Callable[[int], None] | None = None) -> int | None:
    """Draw a payload of `hydra_lab.widgets.token_strip_payload`; the token that the user selected last, or None.

    The payload's own `selected` is outlined where it has one, else the user's.

    Args:
        key: of the component, unique on the page.
        on_select: called with the token before the rerun.
    """
    return _mount(_TOKEN_STRIP, payload, key, on_select, lambda value: int(value))


def block_diagram(
    payload: Payload, key: str, *, on_select: Callable[[tuple[int, str]], None] | None = None
) -> tuple[int, str] | None:
    """Draw a payload of `hydra_lab.widgets.block_diagram_payload`; the (block, path) that the user selected last, or
    None; else as `token_strip`."""
    return _mount(_BLOCK_DIAGRAM, payload, key, on_select, lambda value: (int(value[0]), str(value[1])))


def routing_lanes(
    payload: Payload, key: str, *, on_select: Callable[[tuple[int, int]], None] | None = None
) -> tuple[int, int] | None:
    """Draw a payload of `hydra_lab.widgets.routing_lanes_payload`; the (block, chunk) that the user selected last, or
    None; else as `token_strip`."""
    return _mount(_ROUTING_LANES, payload, key, on_select, lambda value: (int(value[0]), int(value[1])))


def load_plotly_when_idle() -> None:
    """Have the browser load Streamlit's script for figures (4.7 MB) once a page without figures is at rest, so that the
    page which the visitor opens next does not wait for it."""
    _PLOTLY(key="plotly")


def _mount(
    component: Any,
    payload: Payload,
    key: str,
    on_select: Callable[[Any], None] | None,
    read: Callable[[Any], Any],
) -> Any:
    def selected() -> Any:
        value = st.session_state[key]["selected"] if key in st.session_state else None
        return None if value is None else read(value)

    def changed() -> None:
        value = selected()
        if on_select is not None and value is not None:
            on_select(value)

    shown = payload if payload["selected"] is not None else payload | {"selected": selected()}
    result = component(key=key, data=shown, default={"selected": None}, on_selected_change=changed)
    return None if result.selected is None else read(result.selected)

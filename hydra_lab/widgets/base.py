"""What the widgets share: one module text per widget, a payload and a selection, and a picture where no script runs."""

from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, Literal

import anywidget
import traitlets

Payload = dict[str, Any]
"""What a widget's JavaScript draws: strings, numbers, lists and dicts alone, so `json.dumps` takes it."""

Host = Literal["anywidget", "streamlit"]
MAX_DRAWN = 600
"""Cells of a static picture; what lies beyond is counted in a sentence."""


@cache
def module_text(name: str, host: Host) -> str:
    """The ES module of a widget: shared helpers, its `draw(element, payload, {selected, onSelect})`, and the host's
    adapter.

    Args:
        name: "token_strip", or "scene" for the block diagram and the routing lanes.
    """
    return "\n".join(_static(f"{part}.js") for part in ("common", name, host))


@cache
def style_text() -> str:
    """The style sheet of all widgets."""
    return _static("widgets.css")


def _static(name: str) -> str:
    return files("hydra_lab.widgets").joinpath("static", name).read_text(encoding="utf-8")


class Widget(anywidget.AnyWidget):
    """A widget over a payload.

    Attributes:
        payload: what is drawn.
        selected: what is selected, or None; set by the user and from Python.
    """

    _css = style_text()
    payload = traitlets.Dict().tag(sync=True)
    selected: Any = traitlets.Any(None, allow_none=True).tag(sync=True)

    def to_svg(self) -> str:
        """A picture of the widget as it is, for places where no script runs."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        return data | {"image/svg+xml": self.to_svg()}, metadata


def svg_document(width: float, height: float, label: str, body: list[str]) -> str:
    """A picture on a transparent background; text without a fill of its own has a grey that reads on black and
    white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" fill="#767676" '
        f'font-family="ui-monospace, monospace" font-size="12">{"".join(body)}</svg>'
    )


def svg_text(x: float, y: float, text: str, attributes: str = "") -> str:
    """Escaped text in a picture; its white space is kept."""
    # xml:space keeps runs of spaces; characters that XML forbids have been made visible by the payload.
    return f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve" {attributes}>{escape(text)}</text>'

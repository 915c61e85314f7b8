"""Drawings made of a few SVG shapes: computed in Python once, drawn by scene.js and by `scene_svg`."""

from collections.abc import Sequence
from html import escape
from typing import Any

import traitlets

from hydra_lab.widgets.base import Payload, Widget, module_text, svg_document, svg_text

Shape = dict[str, Any]
"""{tag, attributes, text}: one SVG element."""


def shape(tag: str, text: str | None = None, **attributes: str | float) -> Shape:
    """An SVG element; `_` in a name stands for `-`."""
    named = {name.replace("_", "-"): value for name, value in attributes.items()}
    return {"tag": tag, "attributes": named, "text": text}


def scene_item(value: Sequence[Any], details: Sequence[tuple[str, str]], shapes: Sequence[Shape]) -> Payload:
    """Something that can be selected, the first of `shapes` being the area that takes the pointer."""
    return {"value": list(value), "details": [list(pair) for pair in details], "shapes": list(shapes)}


def scene_svg(payload: Payload) -> str:
    """A picture of a scene, with its selection outlined."""
    body = [svg_text(4, 14, payload["label"]), '<g transform="translate(0 22)">']
    body += [_element(each) for each in payload["shapes"]]
    for row in payload["rows"]:
        for item in row:
            first, *others = item["shapes"]
            if item["value"] == payload["selected"]:
                first = first | {"attributes": first["attributes"] | {"stroke": "#d55e00", "stroke-width": 2}}
            body += map(_element, (first, *others))
    body.append("</g>")
    height = payload["height"] + 30
    if payload["note"]:
        body.append(svg_text(4, height, payload["note"]))
        height += 12
    return svg_document(max(payload["width"], 640), height, payload["label"], body)


def _element(each: Shape) -> str:
    attributes = " ".join(f'{name}="{escape(str(value))}"' for name, value in each["attributes"].items())
    return f"<{each['tag']} {attributes}>{escape(each['text'] or '')}</{each['tag']}>"


def check_choice(selected: Sequence[Any] | None, rows: Sequence[Sequence[Payload]]) -> list[Any] | None:
    """`selected` as a list.

    Raises:
        ValueError: no item has that value.
    """
    if selected is None:
        return None
    value = list(selected)
    if not any(item["value"] == value for row in rows for item in row):
        raise ValueError(f"selected is {tuple(value)}, and nothing drawn has that value")
    return value


class SceneWidget(Widget):
    """A drawing of shapes, of which one can be selected.

    Attributes:
        selected: value of the item that is selected, or None.
    """

    _esm = module_text("scene", "anywidget")
    selected = traitlets.List(None, allow_none=True).tag(sync=True)

    def __init__(self, payload: Payload) -> None:
        super().__init__(payload=payload, selected=payload["selected"])

    @traitlets.validate("selected")
    def _check_selected(self, proposal: Any) -> list[Any] | None:
        return check_choice(proposal["value"], self.payload["rows"])

    def to_svg(self) -> str:
        """The drawing as a picture."""
        return scene_svg(self.payload | {"selected": self.selected})

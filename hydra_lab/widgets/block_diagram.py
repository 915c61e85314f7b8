"""Hydra's blocks with the paths that branch off the residual stream, as one prompt used them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import traitlets
from numpy.typing import ArrayLike

from hydra_lab.capture.in_memory import InMemoryCapture
from hydra_lab.figures.theme import Theme, colours
from hydra_lab.metrics.records import captured_path_use
from hydra_lab.path_use import IDLE_SHARE, PathUse
from hydra_lab.taps import PATHS
from hydra_lab.widgets.base import Payload, Widget, module_text
from hydra_lab.widgets.scene import Shape, check_choice, scene_item, scene_svg, shape

_BLOCK, _LANE, _TOP, _LEG = (
    176,
    34,
    34,
    8,
)  # pixels: a block's width, a path's height, the stream's y, between legs
_MAX_LINE = 14  # pixels of a path that makes the whole update


def block_diagram_payload(
    layers: Sequence[int],
    paths: Sequence[str],
    share: ArrayLike,
    *,
    gates: Mapping[tuple[int, str], float] | None = None,
    selected: tuple[int, str] | None = None,
    theme: Theme = "light",
) -> Payload:
    """What `BlockDiagram` draws.

    Args:
        layers: [Y] indices of the blocks.
        paths: [P] names of the paths.
        share: [Y, P] each path's share of its block's update, 0..1; NaN where the block lacks the path.
        gates: learned scalar g of (block, path), where it is to be shown.
        selected: (block, path) that is outlined.

    Raises:
        ValueError: the shapes disagree, a share is not in 0..1, or nothing drawn is `selected`.
    """
    part = np.asarray(share, dtype=np.float64)
    if part.shape != (len(layers), len(paths)):
        raise ValueError(f"share has shape {part.shape} for {len(layers)} blocks and {len(paths)} paths")
    known = part[~np.isnan(part)]
    if ((known < 0) | (known > 1)).any():
        raise ValueError(f"a share is {known[(known < 0) | (known > 1)][0]}; shares lie in 0..1")
    palette = dict(zip(PATHS, colours(len(PATHS), theme), strict=True))
    width = _BLOCK * len(layers) + 24
    shapes: list[Shape] = [
        shape("path", d=f"M4 {_TOP}H{width - 6}", stroke="currentColor", stroke_width=3, fill="none"),
        shape("path", d=f"M{width - 12} {_TOP - 6}l10 6l-10 6z", fill="currentColor"),
    ]
    rows: list[list[Payload]] = [[] for _ in paths]
    for y, layer in enumerate(layers):
        left = 12 + y * _BLOCK
        shapes.append(shape("text", f"block {layer}", x=left, y=16, fill="currentColor", font_weight="bold"))
        for p, path in enumerate(paths):
            if np.isnan(part[y, p]):
                continue
            gate = None if gates is None else gates[layer, path]
            rows[p].append(
                _path_item(int(layer), path, float(part[y, p]), gate, left, p, len(paths), palette)
            )
    kept = [row for row in rows if row]
    return {
        "label": "Paths of each block by their share of the block's update",
        "width": width,
        "height": _TOP + 16 + _LANE * len(paths) + 8,
        "shapes": shapes,
        "rows": kept,
        "legend": None,
        "note": "Line width and %: mean over the tokens of the path's share of its block's update; g: the path's gate. "
        f"A path below {IDLE_SHARE:.0%} is idle (dashed).",
        "selected": check_choice(selected, kept),
        "theme": theme,
    }


def _path_item(
    layer: int,
    path: str,
    share: float,
    gate: float | None,
    left: int,
    place: int,
    num_paths: int,
    palette: Mapping[str, str],
) -> Payload:
    """One path: down from the stream, along its own lane, and up to the stream again; deeper lanes lie outside."""
    idle = share < IDLE_SHARE
    inset = (num_paths - 1 - place) * _LEG
    start, end, depth = left + inset, left + _BLOCK - 16 - inset, _TOP + 16 + _LANE * (place + 1) - 6
    inner = left + (num_paths - 1) * _LEG + 2
    value = f"{share:.0%}" + (" idle" if idle else "")
    named = f"{path} {value}" + ("" if gate is None else f" g {gate:.2f}")
    line = shape(
        "path",
        d=f"M{start} {_TOP}V{depth - 6}q0 6 6 6H{end - 6}q6 0 6 -6V{_TOP}",
        stroke=palette[path],
        stroke_width=f"{1.5 + share * (_MAX_LINE - 1.5):.1f}",
        stroke_dasharray="3 3" if idle else "none",
        fill="none",
    )
    area = shape(
        "rect",
        x=inner - 2,
        y=depth - 25,
        width=_BLOCK - 16 - 2 * (num_paths - 1) * _LEG,
        height=_LANE - 4,
        rx=3,
        fill="transparent",
    )
    text = shape("text", named, x=inner, y=depth - 11, fill="currentColor", font_size=10.5)
    details = [("block", str(layer)), ("path", path), ("share of the update", f"{share:.1%}")]
    if gate is not None:
        details.append(("gate g", f"{gate:.4f}"))
    if idle:
        details.append(("use", "idle: what it decides changes little here"))
    return scene_item((layer, path), details, (area, line, text))


class BlockDiagram(Widget):
    """Hydra's blocks; takes the arguments of `block_diagram_payload`.

    Attributes:
        selected: [block, path] that is selected, or None.
    """

    _esm = module_text("scene", "anywidget")
    selected = traitlets.List(None, allow_none=True).tag(sync=True)

    def __init__(self, layers: Sequence[int], paths: Sequence[str], share: ArrayLike, **options: Any) -> None:
        payload = block_diagram_payload(layers, paths, share, **options)
        super().__init__(payload=payload, selected=payload["selected"])

    @traitlets.validate("selected")
    def _check_selected(self, proposal: Any) -> list[Any] | None:
        return check_choice(proposal["value"], self.payload["rows"])

    @classmethod
    def of_path_use(cls, use: PathUse, **options: Any) -> "BlockDiagram":
        """The shares of a measured path use."""
        return cls(use.layers, use.paths, use.share, **options)

    @classmethod
    def of_capture(cls, capture: InMemoryCapture, sample: int = 0, **options: Any) -> "BlockDiagram":
        """The shares on one sample of a batch with the signal `paths`."""
        return cls.of_path_use(captured_path_use(capture, samples=[sample]), **options)

    def to_svg(self) -> str:
        """The diagram as a picture."""
        return scene_svg(self.payload | {"selected": self.selected})

"""Hydra's blocks with the paths that branch off the residual stream: how one prompt used them, or what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hydra_lab.accounting import COMPONENTS, FlopTable, ParameterTable, StateTable
from hydra_lab.capture.in_memory import InMemoryCapture
from hydra_lab.figures.theme import Theme, colours, quantity
from hydra_lab.metrics.records import captured_path_use
from hydra_lab.path_use import IDLE_SHARE, PathUse
from hydra_lab.taps import PATHS
from hydra_lab.widgets.base import Payload
from hydra_lab.widgets.scene import SceneWidget, Shape, check_choice, scene_item, shape

# Pixels: a block's width, a path's height, the stream's y, between legs.
_BLOCK, _LANE, _TOP, _LEG = 164, 36, 34, 8
_MAX_LINE = 14  # pixels of the widest path


@dataclass(frozen=True)
class _Path:
    """How one path of one block is drawn.

    Attributes:
        share: 0..1, in %.
        width: of its line, 0..1 of the widest.
        below: second line of its label.
        details: shown when it is pointed at.
        dashed: whether its line is.
    """

    share: float
    width: float
    below: str
    details: tuple[tuple[str, str], ...]
    dashed: bool = False


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
    drawn: dict[tuple[int, str], _Path] = {}
    for y, p in zip(*np.nonzero(~np.isnan(part)), strict=True):
        where, value = (int(layers[y]), paths[int(p)]), float(part[y, p])
        idle = value < IDLE_SHARE
        below = ["idle"] if idle else []
        details = [("share of the update", f"{value:.1%}")]
        if gates is not None:
            below.insert(0, f"g {gates[where]:.2f}")
            details.append(("gate g", f"{gates[where]:.4f}"))
        if idle:
            details.append(("use", "idle: what it decides changes little here"))
        drawn[where] = _Path(value, value, ", ".join(below), tuple(details), dashed=idle)
    return _payload(
        layers,
        paths,
        drawn,
        label="Paths of each block by their share of the block's update",
        note="Line width and %: mean over the tokens of the path's share of its block's update; g: the path's gate. "
        f"A path below {IDLE_SHARE:.0%} is idle (dashed).",
        selected=selected,
        theme=theme,
    )


def cost_diagram_payload(
    table: ParameterTable | FlopTable | StateTable,
    *,
    selected: tuple[int, str] | None = None,
    theme: Theme = "light",
) -> Payload:
    """The same diagram of what each path costs: parameters, FLOPs per token, or bytes of decode state.

    Args:
        table: of `hydra_lab.accounting`.
        selected: (block, path) that is outlined.

    Raises:
        ValueError: nothing drawn is `selected`.
    """
    match table:
        case ParameterTable():
            what, unit, whole = "parameters", "", float(table.total)
            of = f"the model's {quantity(whole, unit)} parameters"
            costs = [(row, {"all": row.total, "active per token": row.active}) for row in table.rows]
        case FlopTable():
            what, unit, whole = "FLOPs per token", "FLOP", table.prefill
            of = f"the {quantity(whole, unit)} per token in one pass over {table.context_length:,} tokens"
            costs = [
                (row, {"in one pass": row.prefill, "decoding the last": row.decode}) for row in table.rows
            ]
        case StateTable():
            what, unit, whole = "bytes of state", "B", float(table.num_bytes)
            of = f"the {quantity(whole, unit)} that decoding keeps for {table.context_length:,} tokens"
            costs = [(row, {"per sequence": row.num_bytes}) for row in table.rows]
    first = [(row.component, row.block, next(iter(numbers.values()))) for row, numbers in costs]
    widest = max(cost for name, _, cost in first if name in PATHS)
    drawn: dict[tuple[int, str], _Path] = {}
    outside = dict.fromkeys(COMPONENTS, 0.0)
    for (name, block, cost), (_, numbers) in zip(first, costs, strict=True):
        if name in PATHS and block is not None:
            details = [(f"{what}, {kind}", f"{number:,.0f}") for kind, number in numbers.items()]
            drawn[block, name] = _Path(cost / whole, cost / widest, quantity(cost, unit), tuple(details))
        else:
            outside[name] += cost
    others = [f"{name} {quantity(cost, unit)} ({cost / whole:.0%})" for name, cost in outside.items() if cost]
    return _payload(
        sorted({block for block, _ in drawn}),
        [path for path in PATHS if any(path == name for _, name in drawn)],
        drawn,
        label=f"Paths of each block by their {what}",
        note=f"Line width and %: the path's share of {of}."
        + (f" Outside the paths: {', '.join(others)}." if others else ""),
        selected=selected,
        theme=theme,
    )


def _payload(
    layers: Sequence[int],
    paths: Sequence[str],
    drawn: Mapping[tuple[int, str], _Path],
    *,
    label: str,
    note: str,
    selected: tuple[int, str] | None,
    theme: Theme,
) -> Payload:
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
        for place, path in enumerate(paths):
            if (int(layer), path) in drawn:
                one = drawn[int(layer), path]
                rows[place].append(_item(int(layer), path, one, left, place, len(paths), palette[path]))
    kept = [row for row in rows if row]
    return {
        "label": label,
        "width": width,
        "height": _TOP + 16 + _LANE * len(paths) + 8,
        "shapes": shapes,
        "rows": kept,
        "legend": None,
        "note": note,
        "selected": check_choice(selected, kept),
        "theme": theme,
    }


def _item(layer: int, path: str, one: _Path, left: int, place: int, num_paths: int, colour: str) -> Payload:
    """One path: down from the stream, along its own lane, and up to the stream again; deeper lanes lie outside."""
    inset = (num_paths - 1 - place) * _LEG
    start, end, depth = left + inset, left + _BLOCK - 14 - inset, _TOP + 16 + _LANE * (place + 1) - 6
    inner = start + 10
    line = shape(
        "path",
        d=f"M{start} {_TOP}V{depth - 6}q0 6 6 6H{end - 6}q6 0 6 -6V{_TOP}",
        stroke=colour,
        stroke_width=f"{1.5 + one.width * (_MAX_LINE - 1.5):.1f}",
        stroke_dasharray="3 3" if one.dashed else "none",
        fill="none",
    )
    area = shape(
        "rect", x=inner - 2, y=depth - 30, width=end - inner - 6, height=_LANE - 6, rx=3, fill="transparent"
    )  # fmt: skip
    texts = (
        shape("text", f"{path} {one.share:.0%}", x=inner, y=depth - 20, fill="currentColor", font_size=10),
        shape("text", one.below, x=inner, y=depth - 9, fill="currentColor", font_size=9),
    )
    details = (("block", str(layer)), ("path", path), *one.details)
    return scene_item((layer, path), details, (area, line, *texts))


class BlockDiagram(SceneWidget):
    """Hydra's blocks; takes the arguments of `block_diagram_payload`.

    Attributes:
        selected: [block, path] that is selected, or None.
    """

    def __init__(self, layers: Sequence[int], paths: Sequence[str], share: ArrayLike, **options: Any) -> None:
        super().__init__(block_diagram_payload(layers, paths, share, **options))

    @classmethod
    def of_path_use(cls, use: PathUse, **options: Any) -> "BlockDiagram":
        """The shares of a measured path use."""
        return cls(use.layers, use.paths, use.share, **options)

    @classmethod
    def of_capture(cls, capture: InMemoryCapture, sample: int = 0, **options: Any) -> "BlockDiagram":
        """The shares on one sample of a batch with the signal `paths`."""
        return cls.of_path_use(captured_path_use(capture, samples=[sample]), **options)


class CostDiagram(SceneWidget):
    """Hydra's blocks by what each path costs; takes the arguments of `cost_diagram_payload`.

    Attributes:
        selected: [block, path] that is selected, or None.
    """

    def __init__(self, table: ParameterTable | FlopTable | StateTable, **options: Any) -> None:
        super().__init__(cost_diagram_payload(table, **options))

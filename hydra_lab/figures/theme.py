"""How every figure looks: colours that colour-blind readers tell apart, a light and a dark template, titles
that say what is averaged over how many samples, and the use of the path that a figure speaks of.

The templates belong to the figures themselves, so a notebook's or Streamlit's default template does not
change them.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.colors import get_colorscale

from hydra_lab.path_use import PathUse

Theme = Literal["light", "dark"]

# Okabe & Ito (2008), ordered so that neighbours differ most; their black is the text colour of the theme.
_OKABE_ITO = {
    "light": ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"),
    "dark": ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442"),
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
PATTERNS = ("", "/", ".", "x", "\\", "-", "|", "+")
MAGNITUDE = "Viridis"
DIVERGING = "RdBu_r"
"""Blue below a true zero, red above it; `finish` puts the colours of `diverging` in its place."""

_TEXT = {"light": "#1b1f24", "dark": "#e8eaed"}
_MUTED = {"light": "#57606a", "dark": "#a9b1ba"}
_PAPER = {"light": "#ffffff", "dark": "#0e1117"}
_GRID = {"light": "#e3e6ea", "dark": "#2b313b"}
_WARNING = {"light": "#b34700", "dark": "#ff9d5c"}
# As many colours as the light theme's scale has: the zero is near the paper, and what is far from it stands out.
_DARK_DIVERGING = (
    "#9fd3ff", "#63b3ee", "#3a8ccb", "#2b6496", "#254260", "#20262f",
    "#55302d", "#8a3f37", "#c3574a", "#ea8570", "#ffbfae",
)  # fmt: skip
_LINE_HEIGHT = 16  # pixels of a line below the title


def colours(count: int, theme: Theme = "light") -> list[str]:
    """`count` category colours: Okabe-Ito with the theme's text colour as the eighth, then again from the
    start (give each category a symbol, pattern or label too)."""
    _check(theme)
    palette = (*_OKABE_ITO[theme], text_colour(theme))
    return [palette[i % len(palette)] for i in range(count)]


def diverging(theme: Theme) -> list[str]:
    """Colours on both sides of a true zero, evenly spaced from far below (blue) to far above (red)."""
    _check(theme)
    return list(_DARK_DIVERGING) if theme == "dark" else [colour for _, colour in get_colorscale(DIVERGING)]


def hatching(index: int, theme: Theme) -> dict[str, Any]:
    """Pattern of the `index`-th category's bars, drawn over their colour."""
    return {
        "shape": PATTERNS[index % len(PATTERNS)],
        "fillmode": "overlay",
        "fgcolor": paper_colour(theme),
        "fgopacity": 0.55,
        "solidity": 0.18,
        "size": 7,
    }


def text_colour(theme: Theme) -> str:
    """Colour of text on the theme's paper."""
    _check(theme)
    return _TEXT[theme]


def muted_colour(theme: Theme) -> str:
    """Colour of references and remarks on the theme's paper."""
    _check(theme)
    return _MUTED[theme]


def paper_colour(theme: Theme) -> str:
    """Background of the theme's figures."""
    _check(theme)
    return _PAPER[theme]


def dark_equivalents() -> dict[str, str]:
    """The dark theme's colour for each colour of the light one, so that a page can turn a light figure dark."""
    categories = zip(_OKABE_ITO["light"], _OKABE_ITO["dark"], strict=True)
    scale = zip(diverging("light"), diverging("dark"), strict=True)
    parts = ((part["light"], part["dark"]) for part in (_TEXT, _MUTED, _PAPER, _GRID, _WARNING))
    return {light.lower(): dark.lower() for light, dark in (*categories, *scale, *parts) if light != dark}


def template(theme: Theme) -> go.layout.Template:
    """The figures' own plotly template."""
    _check(theme)
    axis = {
        "gridcolor": _GRID[theme],
        "linecolor": _MUTED[theme],
        "zerolinecolor": _GRID[theme],
        "ticks": "outside",
        "tickcolor": _MUTED[theme],
        "title": {"standoff": 8},
        "automargin": True,
    }
    colorbar = {
        "outlinewidth": 0,
        "thickness": 14,
        "ticks": "outside",
        "title": {"side": "top", "font": {"size": 12}},
    }
    return go.layout.Template(
        layout={
            "paper_bgcolor": _PAPER[theme],
            "plot_bgcolor": _PAPER[theme],
            "font": {"family": "Inter, Helvetica, Arial, sans-serif", "size": 13, "color": _TEXT[theme]},
            "title": {
                "x": 0.0,
                "xref": "paper",
                "xanchor": "left",
                "font": {"size": 12, "color": _MUTED[theme]},
            },
            "colorway": colours(8, theme),
            "xaxis": axis,
            "yaxis": axis,
            "coloraxis": {"colorbar": colorbar, "colorscale": MAGNITUDE},
            "colorscale": {"sequential": MAGNITUDE, "diverging": diverging(theme)},
            "legend": {"orientation": "v", "yanchor": "top", "y": 1.0, "xanchor": "left", "x": 1.02},
            "hoverlabel": {"font": {"size": 12}},
            "margin": {"l": 60, "r": 30, "b": 55},
        },
        data={"heatmap": [go.Heatmap(colorbar=colorbar)]},
    )


def finish(
    figure: go.Figure,
    *,
    title: str,
    subtitle: str,
    theme: Theme,
    path: str | None = None,
    layer: int | None = None,
    path_use: PathUse | None = None,
    height: int | None = None,
) -> go.Figure:
    """Give `figure` its template, title, subtitle and the theme's colours on both sides of a zero, and say how much the
    model uses the path it speaks of.

    Args:
        title: what is shown.
        subtitle: what it is a mean of, and the sample size; may break lines with <br>.
        path: the path whose decisions are shown; None for figures that speak of no path.
        layer: the block, where the figure shows one.
        path_use: measured path use; without it the figure says that it was not measured.
    """
    lines = [subtitle]
    if path is not None:
        lines.append(path_use_line(path, layer, path_use, theme))
    remarks = "<br>".join(lines)
    top = 50 + _LINE_HEIGHT * (remarks.count("<br>") + 1) + (22 if figure["layout"]["annotations"] else 8)
    heading = f'<span style="font-size:17px;color:{text_colour(theme)}">{title}</span>'
    figure.update_layout(
        template=template(theme),
        title={
            "text": f"{heading}<br>{remarks}",
            "yref": "container",
            "y": 1.0,
            "yanchor": "top",
            "pad": {"t": 24},
        },
        margin={"t": top},
    )
    if height is not None:
        figure.update_layout(height=height + top)
    _take_diverging(figure, theme)
    return figure


def _take_diverging(figure: go.Figure, theme: Theme) -> None:
    """Give the theme's colours to whatever was made with `DIVERGING`."""
    if theme == "light":
        return
    named = diverging("light")
    for scaled in (figure["layout"]["coloraxis"], *figure.select_traces({"type": "heatmap"})):
        if [colour for _, colour in scaled["colorscale"] or ()] == named:
            scaled["colorscale"] = diverging(theme)


def known_margin(right: int) -> dict[str, Any]:
    """Margins with room for numbers at the axes, which plotly need not find: else it draws a figure twice.

    Args:
        right: pixels for a colour bar or a legend.
    """
    return {"autoexpand": False, "l": 66, "r": right, "b": 55}


def path_use_line(path: str, layer: int | None, path_use: PathUse | None, theme: Theme) -> str:
    """The line of a subtitle that says how much the model uses a path; coloured as a warning where it is
    idle."""
    if path_use is None:
        return f"use of the {path} path: not measured"
    text = path_use.describe(path, layer)
    if path_use.is_idle(path, layer):
        return f'<span style="color:{_WARNING[theme]}"><b>{text}</b></span>'
    return text


def block_labels(layers: Sequence[int], path: str, path_use: PathUse | None) -> list[str]:
    """Axis labels of blocks; with path use, each with the path's share of the block's update, and "idle"
    where it is."""
    if path_use is None:
        return [f"block {layer}" for layer in layers]
    labels: list[str] = []
    for layer in layers:
        share = 100 * path_use.share_of(path, layer)
        idle = ", idle" if path_use.is_idle(path, layer) else ""
        labels.append(f"block {layer} ({share:.0f}% of update{idle})")
    return labels


def counted(count: int, noun: str) -> str:
    """A count with its noun and thousands separators: "1 sample", "1,024 samples"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def quantity(number: float, unit: str) -> str:
    """Three digits and a prefix: `quantity(1_234_567, "FLOP")` is "1.23 MFLOP"; bytes ("B") count in powers of 1024."""
    step, prefixes = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (1000, ("", "k", "M", "G", "T"))
    place = 0
    while number >= 999.5 and place < len(prefixes) - 1:
        number, place = number / step, place + 1
    digits = f"{number:.0f}" if place == 0 or number >= 99.95 else f"{number:.3g}"
    return f"{digits} {prefixes[place]}{unit}".rstrip()


def as_text(text: str) -> str:
    """Text of the model on one line, and shown as it is: not as markup."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("&", "&amp;").replace("<", "&lt;")


def index_axis(count: int) -> dict[str, Any]:
    """Ticks of an axis of `count` heads, slots or experts: whole numbers, few enough for a phone."""
    return {"tick0": 0, "dtick": max(1, -(-count // 12))}


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks between `low` and `high` (both > 0) of a logarithmic axis or colour scale: at least three round numbers
    (1, 3, 10, ..., else 1, 2, 5, 10, ..., else every digit), or else the two ends."""
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for digits in ((1, 3), (1, 2, 5), range(1, 10)):
        ticks = np.outer(powers, digits).ravel()
        ticks = ticks[(ticks >= low * 0.999) & (ticks <= high * 1.001)]
        if len(ticks) > 2:
            return ticks.tolist()
    return [float(f"{low:.3g}"), float(f"{high:.3g}")]


def _check(theme: str) -> None:
    if theme not in _TEXT:
        raise ValueError(f"theme {theme!r} is not one of {', '.join(_TEXT)}")

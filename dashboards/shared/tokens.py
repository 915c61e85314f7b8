"""Tokens of a text as coloured spans."""

import html
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from plotly.colors import sample_colorscale, unlabel_rgb

from hydra_lab.figures.theme import DIVERGING, MAGNITUDE, Theme, colours
from hydra_lab.widgets.text import shown
from hydra_lab.widgets.text import token_texts as token_texts
from hydra_lab.widgets.text import visible as visible


def expert_spans(
    texts: Sequence[str],
    experts: Sequence[Sequence[int]],
    num_experts: int,
    chunk_size: int,
    theme: Theme,
    chosen: int | None = None,
) -> str:
    """HTML of tokens coloured by the first of their chunk's `experts`; each chunk begins with the numbers of all.

    Args:
        experts: of each chunk, those that carry weight, best first; a chunk without any stays without colour.
        chosen: token to outline.
    """
    palette = colours(num_experts, theme)
    pieces: list[str] = []
    for index, text in enumerate(texts):
        chunk = index // chunk_size
        used = list(dict.fromkeys(experts[chunk]))
        if index % chunk_size == 0:
            numbers = "+".join(map(str, used)) or "none"
            pieces.append(f'<span class="chunk" title="chunk {chunk}">{numbers}</span>')
        title = f"token {index}, chunk {chunk}, experts {', '.join(map(str, used)) or 'none'}"
        css = (
            f"background:{_faint(palette[used[0]])};box-shadow:inset 0 -2px {palette[used[0]]}"
            if used
            else ""
        )
        pieces.append(_span(text, css, title, index == chosen))
    return _box(pieces)


def magnitude_spans(
    texts: Sequence[str],
    values: NDArray[np.float64],
    limits: tuple[float, float],
    what: str,
    *,
    diverging: bool = False,
    chosen: int | None = None,
) -> str:
    """HTML of tokens coloured by `values` [L] between `limits`; NaN stays without colour."""
    low, high = limits
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    scale = DIVERGING if diverging else MAGNITUDE
    pieces: list[str] = []
    for index, (text, value) in enumerate(zip(texts, values, strict=True)):
        if np.isnan(value):
            pieces.append(_span(text, "", f"token {index}: no {what}", index == chosen))
            continue
        colour = str(sample_colorscale(scale, float(share[index]))[0])
        ink = "#111" if _luminance(colour) > 0.45 else "#fff"
        title = f"token {index}: {what} {value:.3f}"
        pieces.append(_span(text, f"background:{colour};color:{ink}", title, index == chosen))
    return _box(pieces)


def expert_legend(num_experts: int, theme: Theme) -> str:
    """HTML that names the experts' colours."""
    keys = [
        f'<span class="key" style="background:{_faint(colour)};box-shadow:inset 0 -2px {colour}">{expert}</span>'
        for expert, colour in enumerate(colours(num_experts, theme))
    ]
    return f'<div class="legend">First-choice expert: {"".join(keys)} The small numbers are a chunk\'s experts.</div>'


def magnitude_legend(limits: tuple[float, float], what: str, *, diverging: bool = False) -> str:
    """HTML of the colour scale."""
    steps = map(str, sample_colorscale(DIVERGING if diverging else MAGNITUDE, 9))
    bar = f'<span class="key" style="background:linear-gradient(90deg,{",".join(steps)})">{"&nbsp;" * 24}</span>'
    return f'<div class="legend">{html.escape(what)}: {limits[0]:.2f} {bar} {limits[1]:.2f}</div>'


def _span(text: str, css: str, title: str, chosen: bool) -> str:
    body = html.escape(shown(text))
    kind = "token chosen" if chosen else "token"
    return f'<span class="{kind}" style="{css}" title="{html.escape(title)}">{body}</span>'


def _box(pieces: list[str]) -> str:
    return f'<div class="tokens" dir="auto">{"".join(pieces)}</div>'


def _faint(colour: str) -> str:
    return f"color-mix(in srgb, {colour} 38%, transparent)"


def _luminance(colour: str) -> float:
    red, green, blue = (channel / 255 for channel in unlabel_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

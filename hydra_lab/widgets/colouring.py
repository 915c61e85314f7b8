"""Colours of cells, and the ink that can be read on each."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from plotly.colors import sample_colorscale, unlabel_rgb

from hydra_lab.figures.theme import MAGNITUDE, Theme
from hydra_lab.figures.theme import diverging as diverging_colours

DARK_INK, LIGHT_INK = "#000000", "#ffffff"


def channels(colour: str) -> tuple[float, float, float]:
    """Red, green and blue in 0..1 of "#rrggbb" or "rgb(r, g, b)"."""
    if colour.startswith("#"):
        red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    else:
        red, green, blue = unlabel_rgb(colour)
    return red / 255, green / 255, blue / 255


def luminance(colour: str) -> float:
    """Relative luminance in 0..1 (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio in 1..21 (WCAG 2.2); 4.5 is enough for text."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink(background: str) -> str:
    """Black or white, whichever has more contrast; it is at least 4.58 on any colour."""
    return max((DARK_INK, LIGHT_INK), key=lambda colour: contrast(colour, background))


def limits_of(values: NDArray[Any], diverging: bool) -> tuple[float, float]:
    """Ends of the colour scale: the smallest and largest known value, symmetric where it diverges around zero."""
    known = values[np.isfinite(values)]
    if not len(known):
        return (-1.0, 1.0) if diverging else (0.0, 1.0)
    if diverging:
        end = float(np.abs(known).max()) or 1.0
        return -end, end
    return float(known.min()), float(known.max())


def value_colours(
    values: NDArray[Any], limits: tuple[float, float], *, diverging: bool = False, theme: Theme = "light"
) -> list[str | None]:
    """Colour of each of `values` [L] between `limits`; None for what is not finite."""
    low, high = limits
    known = np.isfinite(values)
    share = np.clip((np.where(known, values, low) - low) / max(high - low, 1e-12), 0, 1)
    scale = diverging_colours(theme) if diverging else MAGNITUDE
    sampled = sample_colorscale(scale, share.astype(float).tolist()) if len(values) else []
    return [str(colour) if is_known else None for colour, is_known in zip(sampled, known, strict=True)]

"""Figures as files."""

from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go


class NoBrowserError(RuntimeError):
    """PNG files cannot be drawn because no Chromium or Chrome is installed."""


def write_html(figures: Mapping[str, go.Figure], directory: str | Path) -> dict[str, Path]:
    """Write each figure as `<name>.html`, interactive and without a network: plotly's script lies beside
    them.

    Returns:
        name -> path.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name, figure in figures.items():
        paths[name] = directory / f"{name}.html"
        figure.write_html(paths[name], include_plotlyjs="directory", full_html=True)
    return paths


def write_png(
    figures: Mapping[str, go.Figure], directory: str | Path, *, width: int = 1000, scale: float = 2.0
) -> dict[str, Path]:
    """Write each figure as `<name>.png`, all with one browser.

    Args:
        width: in layout pixels; the height is the figure's own.
        scale: image pixels per layout pixel.

    Returns:
        name -> path.

    Raises:
        NoBrowserError: no Chromium or Chrome was found (set BROWSER_PATH to one).
    """
    import kaleido
    from choreographer.browsers.chromium import ChromeNotFoundError  # pyright: ignore[reportPrivateImportUsage]

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.png" for name in figures}
    tasks = [
        {
            "fig": figure,
            "path": str(paths[name]),
            "opts": {
                "format": "png",
                "width": width,
                "height": figure["layout"]["height"] or 500,
                "scale": scale,
            },
        }
        for name, figure in figures.items()
    ]
    try:
        kaleido.write_fig_from_object_sync(tasks, cancel_on_error=True, kopts={"n": 1, "mathjax": False})
    except ChromeNotFoundError as error:
        raise NoBrowserError("no Chromium or Chrome found; install one or set BROWSER_PATH") from error
    return paths

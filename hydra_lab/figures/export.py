"""Figures as files."""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

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


def to_csv(figure: go.Figure) -> str:
    """The numbers of a figure as a table, one line per bar, point or cell.

    Returns:
        CSV with the columns `series` (name of the bars or line, empty where it has none), the titles of the two axes
        (`x` and `y` where panels differ or an axis has none), `value` (of a cell; empty elsewhere), `error` (half width
        of an error bar above the point; empty where there is none). Cells without a value are left out.
    """
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(
        (
            "series",
            _axis_title(figure.select_xaxes(), "x"),
            _axis_title(figure.select_yaxes(), "y"),
            "value",
            "error",
        )
    )
    for trace in figure.data:
        table.writerows(_rows_of(trace))
    return lines.getvalue()


def _rows_of(trace: Any) -> Iterator[tuple[Any, ...]]:
    name = trace.name or ""
    if trace.type == "heatmap":
        height, width = len(trace.z), max(map(len, trace.z), default=0)
        xs = trace.x if trace.x is not None else range(width)
        ys = trace.y if trace.y is not None else range(height)
        for y, row in zip(ys, trace.z, strict=True):
            for x, value in zip(xs, row, strict=True):
                if value is not None and value == value:
                    yield name, x, y, value, ""
    elif trace.type == "sankey":
        labels = trace.node.label
        for source, target, value in zip(trace.link.source, trace.link.target, trace.link.value, strict=True):
            yield name, labels[source], labels[target], value, ""
    else:
        errors = trace.error_y.array if trace.error_y.array is not None else trace.error_x.array
        columns = (trace.x, trace.y, errors)
        for x, y, error in zip_longest(*(() if each is None else each for each in columns), fillvalue=""):
            yield name, x, y, "", error


def _axis_title(axes: Iterator[Any], otherwise: str) -> str:
    titles = {re.sub("<[^>]*>", " ", axis.title.text or "") for axis in axes}
    return titles.pop() if len(titles) == 1 and "" not in titles else otherwise

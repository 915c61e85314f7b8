"""Grids of heat maps that share a colour scale, one cell of the grid per block."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from hydra_lab.figures.theme import MAGNITUDE

_MOST_COLUMNS = 3
_MOST_GAPS = 32  # cells up to which a gap sets them apart


def heat_map_grid(
    values: NDArray[np.float64],
    *,
    titles: Sequence[str],
    x: Sequence[Any] | NDArray[Any],
    y: Sequence[Any] | NDArray[Any],
    x_title: str,
    y_title: str,
    colour_title: str,
    colour_range: tuple[float, float],
    hover: str,
    colour_scale: str = MAGNITUDE,
    text: str | NDArray[np.str_] | None = None,
    hover_values: NDArray[np.float64] | None = None,
    tick_format: str | None = None,
    cell_height: int = 26,
) -> tuple[go.Figure, int]:
    """One heat map per leading entry of `values` [Y, rows, columns], all with the same axes and colours.

    Args:
        titles: [Y] title of each heat map.
        x, y: labels of the columns and rows.
        colour_range: values at the two ends of the scale.
        hover: plotly hover template; `%{customdata}` is `hover_values` where that is given.
        text: what each cell reads: the format of its number (such as "%{z:.2f}"), an array [Y, rows, columns] of
            strings, or None.
        cell_height: pixels per row.

    Returns:
        the figure and the height in pixels that its plots need.
    """
    num_maps = len(values)
    columns = min(_MOST_COLUMNS, num_maps)
    rows = -(-num_maps // columns)
    plot_height = max(110, cell_height * values.shape[1])
    gap = 74
    total = rows * plot_height + (rows - 1) * gap
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=list(titles),
        shared_yaxes=True,
        horizontal_spacing=0.04 if columns > 1 else 0.0,
        vertical_spacing=gap / total if rows > 1 else 0.0,
    )
    figure.update_annotations(font_size=13)
    for index in range(num_maps):
        row, column = index // columns + 1, index % columns + 1
        figure.add_trace(
            go.Heatmap(
                z=values[index],
                x=list(x),
                y=list(y),
                coloraxis="coloraxis",
                text=None if text is None or isinstance(text, str) else text[index],
                texttemplate=text if text is None or isinstance(text, str) else "%{text}",
                customdata=None if hover_values is None else hover_values[index],
                hovertemplate=hover + "<extra></extra>",
                xgap=1 if values.shape[2] <= _MOST_GAPS else 0,
                ygap=1 if values.shape[1] <= _MOST_GAPS else 0,
            ),
            row=row,
            col=column,
        )
        figure.update_xaxes(title_text=x_title, showgrid=False, row=row, col=column)
        figure.update_yaxes(type="category", showgrid=False, row=row, col=column)
        if column == 1:
            figure.update_yaxes(title_text=y_title, row=row, col=column)
    figure.update_layout(
        coloraxis={
            "colorscale": colour_scale,
            "cmin": colour_range[0],
            "cmax": colour_range[1],
            "colorbar": {"title": {"text": colour_title, "side": "top"}, "tickformat": tick_format},
        }
    )
    return figure, total + 60

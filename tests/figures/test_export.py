"""A figure's numbers as a table."""

import csv
import io
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from hydra_lab.figures import to_csv


def table(figure: go.Figure) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(figure))))


def test_bars_with_errors() -> None:
    figure = go.Figure(go.Bar(x=["a, b", "c"], y=[1.5, -2], error_y={"array": [0.1, 0.2]}, name="one\nname"))
    figure.update_xaxes(title_text="domain")
    figure.update_yaxes(title_text="loss<br>(nats)")
    assert table(figure) == [
        {"series": "one\nname", "domain": "a, b", "loss (nats)": "1.5", "value": "", "error": "0.1"},
        {"series": "one\nname", "domain": "c", "loss (nats)": "-2", "value": "", "error": "0.2"},
    ]


def test_cells_without_a_value_are_left_out() -> None:
    figure = go.Figure(go.Heatmap(z=[[1.0, np.nan], [3.0, 4.0]], x=["p", "q"], y=[10, 20]))
    cells: list[tuple[Any, ...]] = [(row["x"], row["y"], row["value"]) for row in table(figure)]
    assert cells == [("p", "10", "1.0"), ("p", "20", "3.0"), ("q", "20", "4.0")]


def test_cells_without_axes_are_counted() -> None:
    rows = table(go.Figure(go.Heatmap(z=[[5, 6]])))
    assert [(row["x"], row["y"], row["value"]) for row in rows] == [("0", "0", "5"), ("1", "0", "6")]


def test_flows_name_their_ends() -> None:
    sankey = go.Sankey(
        node={"label": ["here", "there"]}, link={"source": [0, 1], "target": [1, 0], "value": [3, 4]}
    )
    assert [(row["x"], row["y"], row["value"]) for row in table(go.Figure(sankey))] == [
        ("here", "there", "3"),
        ("there", "here", "4"),
    ]


@pytest.mark.parametrize("titles", [("left", "right"), ("left", "")])
def test_panels_whose_axes_differ_are_called_x_and_y(titles: tuple[str, str]) -> None:
    figure = make_subplots(rows=1, cols=2)
    for column, title in enumerate(titles, start=1):
        figure.add_trace(go.Scatter(x=[column], y=[0.5]), row=1, col=column)
        figure.update_xaxes(title_text=title, row=1, col=column)
    assert [row["x"] for row in table(figure)] == ["1", "2"]

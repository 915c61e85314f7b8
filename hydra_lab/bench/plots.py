"""Bench results as figures."""

from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hydra_lab.bench.result import BenchResult
from hydra_lab.figures.theme import SYMBOLS, Theme, colours, finish, text_colour


def plot_result(result: BenchResult, theme: Theme = "light") -> go.Figure:
    """A figure of what was measured: rates over context length, or times side by side."""
    draw = {"throughput": _throughput, "kernels": _kernels, "capture": _capture}[result.bench]
    return draw(result, theme)


def _subtitle(result: BenchResult) -> str:
    settings, environment = result.settings, result.environment
    commit = (environment["commit"] or "no commit")[:10]
    return (
        f"{environment['device']}, {environment['hardware']['threads']} threads, {settings['dtype']}, batch 1, "
        f"medians of {settings['rounds']} rounds; {commit}"
    )


def _throughput(result: BenchResult, theme: Theme) -> go.Figure:
    """Tokens per second of prefill and decode, and peak memory, over context length; one line per model."""
    figure = make_subplots(
        rows=1,
        cols=3,
        subplot_titles=("Prefill, tokens/s", "Decode, tokens/s", "Peak memory of a prefill, GiB"),
        horizontal_spacing=0.08,
    )
    models = list(result.settings["parameters"])
    palette = colours(len(models), theme)
    for index, model in enumerate(models):
        style: dict[str, Any] = {
            "name": f"{model}, {result.settings['parameters'][model] / 1e6:.1f} M",
            "legendgroup": model,
            "mode": "lines+markers",
            "line": {"color": palette[index]},
            "marker": {"symbol": SYMBOLS[index], "size": 9},
        }
        for column, phase in enumerate(("prefill", "decode"), start=1):
            rows = [row for row in result.rows if row["model"] == model and row["phase"] == phase]
            error = {
                "type": "data",
                "array": [row["tokens_per_second_q75"] - row["tokens_per_second"] for row in rows],
                "arrayminus": [row["tokens_per_second"] - row["tokens_per_second_q25"] for row in rows],
            }
            figure.add_scatter(
                x=[row["context"] for row in rows],
                y=[row["tokens_per_second"] for row in rows],
                error_y=error,
                showlegend=column == 1,
                row=1,
                col=column,
                **style,
            )
        rows = [row for row in result.rows if row["model"] == model and row["peak_bytes"] is not None]
        figure.add_scatter(
            x=[row["context"] for row in rows],
            y=[row["peak_bytes"] / 2**30 for row in rows],
            showlegend=False,
            row=1,
            col=3,
            **style,
        )
    contexts = result.settings["contexts"]
    labels = [f"{context // 1024}K" if context >= 1024 else str(context) for context in contexts]
    figure.update_xaxes(type="log", title="context, tokens", tickvals=contexts, ticktext=labels, tickangle=0)
    figure.update_yaxes(type="log", dtick="D2", tickformat="~s", row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    figure.update_yaxes(type="log", dtick="D2", tickformat="~g", row=1, col=3)
    return _titled(figure, f"Throughput by context, {result.settings['preset']}", result, theme, height=400)


def _kernels(result: BenchResult, theme: Theme) -> go.Figure:
    """Milliseconds of each contestant, by operation; forward and backward."""
    direction = "forward and backward"
    rows = [row for row in result.rows if row["direction"] == direction]
    operations = list(dict.fromkeys((row["operation"], row["length"]) for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    palette = colours(len(names), theme)
    figure = go.Figure()
    for index, name in enumerate(names):
        own = {(row["operation"], row["length"]): row for row in rows if row["contestant"] == name}
        figure.add_scatter(
            x=[own[key]["ms"] for key in operations if key in own],
            y=[f"{operation}, {length:,}" for operation, length in operations if (operation, length) in own],
            name=name,
            mode="markers",
            marker={
                "color": palette[index],
                "symbol": SYMBOLS[index % len(SYMBOLS)],
                "size": 11,
            },
        )
    figure.update_xaxes(type="log", title="ms per call, forward and backward")
    figure.update_yaxes(autorange="reversed", title="operation, tokens")
    return _titled(
        figure, f"Operations at the sizes of {result.settings['preset']}", result, theme, height=480
    )


def _capture(result: BenchResult, theme: Theme) -> go.Figure:
    """Time over that without taps, by what is captured."""
    rows = [row for row in result.rows if row["over_plain"]["value"] != 1.0]
    labels = [
        row["contestant"] if row["subject"] == "model" else f"{row['subject']}: {row['contestant']}"
        for row in rows
    ]
    values = [100 * (row["over_plain"]["value"] - 1) for row in rows]
    figure = go.Figure(
        go.Scatter(
            x=values,
            y=labels,
            mode="markers",
            marker={"color": colours(1, theme)[0], "size": 11},
            error_x={
                "type": "data",
                "array": [
                    100 * row["over_plain"]["high"] - 100 - v for row, v in zip(rows, values, strict=True)
                ],
                "arrayminus": [
                    v - 100 * row["over_plain"]["low"] + 100 for row, v in zip(rows, values, strict=True)
                ],
            },
        )
    )
    figure.add_vline(x=0, line_width=1, line_color=text_colour(theme))
    figure.update_xaxes(title="% more time than without (95% interval)")
    figure.update_yaxes(autorange="reversed")
    return _titled(figure, "What looking costs", result, theme, height=300)


def _titled(figure: go.Figure, title: str, result: BenchResult, theme: Theme, height: int) -> go.Figure:
    finish(figure, title=title, subtitle=_subtitle(result), theme=theme, height=height)
    return figure.update_layout(legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0})

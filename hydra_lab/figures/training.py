"""Figures of a training run as it goes: losses, gates, expert load, use of the memory, norms of the states."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from hydra_lab.figures.theme import Theme, colours, counted, finish, known_margin, text_colour
from hydra_lab.taps import PATHS
from hydra_lab.training_log import TrainingLog

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_LEGEND_ROW = 20  # pixels
_MOST_POINTS = 250
"""Points of a line; a point of a longer log stands for several of its lines."""


def training_loss(log: TrainingLog, *, theme: Theme = "light") -> go.Figure:
    """Language loss of all text and of each domain over training."""
    lines = {"all": log.language_loss, **log.domain_loss}
    figure = _lines(log, lines, theme)
    next(figure.select_traces()).update(line={"width": 3, "color": text_colour(theme), "dash": "solid"})
    figure.update_yaxes(title_text="loss, nats per supervised token")
    return _finish(figure, log, "Training loss", "each point the mean since the one before", theme)


def path_gates(log: TrainingLog, *, theme: Theme = "light") -> go.Figure:
    """Gate g of every block and path; the shape of the line tells blocks apart, the colour paths.

    Raises:
        ValueError: the log has no gates.
    """
    if not log.gates:
        raise ValueError("this run's log holds no gates")
    palette = dict(zip(PATHS, colours(len(PATHS), theme), strict=True))
    figure = go.Figure()
    for block, path in sorted(log.gates, key=lambda each: (PATHS.index(each[1]), each[0])):
        figure.add_trace(
            go.Scatter(
                x=_last(log.step),
                y=_last(log.gates[block, path]),
                name=f"{path}, block {block}",
                line={"color": palette[path], "dash": _DASHES[block % len(_DASHES)], "width": 1.8},
                hovertemplate="step %{x:,}: %{y:.3f}",
            )
        )
    figure.update_yaxes(title_text="gate g", rangemode="tozero")
    return _finish(
        figure, log, "Gates of the paths", "a gate at zero is a path that the model does not use", theme
    )


def expert_load_over_training(log: TrainingLog, *, theme: Theme = "light") -> go.Figure:
    """Share of the choices of every expert, one heat map per block.

    Raises:
        ValueError: the run did not report it.
    """
    _reported(log.expert_load, "expert load")
    blocks = list(log.expert_load)
    figure = make_subplots(
        rows=len(blocks), cols=1, shared_xaxes=True, subplot_titles=[f"block {block}" for block in blocks],
        vertical_spacing=0.25 / max(1, len(blocks)),
    )  # fmt: skip
    largest = max(float(np.nanmax(load)) for load in log.expert_load.values())
    for row, block in enumerate(blocks, start=1):
        load = _mean(log.expert_load[block])
        figure.add_trace(
            go.Heatmap(
                z=100 * load.T,
                x=_last(log.step),
                zmin=0,
                zmax=100 * largest,
                colorscale="Viridis",
                showscale=row == 1,
                colorbar={"title": {"text": "% of<br>choices", "side": "top"}},
                hovertemplate="step %{x:,}, expert %{y}: %{z:.1f}%<extra></extra>",
            ),
            row=row,
            col=1,
        )
    figure.update_yaxes(title_text="expert", showgrid=False)
    dead = sum(int((load[-1] == 0).sum()) for load in log.expert_load.values())
    figure.update_xaxes(title_text="step", row=len(blocks), col=1)
    return finish(
        figure,
        title="Expert load",
        subtitle=f"{counted(len(log.step), 'log line')}; experts without any load in the last: {dead}",
        theme=theme,
        height=150 * len(blocks),
    )


def memory_use_over_training(log: TrainingLog, *, theme: Theme = "light") -> go.Figure:
    """Share of the addresses that are touched between two log lines, and the mean gate beta.

    Raises:
        ValueError: the run did not report it.
    """
    _reported(log.memory_use, "use of the memory")
    lines = {f"touched, block {block}": use for block, use in log.memory_use.items()}
    lines |= {f"beta, block {block}": gate for block, gate in log.memory_gate.items()}
    figure = _lines(log, lines, theme)
    figure.update_yaxes(title_text="share, or beta", range=[0, 1])
    return _finish(
        figure,
        log,
        "Use of the memory",
        "share of the addresses read from one log line to the next, and mean beta",
        theme,
    )


def state_norms_over_training(log: TrainingLog, *, theme: Theme = "light") -> go.Figure:
    """Mean norm of the states of every block.

    Raises:
        ValueError: the run did not report it.
    """
    _reported(log.state_norm, "state norms")
    figure = _lines(log, {f"block {block}": norm for block, norm in log.state_norm.items()}, theme)
    figure.update_yaxes(title_text="Frobenius norm", rangemode="tozero")
    return _finish(figure, log, "Norms of the ssm states", "mean over heads and chunk ends", theme)


def _lines(log: TrainingLog, lines: Mapping[str, NDArray[np.float64]], theme: Theme) -> go.Figure:
    figure = go.Figure()
    palette = colours(len(lines), theme)
    for index, (name, values) in enumerate(lines.items()):
        figure.add_trace(
            go.Scatter(
                x=_last(log.step),
                y=_mean(values),
                name=name,
                line={"color": palette[index], "dash": _DASHES[index % len(_DASHES)], "width": 1.8},
                hovertemplate="step %{x:,}: %{y:.4g}",
            )
        )
    return figure


def _last(values: NDArray[Any]) -> NDArray[Any]:
    """The last log line of every point."""
    return values[_ends(len(values)) - 1]


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the log lines of every point, of those that know the value."""
    ends = _ends(len(values))
    starts = np.concatenate(([0], ends[:-1]))
    known = np.add.reduceat(~np.isnan(values), starts, dtype=np.float64)
    total = np.add.reduceat(np.nan_to_num(values), starts)
    return np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0)


def _ends(num_lines: int) -> NDArray[np.int64]:
    """Where the lines of every point end."""
    points = min(num_lines, _MOST_POINTS)
    return np.linspace(0, num_lines, points + 1).round().astype(np.int64)[1:]


def _reported(series: Mapping[int, NDArray[np.float64]], what: str) -> None:
    if not series:
        raise ValueError(f"this run's log holds no {what}: it was made before training reported it")


def _finish(figure: go.Figure, log: TrainingLog, title: str, subtitle: str, theme: Theme) -> go.Figure:
    figure.update_xaxes(title_text="step", nticks=4, tickangle=0)
    figure.update_layout(hovermode="x unified")
    last = f"step {int(log.step[-1]):,}, {log.tokens[-1] / 1e6:,.1f} M tokens"
    names = [trace.name for trace in figure.select_traces()]
    height = max(300, _LEGEND_ROW * len(names) + 60)
    finish(figure, title=title, subtitle=f"{subtitle}; up to {last}", theme=theme, height=height)
    return figure.update_layout(margin=known_margin(64 + 7 * max(map(len, names))))

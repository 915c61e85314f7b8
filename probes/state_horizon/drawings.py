"""The study's figures."""

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.theme import SYMBOLS, Theme, colours, counted, finish, muted_colour, text_colour
from probes.state_horizon.analysis import Floats, Horizon
from probes.state_horizon.measure import Measurement

_FLOOR = 1e-8
"""Nats; a change below it is drawn there."""


def draw(measurement: Measurement, found: Horizon, *, theme: Theme = "light") -> dict[str, go.Figure]:
    """Every figure of the study by name."""
    return {
        "output_change": output_change(measurement, theme=theme),
        "half_lives": half_lives(measurement, found, theme=theme),
    }


def output_change(measurement: Measurement, *, theme: Theme = "light") -> go.Figure:
    """Change of the output by distance: as it is, and where one path's memory is exchanged."""
    whole_D = measurement.output_change[:, measurement.settled :].mean(axis=0)
    paths = list(measurement.kept_by)
    figure = go.Figure(
        _curve(measurement.later, whole_D, "all memories of the token", text_colour(theme), "solid", 3.0)
    )
    for number, (path, colour) in enumerate(zip(paths, colours(len(paths), theme), strict=True)):
        for name, change, dash in (
            (f"{path}'s memory alone", measurement.kept_by[path], "solid"),
            (f"all but {path}'s", measurement.left_without[path], "dot"),
        ):
            curve = _curve(measurement.later, change.mean(axis=0), name, colour, dash, 1.8)
            curve.update(mode="lines+markers", marker={"symbol": SYMBOLS[number], "size": 7, "color": colour})
            figure.add_trace(curve)
    if measurement.window:
        figure.add_vline(
            x=measurement.window,
            line={"color": muted_colour(theme), "dash": "dash", "width": 1},
            annotation={
                "text": "end of the attention's window",
                "font": {"size": 11, "color": muted_colour(theme)},
                "xanchor": "right",
                "x": np.log10(measurement.window),
            },
        )
    ticks = [2**power for power in range(1, 12) if measurement.later[0] <= 2**power <= measurement.later[-1]]
    figure.update_xaxes(
        title_text="tokens after the replaced one (log scale)", type="log", tickvals=ticks, ticktext=ticks
    )
    figure.update_yaxes(
        title_text="change of the next-token distribution<br>(KL divergence, nats, log scale)",
        type="log",
        exponentformat="power",
        dtick=1,
    )
    return finish(
        figure,
        title="How long a replaced token changes the output",
        subtitle=f"mean over {counted(len(measurement.output_change), 'text')}, then over bins of distance; "
        f"memories are exchanged {counted(measurement.settled, 'token')} after it; below {_FLOOR:g} drawn "
        "there",
        theme=theme,
        height=420,
    )


def _curve(
    distance_D: np.ndarray, change_D: Floats, name: str, colour: str, dash: str, width: float
) -> go.Scatter:
    """The mean over bins of distance that grow by a quarter."""
    edges = np.unique(np.geomspace(distance_D[0], distance_D[-1] + 1, 24).round().astype(int))
    bin_D = np.digitize(distance_D, edges) - 1
    count = np.bincount(bin_D)
    used = count > 0
    centre = np.exp(np.bincount(bin_D, weights=np.log(distance_D))[used] / count[used])
    mean = np.bincount(bin_D, weights=change_D)[used] / count[used]
    return go.Scatter(
        x=centre,
        y=np.maximum(mean, _FLOOR),
        mode="lines",
        name=name,
        line={"color": colour, "dash": dash, "width": width},
        hovertemplate=f"{name}: %{{y:.2e}} nats around %{{x:.0f}} tokens<extra></extra>",
    )


def half_lives(measurement: Measurement, found: Horizon, *, theme: Theme = "light") -> go.Figure:
    """Measured half-lives of state and output against the one that each head's decay predicts."""
    layers = sorted({layer for layer, _ in measurement.heads})
    predicted_H = measurement.decay_half_life
    figure = go.Figure()
    longest = 4.0 * measurement.output_change.shape[1]
    ends = [
        0.7 * min(float(predicted_H.min()), float(np.nanmin(found.state_half_life))),
        max(longest, 1.4 * float(predicted_H[np.isfinite(predicted_H)].max(initial=1.0))),
    ]
    figure.add_trace(
        go.Scatter(
            x=ends,
            y=ends,
            mode="lines",
            line={"color": muted_colour(theme), "dash": "dash"},
            name="as predicted",
            hoverinfo="skip",
        )
    )
    for number, (layer, colour) in enumerate(zip(layers, colours(len(layers), theme), strict=True)):
        of_layer = [h for h, (block, _) in enumerate(measurement.heads) if block == layer]
        for kind, values, opened in (
            ("state", found.state_half_life, ""),
            ("output", found.output_half_life, "-open"),
        ):
            shown = [h for h in of_layer if not np.isnan(values[h])]
            figure.add_trace(
                go.Scatter(
                    x=predicted_H[shown],
                    y=np.minimum(values[shown], ends[1]),
                    mode="markers",
                    name=f"block {layer}, {kind}",
                    marker={
                        "color": colour,
                        "symbol": SYMBOLS[number % len(SYMBOLS)] + opened,
                        "size": 10,
                        "line": {"width": 1.5, "color": colour if opened else text_colour(theme)},
                    },
                    customdata=[
                        [measurement.heads[h][1], "endless" if np.isinf(values[h]) else f"{values[h]:.1f}"]
                        for h in shown
                    ],
                    hovertemplate=f"block {layer}, head %{{customdata[0]}}: predicted %{{x:.1f}} tokens, {kind} "
                    "%{customdata[1]}<extra></extra>",
                )
            )
    ticks = [1, 3, 10, 30, 100, 300, 1000, 3000]
    axis = {"type": "log", "tickvals": ticks, "ticktext": ticks}
    figure.update_xaxes(title_text="half-life that the decay predicts (tokens, log scale)", **axis)
    figure.update_yaxes(title_text="measured half-life (tokens, log scale)", **axis)
    return finish(
        figure,
        title="Half-life of a change, measured against predicted",
        subtitle="filled: difference of the head's state between the two runs; open: change of the output "
        "where only this head's state differs<br>means over "
        f"{counted(len(measurement.output_change), 'text')}; {counted(len(predicted_H), 'head')}; endless "
        f"or longer than {ends[1]:.0f} tokens drawn at the top",
        theme=theme,
        height=460,
    )

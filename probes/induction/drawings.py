"""The study's figures."""

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.theme import (
    DIVERGING,
    SYMBOLS,
    Theme,
    colours,
    counted,
    finish,
    muted_colour,
    text_colour,
)
from hydra_lab.metrics import mean_interval
from probes.induction.analysis import describe, interaction
from probes.induction.measure import CopyGain, Cut

_NUM_REDRAWS = 1000


def draw(
    random: list[CopyGain], recall: CopyGain, by_block: list[CopyGain], *, theme: Theme = "light"
) -> dict[str, go.Figure]:
    """Every figure of the study by name.

    Args:
        random: gains at each distance.
        recall: gain of the recall problems.
        by_block: those of them in which every block's paths were cut one by one, and paths in pairs.
    """
    figures = {
        "gain_by_distance": gain_by_distance(random, theme=theme),
        "share_by_path": share_by_path([*random, recall], theme=theme),
    }
    for number, gain in enumerate(by_block):
        figures[f"by_block_{number + 1}"] = share_by_block(gain, theme=theme)
        if any(len(cut) == 2 for cut in gain.under):
            figures[f"interactions_{number + 1}"] = interactions(gain, theme=theme)
    return figures


def gain_by_distance(random: list[CopyGain], *, theme: Theme = "light") -> go.Figure:
    """Gain of random tokens by distance, as the model is and with each path cut."""
    cuts: list[Cut] = [cut for cut in random[0].under if len(cut) == 1 and cut[0][1] is None]
    figure = go.Figure()
    lines = [
        ("as it is", [gain.intact for gain in random], text_colour(theme), "circle-open", 3),
        *(
            (f"without {describe(cut)}", [gain.under[cut] for gain in random], colour, SYMBOLS[n], 1.8)
            for n, (cut, colour) in enumerate(zip(cuts, colours(len(cuts), theme), strict=True))
        ),
    ]
    for name, values, colour, symbol, width in lines:
        mean = np.array([each.mean() for each in values])
        low, high = np.array([mean_interval(each, num_resamplings=_NUM_REDRAWS) for each in values]).T
        figure.add_trace(
            go.Scatter(
                x=[gain.distance for gain in random],
                y=mean,
                mode="lines+markers",
                name=name,
                line={"color": colour, "width": width},
                marker={"color": colour, "symbol": symbol, "size": 9},
                error_y={
                    "type": "data",
                    "array": np.maximum(high - mean, 0),
                    "arrayminus": np.maximum(mean - low, 0),
                    "thickness": 1.2,
                },
                hovertemplate=f"{name}, %{{x}} tokens apart: %{{y:.3f}} nats<extra></extra>",
            )
        )
    figure.add_hline(y=0, line={"color": muted_colour(theme), "width": 1})
    ticks = [int(gain.distance) for gain in random]
    figure.update_xaxes(
        title_text="tokens to the earlier occurrence (log scale)", type="log", tickvals=ticks, ticktext=ticks
    )
    figure.update_yaxes(title_text="gain from the earlier occurrence<br>(nats per target)")
    return finish(
        figure,
        title="Copying of random tokens",
        subtitle=f"mean over {counted(len(random[0].intact), 'sequence')} at each distance, bars 95% over "
        "sequences; paths are cut while the repeat is read",
        theme=theme,
        height=380,
    )


def share_by_path(gains: list[CopyGain], *, theme: Theme = "light") -> go.Figure:
    """Heat map of the gain that each cut takes, per kind of episode."""
    cuts: list[Cut] = [cut for cut in gains[0].under if len(cut) == 1 and cut[0][1] is None]
    lost = np.array([[gain.lost(cut).mean() for gain in gains] for cut in cuts])
    figure = go.Figure(
        _heat_map(
            lost,
            [f"{gain.name}<br>(gain {gain.intact.mean():.2f})" for gain in gains],
            list(map(describe, cuts)),
        )
    )
    figure.update_xaxes(showgrid=False, tickangle=-30)
    figure.update_yaxes(showgrid=False, autorange="reversed")
    return finish(
        figure,
        title="What the cut of a path takes of the gain",
        subtitle=f"nats per target, mean over {counted(len(gains[0].intact), 'sequence')} of each kind; "
        "below zero the gain grew",
        theme=theme,
        height=150 + 40 * len(cuts),
    )


def share_by_block(gain: CopyGain, *, theme: Theme = "light") -> go.Figure:
    """Heat map of the gain that goes with one path of one block."""
    cuts = [cut for cut in gain.under if len(cut) == 1 and cut[0][1] is not None]
    paths = list(dict.fromkeys(path for ((path, _),) in cuts))
    layers = sorted({layer for ((_, layer),) in cuts if layer is not None})
    lost = np.full((len(paths), len(layers)), np.nan)
    for cut in cuts:
        ((path, layer),) = cut
        assert layer is not None
        lost[paths.index(path), layers.index(layer)] = gain.lost(cut).mean()
    figure = go.Figure(_heat_map(lost, [f"block {layer}" for layer in layers], paths))
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed")
    return finish(
        figure,
        title=f"What the cut of one path of one block takes: {gain.name}",
        subtitle=f"nats per target of a gain of {gain.intact.mean():.2f}; mean over "
        f"{counted(len(gain.intact), 'sequence')}; blank where the block lacks the path",
        theme=theme,
        height=120 + 40 * len(paths),
    )


def interactions(gain: CopyGain, *, theme: Theme = "light") -> go.Figure:
    """Heat map of what two paths take together beyond what each takes alone."""
    cuts = [cut for cut in gain.under if len(cut) == 2]
    paths = list(dict.fromkeys(path for cut in cuts for path, _ in cut))
    beyond = np.full((len(paths), len(paths)), np.nan)
    for cut in cuts:
        first, second = (paths.index(path) for path, _ in cut)
        beyond[second, first] = interaction(gain, cut).mean()
    figure = go.Figure(_heat_map(beyond[1:, :-1], paths[:-1], paths[1:]))
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed")
    return finish(
        figure,
        title=f"Two paths cut together: {gain.name}",
        subtitle="nats per target beyond the sum of both cuts; mean over "
        f"{counted(len(gain.intact), 'sequence')}; above zero one stands in for the other, below it both "
        "are needed",
        theme=theme,
        height=140 + 40 * len(paths),
    )


def _heat_map(values: np.ndarray, columns: list[str], rows: list[str]) -> go.Heatmap:
    largest = max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-6)
    return go.Heatmap(
        z=values,
        x=columns,
        y=rows,
        zmin=-largest,
        zmax=largest,
        colorscale=DIVERGING,
        colorbar={"title": {"text": "nats per<br>target", "side": "top"}},
        text=[["" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}" for value in row] for row in values],
        texttemplate="%{text}",
        hovertemplate="%{x}, %{y}: %{z:.3f} nats<extra></extra>",
        xgap=1,
        ygap=1,
    )

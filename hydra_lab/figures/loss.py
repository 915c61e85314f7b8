"""Figures of the model's loss by domain."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from hydra_lab.figures.theme import SYMBOLS, Theme, colours, counted, finish
from hydra_lab.metrics import LossByDomain, mean_interval


def loss_by_domain(result: LossByDomain, *, theme: Theme = "light") -> go.Figure:
    """Mean loss along the text, one line per domain."""
    palette = colours(len(result.domains), theme)
    middle = (result.edges[:-1] + result.edges[1:] - 1) / 2
    figure = go.Figure()
    for z, domain in enumerate(result.domains):
        figure.add_trace(
            go.Scatter(
                x=middle,
                y=result.by_position[z],
                mode="lines+markers",
                name=f"{domain}: {result.sample_mean[z]:.2f} ± {1.96 * result.error[z]:.2f}",
                line={"color": palette[z], "width": 2},
                marker={"size": 6, "symbol": SYMBOLS[z % len(SYMBOLS)]},
                hovertemplate=domain + " around token %{x:.0f}: %{y:.2f} nats<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="position (tokens)")
    figure.update_yaxes(title_text="loss (nats per token)", rangemode="tozero")
    figure.update_layout(legend={"title": {"text": "mean over samples,<br>95% interval"}})
    return finish(
        figure,
        title="Loss by domain",
        subtitle=f"mean over {counted(int(result.num_tokens.sum()), 'token')} of "
        f"{counted(int(result.num_samples.sum()), 'sample')}, in {len(middle)} bins of positions",
        theme=theme,
        height=400,
    )


def loss_difference(
    domains: Sequence[str], differences: Sequence[NDArray[np.float64]], *, theme: Theme = "light"
) -> go.Figure:
    """Mean change of the loss by domain with its 95% interval, from the change of every sample.

    Args:
        domains: [Z] names.
        differences: [Z] arrays [N_z] of each sample's loss with the change less its loss without, nats per token.
    """
    intervals = [mean_interval(each) if len(each) > 1 else (np.nan, np.nan) for each in differences]
    means = np.array([each.mean() for each in differences])
    high = np.array([top for _, top in intervals])
    low = np.array([bottom for bottom, _ in intervals])
    figure = go.Figure(
        go.Bar(
            x=list(domains),
            y=means,
            error_y={"type": "data", "array": high - means, "arrayminus": means - low, "thickness": 1.4},
            marker={"color": colours(1, theme)[0]},
            hovertemplate="%{x}: %{y:+.4f} nats per token<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="domain")
    figure.update_yaxes(title_text="nats per token", tickformat="+.3~g")
    return finish(
        figure,
        title="Change of the loss by domain",
        subtitle=f"mean and 95% interval over {counted(sum(map(len, differences)), 'sample')}",
        theme=theme,
        height=300,
    )

"""Figure of the model's loss on the captured text."""

import plotly.graph_objects as go

from hydra_lab.figures.theme import SYMBOLS, Theme, colours, counted, finish
from hydra_lab.metrics import LossByDomain


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

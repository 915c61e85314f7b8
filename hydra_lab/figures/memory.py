"""Figures of the product-key memory."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.theme import MAGNITUDE, Theme, colours, counted, finish, muted_colour, text_colour
from hydra_lab.metrics import BetaByDomain, MemoryMap, MemoryUse, PathUse, TopTokens


def memory_use(result: MemoryUse, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Share of the read weight that the most read rows hold, against even use."""
    main = colours(1, theme)[0]
    figure = go.Figure(
        [
            go.Scatter(
                x=result.coverage_rows,
                y=100 * result.coverage,
                mode="lines+markers",
                name="measured",
                line={"color": main, "width": 2},
                marker={"size": 5},
                hovertemplate="the %{x:,} most read rows hold %{y:.1f}%<extra></extra>",
            ),
            go.Scatter(
                x=result.coverage_rows,
                y=100 * result.coverage_rows / result.num_rows,
                mode="lines",
                name="even use",
                line={"color": muted_colour(theme), "dash": "dash"},
                hoverinfo="skip",
            ),
        ]
    )
    figure.update_xaxes(title_text="rows, most read first (log scale)", type="log")
    figure.update_yaxes(title_text="share of the read weight (%)", range=[0, 103])
    return finish(
        figure,
        title=f"Use of the memory, block {result.layer}",
        subtitle=f"{100 * result.used_share:.1f}% of {result.num_rows:,} rows read (even reads would touch "
        f"{100 * result.used_share_if_uniform:.1f}%); KL to uniform {result.kl_to_uniform:.2f} nats, "
        f"Gini {result.gini:.2f}<br>sum over {counted(result.num_reads, 'read')} by "
        f"{counted(result.num_tokens, 'token')} of {counted(result.num_samples, 'sample')}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=380,
    )


def beta_by_domain(
    result: BetaByDomain, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Mean memory gate of each domain with its 95% interval, over the spread of the tokens."""
    labels = [
        f"{domain} (n={count:,})" for domain, count in zip(result.domains, result.num_samples, strict=True)
    ]
    main = colours(1, theme)[0]
    figure = go.Figure()
    for (low, high), width, name in (((0, 4), 3, "5 to 95% of tokens"), ((1, 3), 9, "25 to 75% of tokens")):
        x: list[float | None] = []
        y: list[str | None] = []
        for z, label in enumerate(labels):
            x += [float(result.quantiles[z, low]), float(result.quantiles[z, high]), None]
            y += [label, label, None]
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                name=name,
                opacity=0.45,
                line={"color": main, "width": width},
                hoverinfo="skip",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=result.mean,
            y=labels,
            mode="markers",
            name="mean over samples, 95% interval",
            marker={"color": text_colour(theme), "size": 10, "symbol": "diamond"},
            error_x={"type": "data", "array": np.nan_to_num(1.96 * result.error), "thickness": 2},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="gate beta (1 is open)", range=[-0.02, 1.02])
    figure.update_yaxes(autorange="reversed", title_text="")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"})
    return finish(
        figure,
        title=f"Memory gate by domain, block {result.layer}",
        subtitle=f"mean over samples of the sample's mean; {counted(int(result.num_tokens.sum()), 'token')} of "
        f"{counted(int(result.num_samples.sum()), 'sample')}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=150 + 34 * len(labels),
    )


def top_tokens(
    result: TopTokens,
    labels: Sequence[str],
    *,
    path_use: PathUse | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """The tokens that read one row of the memory most.

    Args:
        labels: the text of each of `result.tokens`.

    Raises:
        ValueError: there are not as many labels as tokens.
    """
    if len(labels) != len(result.tokens):
        raise ValueError(f"{len(labels)} labels for {len(result.tokens)} tokens")
    shown = [f"{_visible(label)} (id {token})" for label, token in zip(labels, result.tokens, strict=True)]
    figure = go.Figure(
        go.Bar(
            x=result.weight,
            y=shown,
            orientation="h",
            marker={"color": colours(1, theme)[0]},
            text=[counted(int(count), "read") for count in result.count],
            textposition="auto",
            hovertemplate="%{y}: weight %{x:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="read weight, summed", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", title_text="token")
    empty = "" if len(shown) else "; no token reads it"
    return finish(
        figure,
        title=f"Tokens that read row {result.address}, block {result.layer}",
        subtitle=f"{counted(result.num_reads, 'read')} of the row among {counted(result.num_tokens, 'token')}{empty}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=110 + 28 * max(3, len(shown)),
    )


def _visible(text: str) -> str:
    """A token's text with its white space shown, so that " a" and "a" can be told apart."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return shown.replace("&", "&amp;").replace("<", "&lt;")


def memory_map(result: MemoryMap, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Heat map of the read weight over the grid of half keys (logarithmic colours)."""
    peak = max(result.peak, 1e-9)
    top = int(np.floor(np.log10(peak)))
    ticks = np.array([0.0, *(10.0**power for power in range(min(0, top), top + 1))])
    figure = go.Figure(
        go.Heatmap(
            z=result.level,
            x0=0,
            dx=result.cell[1],
            y0=0,
            dy=result.cell[0],
            zmin=0,
            zmax=255,
            colorscale=MAGNITUDE,
            colorbar={
                "title": {"text": "read<br>weight", "side": "top"},
                "tickvals": list(255 * np.log1p(ticks) / np.log1p(peak)),
                "ticktext": [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks],
            },
            hovertemplate="first key %{y}, second key %{x}: level %{z} of 255<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="second half key (index)", showgrid=False)
    figure.update_yaxes(title_text="first half key (index)", showgrid=False, autorange="reversed")
    pooled = "" if result.cell == (1, 1) else f"; one cell sums {result.cell[0]} x {result.cell[1]} rows"
    return finish(
        figure,
        title=f"Memory map, block {result.layer}",
        subtitle=f"sum of read weights on {result.num_keys[0]} x {result.num_keys[1]} rows over "
        f"{counted(result.num_tokens, 'token')} of {counted(result.num_samples, 'sample')}{pooled}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=520,
    )

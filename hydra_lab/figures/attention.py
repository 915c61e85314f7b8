"""Figures of sparse attention: which blocks it selects, whether they hold a target, where its mass goes, and what dense
attention would have looked at."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hydra_lab.figures.theme import (
    MAGNITUDE,
    SYMBOLS,
    Theme,
    block_labels,
    colours,
    counted,
    finish,
    hatching,
    muted_colour,
    text_colour,
)
from hydra_lab.metrics import KINDS, HitRate, MassByKind, PathUse, SelectionUse

if TYPE_CHECKING:
    from hydra_lab.attribution import DenseAttention


def selection_use(
    result: SelectionUse, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """How far back the selected blocks lie, per key-value head, against even choice among the candidates."""
    labels = [
        f"{low:,} to {high - 1:,}" for low, high in zip(result.edges[:-1], result.edges[1:], strict=True)
    ]
    used = np.flatnonzero(
        (np.nan_to_num(result.share).sum(axis=0) + np.nan_to_num(result.share_if_uniform)) > 0
    )
    kept = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, len(labels))
    figure = go.Figure()
    for head, colour in enumerate(colours(len(result.share), theme)):
        figure.add_trace(
            go.Bar(
                x=labels[kept],
                y=100 * result.share[head, kept],
                name=f"head {head}: mean {result.mean_distance[head]:,.0f} tokens",
                marker={
                    "color": colour,
                    "pattern": hatching(head, theme),
                },
                hovertemplate=f"head {head}, %{{x}} tokens back: %{{y:.1f}}%<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=labels[kept],
            y=100 * result.share_if_uniform[kept],
            mode="markers+lines",
            name="even choice among candidates",
            line={"color": muted_colour(theme), "dash": "dash"},
            marker={"symbol": SYMBOLS[2], "size": 9, "color": text_colour(theme)},
        )
    )
    figure.update_xaxes(title_text="tokens back to the block's first token", type="category")
    figure.update_yaxes(title_text="share of the head's selections (%)", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"})
    low, high = 100 * np.nanmin(result.selected_share), 100 * np.nanmax(result.selected_share)
    selected = f"{low:.1f}%" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}%"
    return finish(
        figure,
        title=f"Distance of the selected blocks, block {result.layer}",
        subtitle=f"{selected} of the candidate blocks are selected; "
        f"{counted(result.num_with_candidates, 'query').replace('querys', 'queries')} with candidates of "
        f"{result.num_queries:,}, {counted(result.num_samples, 'sample')}",
        theme=theme,
        path="attention",
        layer=result.layer,
        path_use=path_use,
        height=400,
    )


def hit_rate(result: HitRate, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """How often the block of a known target is selected, by distance and key-value head, against chance."""
    used = np.flatnonzero(result.num_eligible)
    low, high = result.edges[used], result.edges[used + 1] - 1
    labels = [
        f"{first:,} to {last:,}<br>n={count:,}"
        for first, last, count in zip(low, high, result.num_eligible[used], strict=True)
    ]
    figure = go.Figure()
    for head, colour in enumerate(colours(len(result.hit), theme)):
        error = result.error[head]
        interval = "" if np.isnan(error) else f" &plusmn; {196 * error:.0f}"
        figure.add_trace(
            go.Bar(
                x=labels,
                y=100 * result.hit_by_distance[head, used],
                name=f"head {head} selects it: {_percent(result.hit[head], interval)}",
                marker={"color": colour, "pattern": hatching(head, theme)},
                customdata=100 * result.visible_by_distance[head, used],
                hovertemplate=f"head {head}, %{{x}}: selected for %{{y:.1f}}%; in view for %{{customdata:.1f}}%"
                "<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=labels,
            y=100 * result.chance_by_distance[used],
            mode="markers+lines",
            name=f"drawn evenly from the candidates: {_percent(result.chance)}",
            line={"color": muted_colour(theme), "dash": "dash"},
            marker={"symbol": SYMBOLS[2], "size": 9, "color": text_colour(theme)},
        )
    )
    figure.update_xaxes(title_text="distance back to the target (tokens)", type="category")
    figure.update_yaxes(title_text="eligible queries (%)", range=[0, 102])
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.3, "yanchor": "top"})
    reached = int(result.num_eligible.sum())
    visible = 100 * result.visible
    view = (
        f"{visible.min():.0f}%"
        if f"{visible.min():.0f}" == f"{visible.max():.0f}"
        else (f"{visible.min():.0f} to {visible.max():.0f}%")
    )
    return finish(
        figure,
        title=f"Does selection find the target? Block {result.layer}",
        subtitle=f"over the {reached:,} of {int(result.num_queries.sum()):,} queries whose target only "
        f"selection can reach<br>{view} of all queries have theirs in view; &plusmn; 95% over "
        f"{counted(result.num_samples, 'sample')}",
        theme=theme,
        path="attention",
        layer=result.layer,
        path_use=path_use,
        height=430,
    )


def _percent(share: float, interval: str = "") -> str:
    """A share as text; there may be no query that it is a share of."""
    return "no such query" if np.isnan(share) else f"{100 * share:.0f}{interval}%"


def mass_by_kind(result: MassByKind, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Where the attention goes: by query head, and by position in each block, against the share of the keys."""
    num_layers, num_heads, _ = result.by_head.shape
    labels = block_labels(result.layers, "attention", path_use)
    bars = [
        "keys in view",
        *(f"block {layer}, head {h}" for layer in result.layers for h in range(num_heads)),
    ]
    share = np.concatenate([result.keys[None], result.by_head.reshape(-1, len(KINDS))])
    bar_height, plot_height, gap = 20 * len(bars) + 20, 170, 75
    total = bar_height + num_layers * plot_height + num_layers * gap
    figure = make_subplots(
        rows=num_layers + 1,
        cols=1,
        row_heights=[bar_height, *[plot_height] * num_layers],
        vertical_spacing=gap / total,
        subplot_titles=["all tokens", *labels],
    )
    figure.update_annotations(font_size=13)
    centre = (result.edges[:-1] + result.edges[1:] - 1) / 2
    for k, (kind, colour) in enumerate(zip(KINDS, colours(len(KINDS), theme), strict=True)):
        figure.add_trace(
            go.Bar(
                x=100 * share[:, k],
                y=bars,
                orientation="h",
                name=kind,
                marker={"color": colour, "pattern": hatching(k, theme)},
                hovertemplate=f"%{{y}}: {kind} %{{x:.1f}}%<extra></extra>",
            ),
            row=1,
            col=1,
        )
        for y in range(num_layers):
            figure.add_trace(
                go.Scatter(
                    x=centre,
                    y=100 * result.by_position[y, :, k],
                    mode="lines",
                    line={"color": colour, "width": 2},
                    name=kind,
                    showlegend=False,
                    hovertemplate=f"around token %{{x}}: {kind} %{{y:.1f}}%<extra></extra>",
                ),
                row=y + 2,
                col=1,
            )
            figure.add_trace(
                go.Scatter(
                    x=centre,
                    y=100 * result.keys_by_position[:, k],
                    mode="lines",
                    line={"color": colour, "width": 1.5, "dash": "dot"},
                    showlegend=False,
                    hovertemplate=f"around token %{{x}}: {kind} holds %{{y:.1f}}% of the keys<extra></extra>",
                ),
                row=y + 2,
                col=1,
            )
    figure.update_xaxes(title_text="share of the attention (%)", range=[0, 100.5], row=1, col=1)
    figure.update_yaxes(autorange="reversed", showgrid=False, row=1, col=1)
    for y in range(num_layers):
        figure.update_yaxes(title_text="attention (%)", range=[-2, 102], row=y + 2, col=1)
        figure.update_xaxes(title_text="position (tokens)", row=y + 2, col=1)
    figure.update_layout(
        barmode="stack",
        legend={"orientation": "h", "x": 0, "y": -70 / total, "yanchor": "top", "traceorder": "normal"},
    )
    return finish(
        figure,
        title="Where the attention goes",
        subtitle=f"mean over {counted(int(result.num_tokens.sum()), 'token')} of "
        f"{counted(result.num_samples, 'sample')}; below: mean over heads in bins of "
        f"{np.diff(result.edges).max()} positions<br>keys in view, dotted below: what attending to all of them alike "
        "would give",
        theme=theme,
        path="attention",
        path_use=path_use,
        height=total + 100,
    )


def dense_attention(
    result: "DenseAttention", *, sample: int = 0, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Where dense attention would have looked, by token and block of keys, and the part of it that is out of sight."""
    length = int(result.length[sample])
    step = -(-length // 512)  # a figure holds at most 512 x 512 cells
    tokens = np.arange(0, length, step)
    wanted = result.wanted[sample, tokens]
    panels = {"wanted": wanted, "wanted, but not shown": wanted - result.shown[sample, tokens]}
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=list(panels), shared_yaxes=True, horizontal_spacing=0.05
    )
    for column, values in enumerate(panels.values(), start=1):
        figure.add_trace(
            go.Heatmap(
                z=100 * values.T,
                x=tokens,
                zmin=0,
                zmax=100,
                colorscale=MAGNITUDE,
                colorbar={"title": {"text": "% of<br>probability", "side": "top"}},
                showscale=column == 2,
                hovertemplate="token %{x}, block %{y}: %{z:.1f}%<extra></extra>",
            ),
            row=1,
            col=column,
        )
    figure.update_xaxes(title_text="token that looks", showgrid=False)
    figure.update_yaxes(
        title_text=f"block of {result.block_size} tokens", col=1, dtick=max(1, wanted.shape[1] // 8)
    )
    return finish(
        figure,
        title="What dense attention would have looked at",
        subtitle=f"block {result.layer}, {counted(length, 'token')}, mean over heads; "
        f"{100 * float(result.coverage[sample, :length].mean()):.1f}% of the probability is shown to the model",
        theme=theme,
        path="attention",
        layer=result.layer,
        path_use=path_use,
        height=320,
    )

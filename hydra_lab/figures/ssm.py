"""Figures of what the model carries along: workspace slots, state-space heads, and the attention's
selection."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hydra_lab.figures.theme import (
    MAGNITUDE,
    SYMBOLS,
    Theme,
    colours,
    counted,
    finish,
    hatching,
    muted_colour,
    text_colour,
)
from hydra_lab.metrics import HalfLife, PathUse, SelectionUse, SlotReads, SlotWrites, StateNorms


def slot_reads(result: SlotReads, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Heat map of the attention on each slot as the text goes on, under the read gate."""
    centre = (result.edges[:-1] + result.edges[1:] - 1) / 2
    num_slots = result.read.shape[1]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.25, 0.75], vertical_spacing=0.05)
    figure.add_trace(
        go.Scatter(
            x=centre,
            y=result.gate,
            mode="lines",
            line={"color": colours(1, theme)[0], "width": 2},
            hovertemplate="around token %{x}: gate %{y:.3f}<extra></extra>",
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Heatmap(
            z=result.read.T,
            x=centre,
            y=[str(slot) for slot in range(num_slots)],
            zmin=0,
            zmax=float(np.nanmax(result.read)),
            colorscale=MAGNITUDE,
            colorbar={
                "title": {"text": "mean<br>attention", "side": "top"},
                "len": 0.75,
                "y": 0.0,
                "yanchor": "bottom",
            },
            hovertemplate="around token %{x}: slot %{y} gets %{z:.3f}<extra></extra>",
        ),
        row=2,
        col=1,
    )
    figure.update_yaxes(title_text="read gate", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title_text="slot", showgrid=False, row=2, col=1)
    figure.update_xaxes(title_text="position (tokens)", showgrid=False, row=2, col=1)
    return finish(
        figure,
        title=f"Workspace reads over time, block {result.layer}",
        subtitle=f"mean over tokens in bins of {np.diff(result.edges).max()} positions; "
        f"{counted(int(result.num_tokens.sum()), 'token')} of {counted(result.num_samples, 'sample')}; "
        f"even: {1 / num_slots:.3f}",
        theme=theme,
        path="workspace",
        layer=result.layer,
        path_use=path_use,
        height=170 + max(160, 16 * num_slots),
    )


def slot_writes(result: SlotWrites, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Write strength of each slot, and the half-life of what it holds."""
    slots = np.arange(len(result.strength))
    main, second = colours(2, theme)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    low, high = result.strength_quantiles.T
    figure.add_trace(
        go.Scatter(
            x=slots,
            y=result.strength,
            mode="markers",
            marker={"color": main, "size": 9},
            error_y={
                "type": "data",
                "array": np.maximum(high - result.strength, 0),
                "arrayminus": np.maximum(result.strength - low, 0),
                "thickness": 1.5,
            },
            hovertemplate="slot %{x}: writes %{y:.3f} of itself per chunk<extra></extra>",
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    finite = np.isfinite(result.half_life) & (result.half_life > 0)
    figure.add_trace(
        go.Scatter(
            x=slots[finite],
            y=result.half_life[finite],
            mode="markers",
            marker={"color": second, "size": 10, "symbol": "square"},
            customdata=100 * result.retention[finite],
            hovertemplate="slot %{x}: half gone after %{y:.0f} tokens; keeps %{customdata:.1f}% a chunk<extra></extra>",
            showlegend=False,
        ),
        row=1,
        col=2,
    )
    figure.update_xaxes(title_text="slot")
    figure.update_yaxes(title_text="write gate (share replaced per chunk)", range=[-0.02, 1.02], row=1, col=1)
    figure.update_yaxes(title_text="half-life (tokens, log scale)", type="log", row=1, col=2)
    hidden = int((~finite).sum())
    remark = f"; {counted(hidden, 'slot')} with a half-life of zero or infinity not drawn" if hidden else ""
    return finish(
        figure,
        title=f"Workspace writes and retention, block {result.layer}",
        subtitle=f"mean over chunks, bars 5 to 95% of chunks; {counted(result.num_chunks, 'chunk')} of "
        f"{counted(result.num_samples, 'sample')}{remark}",
        theme=theme,
        path="workspace",
        layer=result.layer,
        path_use=path_use,
        height=360,
    )


def state_norms(result: StateNorms, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Heat map of the norm of each head's state as the text goes on."""
    num_heads = result.mean.shape[1]
    figure = go.Figure(
        go.Heatmap(
            z=result.mean.T,
            x=result.position,
            y=[str(head) for head in range(num_heads)],
            zmin=0,
            colorscale=MAGNITUDE,
            colorbar={"title": {"text": "Frobenius<br>norm", "side": "top"}},
            customdata=result.spread.T,
            hovertemplate="after %{x} tokens: head %{y}, norm %{z:.3g} (sd %{customdata:.2g})<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="tokens read", showgrid=False)
    figure.update_yaxes(title_text="head", type="category", showgrid=False)
    return finish(
        figure,
        title=f"State norm by head and time, block {result.layer}",
        subtitle=f"mean over samples; {counted(int(result.num_samples[0]), 'sample')} at the first reading, "
        f"{result.num_samples[-1]:,} at the last",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=110 + max(160, 18 * num_heads),
    )


def half_life(result: HalfLife, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Half-life of each head's state in tokens, with its range over tokens."""
    finite = np.isfinite(result.half_life)
    heads = np.arange(len(result.half_life))[finite]
    half, span = result.half_life[finite], result.quantiles[finite]
    upper = np.where(np.isfinite(span[:, 1]), span[:, 1], half)
    figure = go.Figure(
        go.Scatter(
            x=heads,
            y=half,
            mode="markers",
            marker={
                "size": 10,
                "color": colours(1, theme)[0],
                "line": {"width": 1, "color": text_colour(theme)},
            },
            error_y={
                "type": "data",
                "array": np.maximum(upper - half, 0),
                "arrayminus": np.maximum(half - span[:, 0], 0),
                "thickness": 1.5,
            },
            hovertemplate="head %{x}: %{y:.1f} tokens<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="head")
    figure.update_yaxes(title_text="half-life (tokens, log scale)", type="log")
    hidden = len(result.half_life) - len(heads)
    remark = f"; {counted(hidden, 'head')} that never decays not drawn" if hidden else ""
    return finish(
        figure,
        title=f"How long each head remembers, block {result.layer}",
        subtitle=f"half-life at the mean decay rate, bars at its 5 and 95% quantiles over "
        f"{counted(result.num_tokens, 'token')} of {counted(result.num_samples, 'sample')}{remark}",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=360,
    )


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
    figure.update_xaxes(
        title_text="distance from the query to the block's first token (tokens)", type="category"
    )
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

"""Figures of the workspace's slots: what is written into them, what is read, how sharply and how old it is."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hydra_lab.figures.theme import (
    MAGNITUDE,
    Theme,
    colours,
    counted,
    finish,
    index_axis,
    muted_colour,
    text_colour,
)
from hydra_lab.metrics import PathUse, ReadEntropy, ReadLag, SlotReads, SlotWrites, WriteEntropy


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


def read_entropy(
    result: ReadEntropy, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """How many slots a token reads as the text goes on, against what one reader of everything would."""
    main = colours(1, theme)[0]
    centre = (result.edges[:-1] + result.edges[1:] - 1) / 2
    figure = go.Figure(
        go.Scatter(
            x=centre,
            y=result.by_position,
            mode="lines+markers",
            name="of a token, mean",
            line={"color": main, "width": 2},
            marker={"size": 4},
            customdata=result.num_slots**result.by_position,
            hovertemplate="around token %{x}: %{y:.3f}, as many as %{customdata:.1f} slots read evenly<extra></extra>",
        )
    )
    for value, name, colour, dash in (
        (result.mean_gated, "the same, weighted by read gate", text_colour(theme), "dot"),
        (result.of_mean, "of all tokens' mean attention", muted_colour(theme), "dash"),
    ):
        figure.add_trace(
            go.Scatter(
                x=[0, int(result.edges[-1]) - 1],
                y=[value, value],
                mode="lines",
                name=name,
                line={"color": colour, "width": 2, "dash": dash},
                hovertemplate=name + ": %{y:.3f}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="position (tokens)")
    figure.update_yaxes(title_text="entropy / ln(slots)", range=[-0.02, 1.02])
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"})
    return finish(
        figure,
        title=f"How many slots a token reads, block {result.layer}",
        subtitle=f"0: one slot, 1: all {result.num_slots} alike; mean {result.mean:.3f}, as many as "
        f"{result.num_slots**result.mean:.1f} slots read evenly<br>mean over tokens in bins of "
        f"{np.diff(result.edges).max()} positions; {counted(int(result.num_tokens.sum()), 'token')} of "
        f"{counted(result.num_samples, 'sample')}",
        theme=theme,
        path="workspace",
        layer=result.layer,
        path_use=path_use,
        height=380,
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
    figure.update_xaxes(title_text="slot", **index_axis(len(slots)))
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


def write_entropy(
    result: WriteEntropy, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """How many of a chunk's tokens each slot takes in."""
    low, high = result.quantiles.T
    figure = go.Figure(
        go.Scatter(
            x=np.arange(len(result.entropy)),
            y=result.entropy,
            mode="markers",
            marker={"color": colours(1, theme)[0], "size": 10},
            error_y={
                "type": "data",
                "array": np.maximum(high - result.entropy, 0),
                "arrayminus": np.maximum(result.entropy - low, 0),
                "thickness": 1.5,
            },
            customdata=result.chunk_size**result.entropy,
            hovertemplate="slot %{x}: %{y:.3f}, as many as %{customdata:.1f} tokens taken evenly<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="slot", **index_axis(len(result.entropy)))
    figure.update_yaxes(title_text="entropy / ln(tokens of a chunk)", range=[-0.02, 1.02])
    return finish(
        figure,
        title=f"How many tokens a slot takes in, block {result.layer}",
        subtitle=f"0: one token of the chunk, 1: the mean of its {result.chunk_size}<br>mean over chunks, bars 5 to "
        f"95% of chunks; {counted(result.num_chunks, 'chunk')} of {counted(result.num_samples, 'sample')}",
        theme=theme,
        path="workspace",
        layer=result.layer,
        path_use=path_use,
        height=360,
    )


def read_lag(result: ReadLag, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Heat map of how many chunks ago what is read from each slot was written."""
    lags = [
        f"{low:,}" if high - low == 1 else f"{low:,} to {high - 1:,}"
        for low, high in zip(result.edges[:-1], result.edges[1:], strict=True)
    ]
    whole = np.nan_to_num(result.slot_share) @ np.nan_to_num(result.share)
    rows = np.concatenate([result.share_if_even[None], whole[None], result.share])
    slots = [f"{slot} ({share:.0f}%)" for slot, share in enumerate(100 * result.slot_share)]
    labels = ["even mean", "all slots", *slots]
    figure = go.Figure(
        go.Heatmap(
            z=100 * rows,
            x=[*lags, "start"],
            y=labels,
            zmin=0,
            zmax=100 * float(np.nanmax(rows)),
            colorscale=MAGNITUDE,
            colorbar={"title": {"text": "% of<br>what is<br>read", "side": "top"}},
            texttemplate="%{z:.0f}",
            hovertemplate="slot %{y}, %{x} chunks ago: %{z:.1f}% of what is read<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(
        title_text=f"age (chunks of {result.chunk_size} tokens)",
        type="category",
        showgrid=False,
    )
    figure.update_yaxes(
        title_text="slot (its share of the reads)", type="category", autorange="reversed", showgrid=False
    )
    known = np.isfinite(result.mean_lag)
    span = "nothing written is read"
    if known.any():
        low, high = result.mean_lag[known].min(), result.mean_lag[known].max()
        span = f"slots' mean lags {low:.1f} to {high:.1f} chunks"
    return finish(
        figure,
        title=f"How old what is read is, block {result.layer}",
        subtitle=f"reads weighted by attention and gate; start: what the slot held before the text; {span}<br>"
        f"even mean: a slot that averages all it was offered; {counted(result.num_tokens, 'token')} of "
        f"{counted(result.num_samples, 'sample')}",
        theme=theme,
        path="workspace",
        layer=result.layer,
        path_use=path_use,
        height=110 + 24 * len(labels),
    )

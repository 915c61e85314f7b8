"""Figures of how the router decides: margin, sparsity, saturation, specialization."""

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.grid import heat_map_grid
from hydra_lab.figures.theme import (
    DIVERGING,
    MAGNITUDE,
    SYMBOLS,
    Theme,
    block_labels,
    colours,
    counted,
    finish,
    muted_colour,
    text_colour,
)
from hydra_lab.metrics import (
    ExpertCost,
    ExpertSparsity,
    PathUse,
    RouterSaturation,
    RoutingMargin,
    Specialization,
)
from hydra_lab.metrics.router import NEAR_TIE

_MOST_CELL_LABELS = 16  # experts up to which a cell names its favourite
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def routing_margin(
    result: RoutingMargin, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Spread of the chunks' margins by block and domain: median, quartiles, and 5 to 95%."""
    labels = block_labels(result.layers, "moe", path_use)
    num_domains = len(result.domains)
    offsets = np.linspace(-0.36, 0.36, num_domains) if num_domains > 1 else np.zeros(1)
    palette = colours(num_domains, theme)
    figure = go.Figure()
    for z, domain in enumerate(result.domains):
        rows = np.arange(len(labels)) + offsets[z]
        for low, high, width in ((0, 4, 2), (1, 3, 6)):
            x: list[float | None] = []
            y: list[float | None] = []
            for row, quantiles in zip(rows, result.quantiles[:, z], strict=True):
                x += [float(quantiles[low]), float(quantiles[high]), None]
                y += [float(row), float(row), None]
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines",
                    opacity=0.5,
                    line={"color": palette[z], "width": width},
                    legendgroup=domain,
                    showlegend=False,
                    hoverinfo="skip",
                )
            )
        figure.add_trace(
            go.Scatter(
                x=result.quantiles[:, z, 2],
                y=rows,
                mode="markers",
                name=f"{domain} (n={result.num_chunks[z]:,})",
                legendgroup=domain,
                marker={
                    "size": 9,
                    "symbol": SYMBOLS[z % len(SYMBOLS)],
                    "color": palette[z],
                    "line": {"width": 1, "color": text_colour(theme)},
                },
                customdata=np.stack([result.mean[:, z], 100 * result.near_tie[:, z]], axis=-1),
                hovertemplate=domain
                + ": median %{x:.2f}, mean %{customdata[0]:.2f} logits<br>"
                + "near ties: %{customdata[1]:.1f}%<extra></extra>",
            )
        )
    figure.add_vline(x=NEAR_TIE, line={"color": muted_colour(theme), "dash": "dot", "width": 1.5})
    figure.update_xaxes(
        title_text="margin of the last chosen expert over the best left out (logits)", rangemode="tozero"
    )
    figure.update_yaxes(
        tickvals=np.arange(len(labels)), ticktext=labels, range=[len(labels) - 0.5, -0.5], title_text=""
    )
    near = _weighted(result.near_tie, result.num_chunks)
    return finish(
        figure,
        title="Routing margin",
        subtitle=f"median, quartiles and 5 to 95% over {counted(int(result.num_chunks.sum()), 'chunk')} "
        f"({counted(int(result.num_samples.sum()), 'sample')})<br>near ties (below {NEAR_TIE:g}, dotted): "
        + ", ".join(
            f"block {layer} {100 * share:.0f}%" for layer, share in zip(result.layers, near, strict=True)
        ),
        theme=theme,
        path="moe",
        path_use=path_use,
        height=100 + (30 + 14 * num_domains) * len(labels),
    )


def _weighted(values_YZ: np.ndarray, weight_Z: np.ndarray) -> np.ndarray:
    """[Y] mean over domains, weighted by their sizes."""
    return (np.nan_to_num(values_YZ) * weight_Z).sum(axis=1) / max(1, weight_Z.sum())


def expert_sparsity(
    result: ExpertSparsity, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Share of the experts that windows of growing length leave unused, by block."""
    labels = block_labels(result.layers, "moe", path_use)
    palette = colours(len(labels), theme)
    known = np.flatnonzero(result.num_windows > 0)
    windows = result.windows[known]
    figure = go.Figure()
    for y, label in enumerate(labels):
        figure.add_trace(
            go.Scatter(
                x=windows,
                y=100 * result.sparsity[y, known],
                mode="lines+markers",
                name=label,
                legendgroup=label,
                line={"color": palette[y], "width": 2},
                marker={"size": 8, "symbol": SYMBOLS[y % len(SYMBOLS)]},
                hovertemplate=label + ": windows of %{x} tokens leave %{y:.1f}% unused<extra></extra>",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=windows,
                y=100 * result.if_independent[y, known],
                mode="lines",
                name="the same, chunks independent" if y == 0 else "",
                showlegend=y == 0,
                line={"color": palette[y], "width": 1.5, "dash": "dot"},
                hovertemplate=label + ", chunks independent: %{y:.1f}%<extra></extra>",
            )
        )
    figure.update_xaxes(
        title_text="window (successive tokens, log scale)", type="log", tickvals=windows, ticktext=windows
    )
    figure.update_yaxes(title_text="experts that no token of the window uses (%)", range=[0, 103])
    return finish(
        figure,
        title="Sparsity of the experts",
        subtitle=f"chunk-level sparsity CLS, mean over all windows of {counted(result.num_samples, 'sample')} "
        f"({counted(int(result.num_windows[0]), 'token')}); at 1 token it is token-level sparsity (TLS), "
        f"{100 * float(np.mean(result.token_sparsity)):.0f}%",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=380,
    )


def router_saturation(
    result: RouterSaturation, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Share of the final experts that each earlier checkpoint chose already, by block."""
    labels = block_labels(result.layers, "moe", path_use)
    palette = colours(len(labels), theme)
    figure = go.Figure()
    for y, label in enumerate(labels):
        figure.add_trace(
            go.Scatter(
                x=list(result.checkpoints),
                y=100 * result.saturation[:, y],
                mode="lines+markers",
                name=label,
                line={"color": palette[y], "width": 2},
                marker={"size": 8, "symbol": SYMBOLS[y % len(SYMBOLS)]},
                hovertemplate=label + " at %{x}: %{y:.1f}%<extra></extra>",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=list(result.checkpoints),
                y=100 * result.if_independent[:, y],
                mode="lines",
                name="the same, independent choices" if y == 0 else "",
                showlegend=y == 0,
                line={"color": palette[y], "width": 1.5, "dash": "dot"},
                hovertemplate=label + ", independent choices: %{y:.1f}%<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="checkpoint", type="category")
    figure.update_yaxes(title_text="experts that are the final ones (%)", range=[0, 103])
    return finish(
        figure,
        title="Router saturation",
        subtitle=f"share of the top-k that the final checkpoint chooses too, mean over "
        f"{counted(result.num_chunks, 'chunk')} ({counted(result.num_samples, 'sample')})",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=380,
    )


def specialization(
    result: Specialization, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat map of how much each expert says about the domain or token class that it serves, with its favourite."""
    num_experts = result.score.shape[1]
    blocks = block_labels(result.layers, "moe", path_use)
    names = np.array([*result.labels, "never chosen"], dtype=object)[result.favourite]
    scores = np.where(np.isnan(result.score), "", np.char.mod("%.2f", np.nan_to_num(result.score)))
    text = np.char.add(np.char.add(scores.astype(str), "<br>"), names.astype(str))
    figure = go.Figure(
        go.Heatmap(
            z=result.score,
            x=[str(expert) for expert in range(num_experts)],
            y=[f"{label}<br>all {score:.3f}" for label, score in zip(blocks, result.block, strict=True)],
            zmin=0,
            zmax=max(0.1, float(np.nanmax(result.score))),
            colorscale=MAGNITUDE,
            colorbar={"title": {"text": "score<br>(0 to 1)", "side": "top"}},
            text=text,
            customdata=names,
            texttemplate="%{text}" if num_experts <= _MOST_CELL_LABELS else None,
            textfont={"size": 11},
            hovertemplate="%{y}<br>expert %{x}: score %{z:.3f}, most for %{customdata}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(title_text="expert", showgrid=False)
    figure.update_yaxes(title_text="", autorange="reversed", showgrid=False)
    noun = "chunk" if result.kind == "domain" else "token"
    return finish(
        figure,
        title=f"Specialization on {result.kind}s",
        subtitle="0: the expert serves all alike, 1: a single one; and the one that it serves most<br>"
        f"{counted(int(result.num_choices.sum()), noun)} of {counted(result.num_samples, 'sample')}; a block without "
        f"any would score {result.bias[0]:.3f} or more by chance",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=90 + 56 * len(blocks),
    )


def expert_cost(result: ExpertCost, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Heat maps of what each expert's removal costs each domain, one per block; blue where the loss falls."""
    largest = max(float(np.nanmax(np.abs(result.cost))), 1e-6)
    figure, height = heat_map_grid(
        result.cost,
        titles=block_labels(result.layers, "moe", path_use),
        x=[str(expert) for expert in range(result.cost.shape[2])],
        y=list(result.domains),
        x_title="expert removed",
        y_title="domain",
        colour_title="nats per<br>token",
        colour_range=(-largest, largest),
        colour_scale=DIVERGING,
        hover="%{y} without expert %{x}: loss rises by %{z:.4f} nats per token",
    )
    figure.update_yaxes(autorange="reversed")
    return finish(
        figure,
        title="What removing an expert costs, by domain",
        subtitle=f"mean loss increase over {counted(int(result.num_samples.sum()), 'sample')} of "
        f"{counted(len(result.domains), 'domain')}, largest standard error "
        f"{float(np.nanmax(result.error, initial=0.0)):.3f}",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=height,
    )

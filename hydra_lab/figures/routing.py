"""Figures of the chunk-level mixture of experts."""

from collections.abc import Sequence

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
    index_axis,
    muted_colour,
    text_colour,
)
from hydra_lab.metrics import (
    CoActivation,
    ExpertByChunk,
    ExpertByDomain,
    ExpertByPosition,
    ExpertByTokenClass,
    ExpertLoad,
    PathUse,
    RoutingMap,
    SwitchRate,
)

_MOST_CELL_LABELS = 48  # columns up to which cells carry a number


def expert_load(result: ExpertLoad, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Heat map of each expert's share of the choices, by block; dead experts are marked."""
    num_experts = result.share.shape[1]
    figure = go.Figure(
        go.Heatmap(
            z=100 * result.share,
            x=[str(expert) for expert in range(num_experts)],
            y=[_load_label(result, y, path_use) for y in range(len(result.layers))],
            zmin=0,
            zmax=max(100 * float(np.nanmax(result.share)), 200 / num_experts),
            colorscale=MAGNITUDE,
            colorbar={"title": {"text": "% of<br>choices", "side": "top"}},
            text=np.where(result.dead, "dead", np.char.mod("%.0f", 100 * np.nan_to_num(result.share))),
            texttemplate="%{text}" if num_experts <= _MOST_CELL_LABELS else None,
            hovertemplate="%{y}<br>expert %{x}: %{z:.1f}% of choices<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(title_text="expert", showgrid=False)
    figure.update_yaxes(title_text="", autorange="reversed", showgrid=False)
    return finish(
        figure,
        title="Expert load",
        subtitle=f"share of the top-k choices of {counted(result.num_chunks, 'chunk')} "
        f"({counted(result.num_samples, 'sample')}); even: {100 / num_experts:.1f}%; "
        f"{counted(int(result.dead.sum()), 'dead expert')}",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=90 + 46 * len(result.layers),
    )


def _load_label(result: ExpertLoad, y: int, path_use: PathUse | None) -> str:
    label = block_labels([result.layers[y]], "moe", path_use)[0]
    return f"{label}<br>largest/mean {result.imbalance[y]:.2f}"


def expert_by_domain(
    result: ExpertByDomain, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat maps of each expert's share of each domain's choices, one per block."""
    return _expert_by_label(
        result,
        result.domains,
        "domain",
        f"share of each domain's top-k choices; {_range(result.num_samples, 'sample')} and "
        f"{_range(result.num_chunks, 'chunk')} per domain",
        path_use,
        theme,
    )


def expert_by_token_class(
    result: ExpertByTokenClass, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat maps of each expert's share of the choices made for each class of token, one per block."""
    return _expert_by_label(
        result,
        result.classes,
        "token class",
        f"share of the top-k choices made for the class's tokens; {counted(result.num_samples, 'sample')}, "
        f"{_range(result.num_tokens, 'token')} per class<br>a chunk's tokens share their experts",
        path_use,
        theme,
    )


def _expert_by_label(
    result: ExpertByDomain | ExpertByTokenClass,
    labels: Sequence[str],
    kind: str,
    subtitle: str,
    path_use: PathUse | None,
    theme: Theme,
) -> go.Figure:
    owner = kind.split()[-1]
    figure, height = heat_map_grid(
        100 * result.share,
        titles=block_labels(result.layers, "moe", path_use),
        x=[str(expert) for expert in range(result.share.shape[2])],
        y=list(labels),
        x_title="expert",
        y_title=kind,
        colour_title=f"% of the<br>{owner}'s<br>choices",
        colour_range=(0, 100 * float(np.nanmax(result.share))),
        hover="%{y}: expert %{x} gets %{z:.1f}% of choices<br>log2 of share over mean: %{customdata:.2f}",
        hover_values=result.lift,
        text="%{z:.0f}" if result.share.shape[2] <= 8 else None,
    )
    figure.update_xaxes(**index_axis(result.share.shape[2]))
    _reverse_rows(figure)
    return finish(
        figure,
        title=f"Experts by {kind}",
        subtitle=subtitle,
        theme=theme,
        path="moe",
        path_use=path_use,
        height=height,
    )


def expert_by_chunk(
    result: ExpertByChunk, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat maps of each expert's share of the choices by the chunk's index in its text, one per block."""
    num_chunks = result.share.shape[1]
    figure, height = heat_map_grid(
        100 * result.share.swapaxes(1, 2),
        titles=block_labels(result.layers, "moe", path_use),
        x=np.arange(num_chunks),
        y=[str(expert) for expert in range(result.share.shape[2])],
        x_title=f"chunk ({result.chunk_size} tokens each)",
        y_title="expert",
        colour_title="% of<br>choices",
        colour_range=(0, 100 * float(np.nanmax(result.share))),
        hover="chunk %{x}: expert %{y} gets %{z:.1f}% of choices",
    )
    return finish(
        figure,
        title="Experts by chunk",
        subtitle=f"share of the top-k choices over samples; {counted(int(result.num_samples[0]), 'sample')} at the "
        f"first chunk, {result.num_samples[-1]:,} at the last",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=height,
    )


def expert_by_position(
    result: ExpertByPosition, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat maps of the mean weight on each expert by the token's position, one per block."""
    figure, height = heat_map_grid(
        result.weight.swapaxes(1, 2),
        titles=block_labels(result.layers, "moe", path_use),
        x=(result.edges[:-1] + result.edges[1:] - 1) / 2,
        y=[str(expert) for expert in range(result.weight.shape[2])],
        x_title="position (tokens)",
        y_title="expert",
        colour_title="mean<br>weight",
        colour_range=(0, float(np.nanmax(result.weight))),
        hover="around token %{x}: expert %{y} weighs %{z:.3f}",
    )
    return finish(
        figure,
        title="Expert weight by position",
        subtitle=f"mean weight over tokens; {counted(int(result.num_tokens.sum()), 'token')} in bins of "
        f"{np.diff(result.edges).max()} positions",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=height,
    )


def co_activation(
    result: CoActivation, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat maps of how much more often two experts serve the same chunk than their loads alone would give."""
    with np.errstate(divide="ignore"):
        log_lift = np.log2(result.lift)
    largest = 3.0
    num_experts = result.lift.shape[1]
    names = [str(expert) for expert in range(num_experts)]
    figure, height = heat_map_grid(
        np.clip(log_lift, -largest, largest),
        titles=block_labels(result.layers, "moe", path_use),
        x=names,
        y=names,
        x_title="expert",
        y_title="expert",
        colour_title="log2<br>(pairs /<br>expected)",
        colour_range=(-largest, largest),
        colour_scale=DIVERGING,
        hover="experts %{x} and %{y}: together in %{customdata:.1%} of chunks<br>log2 of that over expected: %{z:.2f}",
        hover_values=result.probability,
        cell_height=30,
    )
    figure.update_xaxes(**index_axis(num_experts))
    _reverse_rows(figure)
    return finish(
        figure,
        title="Experts chosen together",
        subtitle=f"all pairs of the top-k over {counted(result.num_chunks, 'chunk')} "
        f"({counted(result.num_samples, 'sample')}); 0: as often as the two loads alone would give",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=height,
    )


def switch_rate(result: SwitchRate, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """How often the first choice changes from one chunk to the next, by block and domain."""
    labels = block_labels(result.layers, "moe", path_use)
    rows = np.arange(len(labels), dtype=np.float64)
    offsets = np.linspace(-0.3, 0.3, len(result.domains)) if len(result.domains) > 1 else np.zeros(1)
    figure = go.Figure()
    for z, domain in enumerate(result.domains):
        figure.add_trace(
            go.Scatter(
                x=100 * result.first_by_domain[:, z],
                y=rows + offsets[z],
                mode="markers",
                name=f"{domain} (n={result.num_pairs[z]:,})",
                marker={
                    "size": 10,
                    "symbol": SYMBOLS[z % len(SYMBOLS)],
                    "color": colours(z + 1, theme)[z],
                    "line": {"width": 1, "color": text_colour(theme)},
                },
                hovertemplate=domain + ": %{x:.1f}%<extra></extra>",
            )
        )
    for values, name, colour, dash in (
        (result.first, "all domains", text_colour(theme), "solid"),
        (result.first_if_independent, "if chunks were independent", muted_colour(theme), "dot"),
    ):
        x: list[float | None] = []
        y: list[float | None] = []
        for row, value in zip(rows, values, strict=True):
            x += [100 * float(value), 100 * float(value), None]
            y += [float(row) - 0.4, float(row) + 0.4, None]
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                name=name,
                line={"color": colour, "width": 2, "dash": dash},
                hovertemplate=name + ": %{x:.1f}%<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="successive chunks whose first expert differs (%)", range=[-2, 102])
    figure.update_yaxes(tickvals=rows, ticktext=labels, range=[len(labels) - 0.5, -0.5], title_text="")
    return finish(
        figure,
        title="Switch rate",
        subtitle=f"over {counted(int(result.num_pairs.sum()), 'pair')} of successive chunks "
        f"({counted(int(result.num_samples.sum()), 'sample')}); "
        f"mean share of the top-k replaced: {100 * float(np.mean(result.replaced)):.0f}%",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=110 + 90 * len(labels),
    )


def routing_map(
    result: RoutingMap,
    *,
    path_use: PathUse | None = None,
    theme: Theme = "light",
    chunk_texts: Sequence[str] | None = None,
) -> go.Figure:
    """The experts of one text, chunk by chunk and block by block; each expert has a colour and its number.

    Args:
        chunk_texts: the text of each chunk, for the hover label.
    """
    num_layers, num_chunks, num_choices = result.experts.shape
    labels = block_labels(result.layers, "moe", path_use)
    rows = [label if k == 0 else f"choice {k + 1}" for label in labels for k in range(num_choices)]
    experts = result.experts.transpose(0, 2, 1).reshape(num_layers * num_choices, num_chunks)
    weights = result.weights.transpose(0, 2, 1).reshape(experts.shape)
    palette = colours(result.num_experts, theme)
    steps = np.linspace(0, 1, result.num_experts + 1)
    scale = [[float(edge), palette[e]] for e in range(result.num_experts) for edge in steps[e : e + 2]]
    words = [""] * num_chunks if chunk_texts is None else ["<br>" + text for text in chunk_texts]
    custom = np.empty((*experts.shape, 3), dtype=object)
    custom[..., 0] = np.char.mod("%.2f", weights)
    custom[..., 1] = np.array(words, dtype=object)[None]
    custom[..., 2] = np.array(
        [f"block {layer}, choice {k + 1}" for layer in result.layers for k in range(num_choices)],
        dtype=object,
    )[:, None]
    figure = go.Figure(
        go.Heatmap(
            z=experts,
            y=np.arange(len(rows)),
            x=np.arange(num_chunks),
            zmin=-0.5,
            zmax=result.num_experts - 0.5,
            colorscale=scale,
            customdata=custom,
            texttemplate="%{z}" if num_chunks <= _MOST_CELL_LABELS else None,
            hovertemplate="chunk %{x}, %{customdata[2]}: expert %{z}, mean weight %{customdata[0]}"
            "%{customdata[1]}<extra></extra>",
            colorbar={
                "title": {"text": "expert", "side": "top"},
                "tickvals": list(range(result.num_experts)),
                "ticks": "",
            },
            xgap=2 if num_chunks <= _MOST_CELL_LABELS else 0,
            ygap=2,
        )
    )
    figure.update_xaxes(title_text=f"chunk ({result.chunk_size} tokens each)", showgrid=False)
    figure.update_yaxes(tickvals=np.arange(len(rows)), ticktext=rows, autorange="reversed", showgrid=False)
    return finish(
        figure,
        title="Which experts each chunk uses",
        subtitle=f"one text of {counted(result.num_tokens, 'token')} (n = 1), experts best first",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=100 + 30 * len(rows),
    )


def _reverse_rows(figure: go.Figure) -> None:
    """First row on top, in every plot of the grid."""
    figure.update_yaxes(autorange="reversed")


def _range(counts: np.ndarray, noun: str) -> str:
    low, high = int(counts.min()), int(counts.max())
    return counted(low, noun) if low == high else f"{low:,} to {high:,} {noun}s"

"""The study's figures."""

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.grid import heat_map_grid
from hydra_lab.figures.theme import DIVERGING, MAGNITUDE, SYMBOLS, Theme, block_labels, colours, finish
from hydra_lab.path_use import PathUse
from probes.workspace_tracing.analysis import Trace
from probes.workspace_tracing.measure import Floats


def draw(traces: list[Trace], use: PathUse, *, theme: Theme = "light") -> dict[str, go.Figure]:
    """Every figure of the study by name."""
    return {
        "patched": patched(traces, use, theme=theme),
        "content": content(traces, use, theme=theme),
        "route": route(traces, use, theme=theme),
        "lag": lag(traces, use, theme=theme),
    }


def patched(traces: list[Trace], use: PathUse, *, theme: Theme) -> go.Figure:
    """How far each slot alone moves the answer."""
    values = 100 * np.stack([trace.slot_share for trace in traces], axis=1)
    return _by_slot(
        values,
        traces,
        use,
        title="Does a slot hold the premise?",
        subtitle="how far the answer moves towards the other premise's when one slot is patched, of the whole way;<br>"
        "problems that choose a slot, " + _counts({t.kind: len(t.choosing) for t in traces}),
        colour_title="% of<br>the way",
        colour_range=(-100, 100),
        colour_scale=DIVERGING,
        hover="%{y}, slot %{x}: %{z:.1f}% of the way",
        cell="%{z:.1f}",
        theme=theme,
    )


def content(traces: list[Trace], use: PathUse, *, theme: Theme) -> go.Figure:
    """How much the slots differ where one premise differs."""
    values = np.stack([trace.baseline.content.mean(axis=1) for trace in traces], axis=1)
    return _by_slot(
        values,
        traces,
        use,
        title="How much do the slots differ where one premise differs?",
        subtitle="distance of what the last token finds, over the norm; 0: the same, 1.4: unrelated; mean over "
        "problems, " + _counts({t.kind: len(t.baseline.contrast) for t in traces}),
        colour_title="distance<br>over norm",
        colour_range=(0.0, max(float(values.max()), 1e-3)),
        colour_scale=MAGNITUDE,
        hover="%{y}, slot %{x}: %{z:.3f}",
        cell="%{z:.2f}",
        theme=theme,
    )


def route(traces: list[Trace], use: PathUse, *, theme: Theme) -> go.Figure:
    """What part of the reading at the end goes back to the premise's tokens."""
    values = 100 * np.stack(
        [(trace.baseline.written * trace.baseline.read).mean(axis=1) for trace in traces], axis=1
    )
    return _by_slot(
        values,
        traces,
        use,
        title="How much of what is read at the end was written from the premise?",
        subtitle="share of the slot that the premise's tokens wrote, times the last token's attention and gate; mean "
        "over problems, " + _counts({t.kind: len(t.baseline.contrast) for t in traces}),
        colour_title="% of<br>a reading",
        colour_range=(0.0, max(float(values.max()), 1e-3)),
        colour_scale=MAGNITUDE,
        hover="%{y}, slot %{x}: %{z:.3f}%",
        cell="%{z:.2f}",
        theme=theme,
    )


def lag(traces: list[Trace], use: PathUse, *, theme: Theme) -> go.Figure:
    """How far all slots together move the answer, by the distance from writing to reading."""
    figure = go.Figure()
    shares = [-5.0, 105.0]  # the whole way on the axis, so that little looks little
    for index, trace in enumerate(traces):
        if trace.everything is None:
            continue
        share = 100 * (trace.everything.own - trace.everything.other) / trace.way
        shares += share.tolist()
        figure.add_trace(
            go.Scatter(
                x=trace.baseline.lag[trace.testing],
                y=share,
                mode="markers",
                name=trace.kind,
                marker={
                    "color": colours(len(traces), theme)[index],
                    "symbol": SYMBOLS[index % len(SYMBOLS)],
                    "size": 9,
                    "opacity": 0.8,
                },
                hovertemplate=f"{trace.kind}: %{{x}} tokens later, %{{y:.1f}}% of the way<extra></extra>",
            )
        )
    figure.update_xaxes(
        title_text="tokens from the end of the premise's chunk to the question's end", rangemode="tozero"
    )
    figure.update_yaxes(title_text="% of the way to the other answer", range=[min(shares), max(shares)])
    return finish(
        figure,
        title="Does the workspace carry the premise, and how far?",
        subtitle="all slots of all blocks from the run with the other premise, less the same for a premise that is not "
        "asked; one mark per problem, " + _counts({t.kind: len(t.testing) for t in traces}),
        theme=theme,
        path="workspace",
        path_use=use,
        height=360,
    )


def _counts(sizes: dict[str, int]) -> str:
    return "n = " + ", ".join(f"{size} {kind}" for kind, size in sizes.items())


def _by_slot(
    values: Floats,
    traces: list[Trace],
    use: PathUse,
    *,
    title: str,
    subtitle: str,
    colour_title: str,
    colour_range: tuple[float, float],
    colour_scale: str,
    hover: str,
    cell: str,
    theme: Theme,
) -> go.Figure:
    """Heat maps [Y, kinds, S], one per block."""
    layers = traces[0].layers
    figure, height = heat_map_grid(
        values,
        titles=block_labels(layers, "workspace", use),
        x=[str(slot) for slot in range(values.shape[2])],
        y=[trace.kind for trace in traces],
        x_title="slot",
        y_title="",
        colour_title=colour_title,
        colour_range=colour_range,
        colour_scale=colour_scale,
        text=cell,
        hover=hover,
        cell_height=46,
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_coloraxes(colorbar_nticks=5)
    return finish(
        figure,
        title=title,
        subtitle=subtitle,
        theme=theme,
        path="workspace",
        path_use=use,
        height=height,
    )

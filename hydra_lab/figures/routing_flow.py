"""Figure of the flow of chunks between experts."""

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.theme import Theme, colours, counted, finish, text_colour
from hydra_lab.metrics.routing_flow import RoutingFlow
from hydra_lab.path_use import PathUse

_SMALLEST = 0.002  # share of the chunks below which a ribbon is too thin to see


def routing_flow(
    result: RoutingFlow, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Sankey diagram: experts of each block from top to bottom, ribbons as wide as the chunks that take both."""
    num_experts = result.share.shape[1]
    palette = colours(num_experts, theme)
    y, source, target = np.nonzero(result.share >= _SMALLEST)
    columns = np.repeat(np.arange(len(result.layers)), num_experts)
    figure = go.Figure(
        go.Sankey(
            arrangement="snap",
            node={
                "label": [f"{layer}: expert {e}" for layer in result.layers for e in range(num_experts)],
                "color": palette * len(result.layers),
                "x": np.interp(columns, (0, len(result.layers) - 1), (0.001, 0.999)),
                "pad": 10,
                "thickness": 14,
                "line": {"width": 0},
                "hovertemplate": "block %{label}: %{value:.1f}% of chunks<extra></extra>",
            },
            link={
                "source": y * num_experts + source,
                "target": (y + 1) * num_experts + target,
                "value": 100 * result.share[y, source, target],
                "color": [_faint(palette[expert]) for expert in source],
                "hovertemplate": "%{source.label} to %{target.label}<br>%{value:.1f}% of chunks<extra></extra>",
            },
            textfont={"color": text_colour(theme), "size": 12},
        )
    )
    said = ", ".join(
        f"{a} to {b}: {value:.2f} nats"
        for a, b, value in zip(result.layers, result.layers[1:], result.information, strict=False)
    )
    return finish(
        figure,
        title="Flow between the blocks' experts",
        subtitle=f"first choices of {counted(result.num_chunks, 'chunk')} "
        f"({counted(result.num_samples, 'sample')}); mutual information {said}; "
        f"flows under {100 * _SMALLEST:.1f}% left out",
        theme=theme,
        path="moe",
        path_use=path_use,
        height=420,
    )


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.35)"

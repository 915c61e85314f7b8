"""Figure of path use: what each path adds, and what the model loses without it."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hydra_lab.figures.theme import MAGNITUDE, Theme, colours, counted, finish, hatching
from hydra_lab.metrics import IDLE_LOSS, IDLE_SHARE, PathUse


def path_use(result: PathUse, *, theme: Theme = "light") -> go.Figure:
    """Each path's share of each block's update, beside the loss increase when the path is cut everywhere."""
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.45, 0.55],
        horizontal_spacing=0.16,
        subplot_titles=["share of the block's update", "loss increase when the path is cut everywhere"],
    )
    figure.update_annotations(font_size=13)
    blocks = [f"block {layer}" for layer in result.layers]
    for p, path in enumerate(result.paths):
        layers = result.layers_with(path)  # a missing bar would break the stack
        share = [100 * result.share_of(path, layer) for layer in layers]
        figure.add_trace(
            go.Bar(
                x=share,
                y=[f"block {layer}" for layer in layers],
                orientation="h",
                name=f"{path} (idle)" if result.is_idle(path) else path,
                marker={
                    "color": colours(p + 1, theme)[p],
                    "pattern": hatching(p, theme),
                },
                text=["" if each < 6 else f"{each:.0f}%" for each in share],
                textposition="inside",
                textangle=0,
                insidetextanchor="middle",
                customdata=result.cosine[[result.layers.index(layer) for layer in layers], p],
                hovertemplate=f"{path}: %{{x:.1f}}% of the update, cosine %{{customdata:.2f}}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    largest = max(float(np.max(result.loss_increase)), IDLE_LOSS)
    floor = 0.001
    ticks = [tick for tick in (0.001, 0.01, 0.1, 1.0, 10.0) if tick <= largest]
    figure.add_trace(
        go.Heatmap(
            z=np.log10(np.maximum(result.loss_increase, floor)),
            x=list(result.domains),
            y=[f"{path} (idle)" if result.is_idle(path) else path for path in result.paths],
            zmin=np.log10(floor),
            zmax=np.log10(largest),
            colorscale=MAGNITUDE,
            colorbar={
                "title": {"text": "nats per<br>token", "side": "top"},
                "tickvals": list(np.log10(ticks)),
                "ticktext": [f"{tick:g}" for tick in ticks],
                "x": 1.02,
            },
            text=[[f"{round(value, 2) + 0.0:.2f}" for value in row] for row in result.loss_increase],
            texttemplate="%{text}",
            customdata=result.loss_increase_error,
            hovertemplate="%{x} without %{y}: %{text} nats per token (standard error %{customdata:.3f})<extra></extra>",
            xgap=1,
            ygap=1,
        ),
        row=1,
        col=2,
    )
    figure.update_xaxes(title_text="mean share over tokens (%)", range=[0, 100.5], row=1, col=1)
    figure.update_xaxes(title_text="domain", showgrid=False, tickangle=-35, row=1, col=2)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_yaxes(categoryorder="array", categoryarray=blocks, row=1, col=1)
    figure.update_layout(
        barmode="stack",
        legend={"orientation": "h", "x": 0, "y": -0.24, "yanchor": "top", "traceorder": "normal"},
    )
    return finish(
        figure,
        title="Path use",
        subtitle=f"means over {counted(int(result.num_tokens.sum()), 'scored token')} of "
        f"{counted(int(result.num_samples.sum()), 'sample')}; idle: below {100 * IDLE_SHARE:.0f}% of the update in "
        f"every block, or below {IDLE_LOSS} nats per token in every domain",
        theme=theme,
        height=190 + 34 * max(len(blocks), len(result.paths)),
    )

"""The study's figures."""

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from hydra_lab import figures, metrics
from hydra_lab.figures.grid import heat_map_grid
from hydra_lab.figures.theme import (
    DIVERGING,
    SYMBOLS,
    Theme,
    block_labels,
    colours,
    finish,
    muted_colour,
    text_colour,
)
from probes.expert_specialization.analysis import LEVEL, Association, Causation, Control

_LARGEST_LIFT = 3.0


def draw(
    association: Association,
    controls: Control,
    causation: Causation,
    use: metrics.PathUse,
    *,
    theme: Theme = "light",
) -> dict[str, go.Figure]:
    """Every figure of the study by name."""
    return {
        "information": information(association, controls, use, theme=theme),
        "by_domain": preference(
            association.domain_share,
            association.domain_adjusted,
            association.domains,
            association,
            use,
            what="domain",
            unit="chunks by first choice",
            theme=theme,
        ),
        "by_token_class": preference(
            association.class_share,
            association.class_adjusted,
            association.classes,
            association,
            use,
            what="token class",
            unit="tokens by heaviest expert",
            theme=theme,
        ),
        "causal": ablation(causation, use, theme=theme),
        "agreement": agreement(causation, use, theme=theme),
        "path_use": figures.path_use(use, theme=theme),
    }


def information(
    association: Association, controls: Control, use: metrics.PathUse, *, theme: Theme
) -> go.Figure:
    """Mutual information per block, above its null, with interval and random routers."""
    labels = block_labels(association.layers, "moe", use)
    rows = np.arange(len(labels), dtype=np.float64)
    first, second = colours(2, theme)
    figure = go.Figure()
    for tests, offset, colour, symbol, name in (
        (association.domain_tests, -0.17, first, "circle", "first expert and domain"),
        (association.class_tests, 0.17, second, "square", "token's expert and class, given domain"),
    ):
        value = np.array([test.corrected for test in tests])
        shift = np.array(
            [test.value - test.corrected for test in tests]
        )  # the null's mean, taken off everywhere
        low, high = np.array([test.interval for test in tests]).T
        band = np.array([np.quantile(test.null, 0.95) for test in tests]) - shift
        x: list[float | None] = []
        y: list[float | None] = []
        for row, end in zip(rows, band, strict=True):
            x += [0.0, float(end), None]
            y += [float(row) + offset, float(row) + offset, None]
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                name=f"null of that, up to its 95% point ({'domain' if offset < 0 else 'class'})",
                line={"color": muted_colour(theme), "width": 12},
                opacity=0.5,
                showlegend=offset < 0,
                hoverinfo="skip",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=value,
                y=rows + offset,
                mode="markers",
                name=name,
                marker={
                    "color": colour,
                    "size": 11,
                    "symbol": symbol,
                    "line": {"width": 1, "color": text_colour(theme)},
                },
                error_x={
                    "type": "data",
                    "array": np.maximum(high - value, 0),
                    "arrayminus": np.maximum(value - low, 0),
                    "thickness": 2,
                    "color": colour,
                },
                hovertemplate="%{x:.3f} nats<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=controls.corrected.ravel(),
            y=np.broadcast_to(rows - 0.17, controls.corrected.shape).ravel(),
            mode="markers",
            name=f"first expert and domain, {len(controls.corrected)} random routers",
            marker={
                "color": text_colour(theme),
                "size": 9,
                "symbol": "x-thin",
                "line": {"width": 2, "color": text_colour(theme)},
            },
            hovertemplate="random router: %{x:.3f} nats<extra></extra>",
        )
    )
    figure.update_traces(name="null, up to its 95% point", selector={"mode": "lines"})
    figure.update_xaxes(title_text="mutual information above the null's mean (nats)", rangemode="tozero")
    figure.update_yaxes(tickvals=rows, ticktext=labels, range=[len(labels) - 0.5, -0.5], title_text="")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"})
    return finish(
        figure,
        title="Does the choice of expert depend on the domain, or on the token's class?",
        subtitle=f"n = {association.num_samples.sum()} samples of {len(association.domains)} domains; "
        "bars: 95% bootstrap interval over samples; null: whole samples permuted",
        theme=theme,
        path="moe",
        path_use=use,
        height=150 + 70 * len(labels),
    )


def preference(
    share: NDArray[np.float64],
    adjusted: NDArray[np.float64],
    names: tuple[str, ...],
    association: Association,
    use: metrics.PathUse,
    *,
    what: str,
    unit: str,
    theme: Theme,
) -> go.Figure:
    """Which expert is preferred where: share over its mean, with stars where it is significant."""
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.log2(share / share.mean(axis=1, keepdims=True))
    stars = np.where((adjusted <= LEVEL) & np.isfinite(share), "*", "")
    figure, height = heat_map_grid(
        np.clip(lift, -_LARGEST_LIFT, _LARGEST_LIFT),
        titles=block_labels(association.layers, "moe", use),
        x=[str(expert) for expert in range(share.shape[2])],
        y=list(names),
        x_title="expert",
        y_title=what,
        colour_title="log2 of<br>share over<br>mean",
        colour_range=(-_LARGEST_LIFT, _LARGEST_LIFT),
        colour_scale=DIVERGING,
        text=stars,
        hover=f"%{{y}}: expert %{{x}} has %{{customdata:.1%}} of its {unit}<br>log2 of that over the mean: %{{z:.2f}}",
        hover_values=share,
    )
    figure.update_yaxes(autorange="reversed")
    return finish(
        figure,
        title=f"Which expert prefers which {what}",
        subtitle=f"share of the {what}'s {unit}, against the mean over all; "
        f"n = {association.num_samples.sum()} samples; "
        f"* differs from the rest (Benjamini-Hochberg, {100 * LEVEL:g}%); blank: never chosen",
        theme=theme,
        path="moe",
        path_use=use,
        height=height,
    )


def ablation(causation: Causation, use: metrics.PathUse, *, theme: Theme) -> go.Figure:
    """What each expert's removal costs in each domain."""
    values = causation.increase.swapaxes(1, 2)
    largest = max(float(np.abs(values).max()), 1e-6)
    figure, height = heat_map_grid(
        values,
        titles=block_labels(causation.layers, "moe", use),
        x=[str(expert) for expert in range(values.shape[2])],
        y=list(causation.domains),
        x_title="expert removed",
        y_title="domain",
        colour_title="nats per<br>token",
        colour_range=(-largest, largest),
        colour_scale=DIVERGING,
        hover="%{y} without expert %{x}: loss rises by %{z:.4f} nats per token<br>"
        "95% interval %{customdata[0]:.4f} to %{customdata[1]:.4f}",
        hover_values=causation.interval.swapaxes(1, 2),
    )
    figure.update_yaxes(autorange="reversed")
    return finish(
        figure,
        title="What removing an expert costs",
        subtitle=f"mean loss increase over n = {causation.num_samples.sum()} samples that were not used for the "
        "preferences",
        theme=theme,
        path="moe",
        path_use=use,
        height=height,
    )


def agreement(causation: Causation, use: metrics.PathUse, *, theme: Theme) -> go.Figure:
    """Preference against cost, one mark per expert and domain."""
    figure = go.Figure()
    for y, label in enumerate(block_labels(causation.layers, "moe", use)):
        num_experts = causation.preference.shape[1]
        text = [f"expert {e}, {domain}" for e in range(num_experts) for domain in causation.domains]
        figure.add_trace(
            go.Scatter(
                x=100 * causation.preference[y].ravel(),
                y=causation.increase[y].ravel(),
                mode="markers",
                name=f"{label}: rank correlation {causation.agreement[y]:.2f}",
                text=text,
                marker={
                    "color": colours(y + 1, theme)[y],
                    "symbol": SYMBOLS[y % len(SYMBOLS)],
                    "size": 8,
                    "opacity": 0.8,
                },
                hovertemplate="%{text}: preferred by %{x:.1f} points, costs %{y:.4f} nats per token<extra></extra>",
            )
        )
    figure.update_xaxes(
        title_text="preference: share of the domain's chunks less the mean over domains (points)"
    )
    figure.update_yaxes(title_text="loss increase when removed (nats per token)")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"})
    return finish(
        figure,
        title="Are experts costliest to remove where they are preferred?",
        subtitle="one mark per expert and domain; preference and cost on different samples "
        f"(n = {causation.num_samples.sum()} for the cost)",
        theme=theme,
        path="moe",
        path_use=use,
        height=440,
    )

"""Figures of where parameters and compute sit."""

import plotly.graph_objects as go

from hydra_lab.accounting import FlopTable, ParameterTable
from hydra_lab.figures.theme import PATTERNS, Theme, colours, finish


def parameters(result: ParameterTable, *, theme: Theme = "light") -> go.Figure:
    """Parameters by component: those that exist, and those that take part in computing one token."""
    parts = result.by_component()
    return _bars(
        list(parts),
        {
            "all": [total / 1e6 for total, _ in parts.values()],
            "active per token": [active / 1e6 for _, active in parts.values()],
        },
        unit="parameters (millions)",
        hover="%{y}: %{x:.3f} M<extra></extra>",
        title="Where the parameters sit",
        subtitle=f"{result.total:,} parameters, {result.active:,} of them active for one token; counted, not sampled",
        theme=theme,
    )


def flops(result: FlopTable, *, theme: Theme = "light") -> go.Figure:
    """Floating-point operations per token by component, in one pass and in decoding."""
    parts = result.by_component()
    return _bars(
        list(parts),
        {
            "one pass over the text": [prefill / 1e6 for prefill, _ in parts.values()],
            "decoding, the last token": [decode / 1e6 for _, decode in parts.values()],
        },
        unit="FLOPs per token (millions, forward)",
        hover="%{y}: %{x:.3f} MFLOPs<extra></extra>",
        title=f"Where the compute sits, {result.context_length:,} tokens of context",
        subtitle=f"matrix products of a forward pass: {result.prefill / 1e6:,.2f} MFLOPs per token in one pass, "
        f"{result.decode / 1e6:,.2f} when decoding",
        theme=theme,
    )


def _bars(
    names: list[str],
    series: dict[str, list[float]],
    *,
    unit: str,
    hover: str,
    title: str,
    subtitle: str,
    theme: Theme,
) -> go.Figure:
    figure = go.Figure(
        [
            go.Bar(
                x=values,
                y=names,
                orientation="h",
                name=label,
                marker={"color": colour, "pattern": {"shape": pattern, "solidity": 0.25}},
                hovertemplate=label + ", " + hover,
            )
            for (label, values), colour, pattern in zip(
                series.items(), colours(len(series), theme), PATTERNS[: len(series)], strict=True
            )
        ]
    )
    figure.update_xaxes(title_text=unit, rangemode="tozero")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(
        barmode="group",
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "traceorder": "normal"},
    )
    return finish(figure, title=title, subtitle=subtitle, theme=theme, height=100 + 34 * len(names))

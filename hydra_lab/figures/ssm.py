"""Figures of the state-space path's heads: the size of their states, its growth, and how long and how far back they
remember."""

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
    index_axis,
    log_ticks,
    muted_colour,
    text_colour,
)
from hydra_lab.metrics import (
    HalfLife,
    HalfLifeByDomain,
    HalfLifeByPosition,
    MixingDistance,
    NormGrowth,
    PathUse,
    ReceptiveField,
    StateNorms,
    StateSaturation,
)
from hydra_lab.metrics.arrays import FloatArray

_MOST_CELL_LABELS = 12  # heads up to which cells carry a number


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
    figure.update_xaxes(title_text="head", **index_axis(len(result.half_life)))
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


def half_life_by_position(
    result: HalfLifeByPosition, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat map of each head's half-life as the text goes on (logarithmic colours)."""
    num_heads = result.half_life.shape[1]
    figure = go.Figure(
        _half_life_map(
            result.half_life.T,
            x=(result.edges[:-1] + result.edges[1:] - 1) / 2,
            y=[str(head) for head in range(num_heads)],
            hover="around token %{x}: head %{y}, %{customdata:,.1f} tokens",
        )
    )
    figure.update_xaxes(title_text="position (tokens)", showgrid=False)
    figure.update_yaxes(title_text="head", type="category", showgrid=False)
    return finish(
        figure,
        title=f"Half-life by position, block {result.layer}",
        subtitle=f"at the mean decay rate over tokens in bins of {np.diff(result.edges).max()} positions<br>"
        f"{counted(int(result.num_tokens.sum()), 'token')} of {counted(result.num_samples, 'sample')}"
        f"{_never(result.half_life)}",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=110 + max(160, 18 * num_heads),
    )


def half_life_by_domain(
    result: HalfLifeByDomain, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat map of each head's half-life in each domain (logarithmic colours)."""
    num_heads = result.half_life.shape[1]
    heat_map = _half_life_map(
        result.half_life,
        x=[str(head) for head in range(num_heads)],
        y=list(result.domains),
        hover="%{y}: head %{x}, %{customdata:,.1f} tokens",
    )
    if num_heads <= _MOST_CELL_LABELS:
        text = [[_tokens(value) for value in row] for row in result.half_life]
        heat_map.update(text=text, texttemplate="%{text}")
    figure = go.Figure(heat_map.update(xgap=1, ygap=1))
    figure.update_xaxes(title_text="head", type="category", showgrid=False)
    figure.update_yaxes(title_text="domain", type="category", autorange="reversed", showgrid=False)
    low, high = int(result.num_samples.min()), int(result.num_samples.max())
    samples = counted(high, "sample") if low == high else f"{low:,} to {high:,} samples"
    return finish(
        figure,
        title=f"Half-life by domain, block {result.layer}",
        subtitle=f"tokens, at the mean decay rate over the domain's tokens<br>"
        f"{counted(int(result.num_tokens.sum()), 'token')}, {samples} per domain{_never(result.half_life)}",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=110 + max(130, 26 * len(result.domains)),
    )


def _half_life_map(half_life: FloatArray, *, x: object, y: list[str], hover: str) -> go.Heatmap:
    """Heat map of log half-lives with ticks in tokens; infinite ones have the colour of the longest."""
    finite = half_life[np.isfinite(half_life)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (1.0, 10.0)
    ticks = log_ticks(low, high)
    return go.Heatmap(
        z=np.log10(np.clip(half_life, low, high)),
        x=x,
        y=y,
        zmin=np.log10(low),
        zmax=max(np.log10(high), np.log10(low) + 0.01),
        colorscale=MAGNITUDE,
        colorbar={
            "title": {"text": "half-life<br>(tokens)", "side": "top"},
            "tickvals": np.log10(ticks).tolist(),
            "ticktext": [f"{tick:,g}" for tick in ticks],
        },
        customdata=half_life,
        hovertemplate=hover + "<extra></extra>",
    )


def _tokens(value: float) -> str:
    """A number of tokens in few characters."""
    if np.isinf(value):
        return "∞"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _never(half_life: FloatArray) -> str:
    """Remark on cells whose state never decays."""
    count = int(np.isinf(half_life).sum())
    return f"; {counted(count, 'cell')} without any decay drawn as the longest" if count else ""


def norm_growth(result: NormGrowth, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """How much each head's state grows when the context doubles, above the norms themselves."""
    num_heads = len(result.slope)
    colour = colours(num_heads, theme)
    symbols = [SYMBOLS[head // 8 % len(SYMBOLS)] for head in range(num_heads)]
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.2)
    figure.add_trace(
        go.Scatter(
            x=np.arange(num_heads),
            y=result.slope,
            mode="markers",
            marker={"size": 10, "color": colour, "symbol": symbols},
            error_y={
                "type": "data",
                "array": np.nan_to_num(1.96 * result.slope_error),
                "thickness": 1.5,
                "color": text_colour(theme),
            },
            hovertemplate="head %{x}: %{y:.3f} doublings of the norm per doubling of the context<extra></extra>",
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    for head in range(num_heads):
        figure.add_trace(
            go.Scatter(
                x=result.position,
                y=result.mean[:, head],
                mode="lines+markers",
                line={"color": colour[head], "width": 1.5},
                marker={"size": 6, "symbol": symbols[head]},
                hovertemplate=f"head {head} after %{{x}} tokens: norm %{{y:.3g}}<extra></extra>",
                showlegend=False,
            ),
            row=2,
            col=1,
        )
    for value, meaning in ((0.0, "settled"), (0.5, "adds up unrelated writes"), (1.0, "adds up one write")):
        figure.add_hline(
            y=value,
            line={"color": muted_colour(theme), "dash": "dash", "width": 1},
            annotation={"text": meaning, "font": {"size": 11, "color": muted_colour(theme)}},
            annotation_position="top right",
            row=1,  # pyright: ignore[reportArgumentType]
            col=1,  # pyright: ignore[reportArgumentType]
        )
    positive = result.mean[result.mean > 0]
    norms = log_ticks(float(positive.min()), float(positive.max())) if len(positive) else []
    highest = float(np.nanmax(np.append(result.slope, 1.0)))
    lowest = float(np.nanmin(np.append(result.slope, 0.0)))
    figure.update_xaxes(title_text="head", **index_axis(num_heads), row=1, col=1)
    figure.update_yaxes(title_text="growth exponent", range=[lowest - 0.15, highest + 0.2], row=1, col=1)
    figure.update_xaxes(
        title_text="tokens read (log scale)", type="log", tickvals=result.position, row=2, col=1
    )
    figure.update_yaxes(title_text="norm (log scale)", type="log", tickvals=norms, row=2, col=1)
    return finish(
        figure,
        title=f"Growth of the state with the context, block {result.layer}",
        subtitle="above: doublings of the norm per doubling of the context, mean over samples with 95% interval<br>"
        f"below: the norms, colours as above; {counted(int(result.num_samples[0]), 'sample')} at the first point, "
        f"{result.num_samples[-1]:,} at the last",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=560,
    )


def state_saturation(
    result: StateSaturation, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Growth of each head's state over the last doubling of the context, and whether it has stopped."""
    heads = np.arange(len(result.growth))
    undecided = ~(result.saturated | result.growing)
    first, second, third = colours(3, theme)
    figure = go.Figure()
    for chosen, name, colour, symbol in (
        (result.saturated, "saturated", third, "circle"),
        (result.growing, "still growing", second, "triangle-up"),
        (undecided, "undecided", first, "square"),
    ):
        figure.add_trace(
            go.Scatter(
                x=heads[chosen],
                y=result.growth[chosen],
                mode="markers",
                name=f"{name} ({int(chosen.sum())})",
                marker={
                    "size": 11,
                    "color": colour,
                    "symbol": symbol,
                    "line": {"width": 1, "color": text_colour(theme)},
                },
                error_y={
                    "type": "data",
                    "array": np.nan_to_num(1.96 * result.error[chosen]),
                    "thickness": 1.5,
                },
                customdata=2 ** result.growth[chosen],
                hovertemplate="head %{x}: late norm %{customdata:.2f} times the middle one<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=heads,
            y=result.growth_if_random,
            mode="markers",
            name="were its writes unrelated",
            marker={"size": 11, "symbol": "line-ew-open", "color": text_colour(theme), "line": {"width": 2}},
            hovertemplate="head %{x}: unrelated writes would give %{y:.3f}<extra></extra>",
        )
    )
    figure.add_hline(y=result.tolerance, line={"color": muted_colour(theme), "dash": "dash", "width": 1})
    figure.update_xaxes(title_text="head", **index_axis(len(heads)))
    figure.update_yaxes(title_text="log2(late norm / middle norm)")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"})
    shortest, longest = result.contexts
    context = counted(longest, "token") if shortest == longest else f"{shortest:,} to {longest:,} tokens"
    return finish(
        figure,
        title=f"Has the state stopped growing? Block {result.layer}",
        subtitle=f"growth over the last doubling of contexts of {context}, mean over "
        f"{counted(result.num_samples, 'sample')} with 95% interval<br>saturated: the interval lies below "
        f"{result.tolerance:g} (dashed), growing: above it",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=400,
    )


def receptive_field(
    result: ReceptiveField, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """How many tokens back each head's decays let it see."""
    heads = np.arange(len(result.reach))
    main, second = colours(2, theme)
    low, high = result.quantiles.T
    cut = result.cut_off > 0.5
    figure = go.Figure()
    for chosen, name, symbol in (
        (~cut, "reach, median over tokens (bars 5 to 95%)", "circle"),
        (cut, "cut off by the start for most tokens", "circle-open"),
    ):
        if not chosen.any():
            continue
        figure.add_trace(
            go.Scatter(
                x=heads[chosen],
                y=result.reach[chosen],
                mode="markers",
                name=name,
                marker={"size": 12, "color": main, "symbol": symbol, "line": {"width": 2}},
                error_y={
                    "type": "data",
                    "array": (high - result.reach)[chosen],
                    "arrayminus": (result.reach - low)[chosen],
                    "thickness": 1.5,
                },
                customdata=100 * result.cut_off[chosen],
                hovertemplate="head %{x}: %{y:,.0f} tokens; cut off by the start for %{customdata:.0f}% of tokens"
                "<extra></extra>",
            )
        )
    finite = np.isfinite(result.reach_at_mean_rate)
    for x, y, name, symbol, colour in (
        (
            heads[finite],
            result.reach_at_mean_rate[finite],
            "reach at the mean decay",
            "x",
            text_colour(theme),
        ),
        (heads, result.mean_distance, "mean distance of what is seen", "square", second),
    ):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="markers",
                name=name,
                marker={"size": 8, "color": colour, "symbol": symbol},
                hovertemplate="head %{x}: %{y:,.1f} tokens<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="head", **index_axis(len(heads)))
    drawn = np.concatenate([low, high, result.mean_distance, result.reach_at_mean_rate[finite]])
    drawn = drawn[drawn > 0]
    ticks = log_ticks(float(drawn.min()), float(drawn.max()))
    figure.update_yaxes(title_text="tokens back (log scale)", type="log", tickvals=ticks)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"})
    return finish(
        figure,
        title=f"How far back each head sees, block {result.layer}",
        subtitle=f"reach: tokens whose weight has not decayed below {result.threshold:g}<br>"
        f"{counted(result.num_tokens, 'token')} in the second halves of {counted(result.num_samples, 'sample')}",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=440,
    )


def mixing_distance(
    result: MixingDistance, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat map of how far back what each head mixes in lies, by position, under what even mixing would give."""
    num_heads = result.distance.shape[1]
    rows = np.concatenate([result.distance.T, result.distance_if_even[None]])
    figure = go.Figure(
        go.Heatmap(
            z=rows,
            x=(result.edges[:-1] + result.edges[1:] - 1) / 2,
            y=[*(str(head) for head in range(num_heads)), "even"],
            zmin=0,
            zmax=float(np.nanmax(rows)),
            colorscale=MAGNITUDE,
            colorbar={"title": {"text": "tokens<br>back", "side": "top"}},
            hovertemplate="around token %{x}: head %{y} looks %{z:.1f} tokens back<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="position (tokens)", showgrid=False)
    figure.update_yaxes(title_text="head", type="category", showgrid=False)
    low, high = np.nanmin(result.last), np.nanmax(result.last)
    return finish(
        figure,
        title=f"How far back each head mixes in, block {result.layer}",
        subtitle=f"mean distance by absolute effective attention; last token {low:.1f} to {high:.1f} tokens<br>"
        f"even: all earlier tokens alike; one text (1 sample) of {counted(result.num_tokens, 'token')}",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=110 + max(160, 18 * (num_heads + 1)),
    )

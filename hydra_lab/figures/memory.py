"""Figures of the product-key memory."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hydra_lab.figures.grid import heat_map_grid
from hydra_lab.figures.theme import (
    MAGNITUDE,
    Theme,
    as_text,
    colours,
    counted,
    finish,
    known_margin,
    muted_colour,
    text_colour,
)
from hydra_lab.metrics import (
    AddressOverlap,
    BetaByDomain,
    DeadAddresses,
    MemoryMap,
    MemoryUse,
    MemoryUseByGroup,
    PathUse,
    TopTokens,
)

_RIGHT = 120
"""Pixels for a colour bar or a short legend."""


def memory_use(result: MemoryUse, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Share of the read weight, and of the reads, that the most read rows hold, against even use."""
    by_weight, by_reads = colours(2, theme)
    figure = go.Figure(
        [
            *(
                go.Scatter(
                    x=result.coverage_rows,
                    y=100 * coverage,
                    mode="lines+markers",
                    name=name,
                    line={"color": colour, "width": 2, "dash": dash},
                    marker={"size": 5, "symbol": symbol},
                    hovertemplate=f"the %{{x:,}} rows with most {name} hold %{{y:.1f}}% of it<extra></extra>",
                )
                for coverage, name, colour, dash, symbol in (
                    (result.coverage, "read weight", by_weight, "solid", "circle"),
                    (result.coverage_of_reads, "reads", by_reads, "dot", "square"),
                )
            ),
            go.Scatter(
                x=result.coverage_rows,
                y=100 * result.coverage_rows / result.num_rows,
                mode="lines",
                name="even use",
                line={"color": muted_colour(theme), "dash": "dash"},
                hoverinfo="skip",
            ),
        ]
    )
    figure.update_xaxes(title_text="rows, most read first (log scale)", type="log")
    figure.update_yaxes(title_text="share held by these rows (%)", range=[0, 103])
    figure.update_layout(margin=known_margin(_RIGHT))
    return finish(
        figure,
        title=f"Use of the memory, block {result.layer}",
        subtitle=f"{100 * result.used_share:.1f}% of {result.num_rows:,} rows read (even reads would touch "
        f"{100 * result.used_share_if_uniform:.1f}%); by weight: KL to uniform {result.kl_to_uniform:.2f} nats, "
        f"Gini {result.gini:.2f}<br>by reads: KL {result.kl_of_reads:.2f} (even at random "
        f"{result.kl_of_reads_if_uniform:.2f}), Gini {result.gini_of_reads:.2f} "
        f"({result.gini_of_reads_if_uniform:.2f}); {counted(result.num_reads, 'read')} by "
        f"{counted(result.num_tokens, 'token')} of {counted(result.num_samples, 'sample')}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=380,
    )


def memory_use_by_domain(
    result: MemoryUseByGroup, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Used share, KL to uniform and Gini of each domain's reads, beside what even reads would give."""
    names = [f"{name} (n={use.num_samples:,})" for name, use in zip(result.groups, result.use, strict=True)]
    return _by_group(result, names, "each domain's tokens", path_use, theme)


def memory_use_by_head(
    result: MemoryUseByGroup, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Used share, KL to uniform and Gini of each head's reads, beside what even reads would give."""
    return _by_group(result, [f"head {name}" for name in result.groups], "each head", path_use, theme)


def _by_group(
    result: MemoryUseByGroup, names: list[str], readers: str, path_use: PathUse | None, theme: Theme
) -> go.Figure:
    weight, reads = colours(2, theme)
    titles = ("rows read (%)", "KL to uniform (nats)", "Gini coefficient")
    figure = make_subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.04)
    used = [100 * use.used_share for use in result.use]
    touched = [100 * use.used_share_if_uniform for use in result.use]
    panels = (
        (("reads", used), ("as many reads, even at random", touched)),
        (
            ("read weight", [use.kl_to_uniform for use in result.use]),
            ("reads", [use.kl_of_reads for use in result.use]),
            ("as many reads, even at random", [use.kl_of_reads_if_uniform for use in result.use]),
        ),
        (
            ("read weight", [use.gini for use in result.use]),
            ("reads", [use.gini_of_reads for use in result.use]),
            ("as many reads, even at random", [use.gini_of_reads_if_uniform for use in result.use]),
        ),
    )
    styles = {
        "read weight": (weight, "circle"),
        "reads": (reads, "square-open"),
        "as many reads, even at random": (muted_colour(theme), "line-ns-open"),
    }
    for column, panel in enumerate(panels, start=1):
        for name, values in panel:
            colour, symbol = styles[name]
            figure.add_trace(
                go.Scatter(
                    x=values,
                    y=names,
                    mode="markers",
                    name=name,
                    legendgroup=name,
                    showlegend=column == 2,
                    marker={
                        "size": 11,
                        "symbol": symbol,
                        "color": colour,
                        "line": {"width": 2, "color": colour},
                    },
                    hovertemplate="%{y}, " + name + ": %{x:.3g}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text=titles[column - 1], rangemode="tozero", row=1, col=column)
        if column > 1:
            figure.update_yaxes(ticks="", row=1, col=column)
    figure.update_yaxes(autorange="reversed", title_text="", type="category")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.28, "yanchor": "top"})
    num_reads = sum(use.num_reads for use in result.use)
    samples = (
        sum(use.num_samples for use in result.use) if result.kind == "domain" else result.use[0].num_samples
    )
    return finish(
        figure,
        title=f"Use of the memory by {result.kind}, block {result.layer}",
        subtitle=f"reads by {readers} of {result.use[0].num_rows:,} rows; {counted(num_reads, 'read')} in "
        f"{counted(samples, 'sample')}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=150 + 34 * len(names),
    )


def beta_by_domain(
    result: BetaByDomain, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Mean memory gate of each domain with its 95% interval, over the spread of the tokens."""
    labels = [
        f"{domain} (n={count:,})" for domain, count in zip(result.domains, result.num_samples, strict=True)
    ]
    main = colours(1, theme)[0]
    figure = go.Figure()
    for (low, high), width, name in (((0, 4), 3, "5 to 95% of tokens"), ((1, 3), 9, "25 to 75% of tokens")):
        x: list[float | None] = []
        y: list[str | None] = []
        for z, label in enumerate(labels):
            x += [float(result.quantiles[z, low]), float(result.quantiles[z, high]), None]
            y += [label, label, None]
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                name=name,
                opacity=0.45,
                line={"color": main, "width": width},
                hoverinfo="skip",
            )
        )
    figure.add_trace(
        go.Scatter(
            x=result.mean,
            y=labels,
            mode="markers",
            name="mean over samples, 95% interval",
            marker={"color": text_colour(theme), "size": 10, "symbol": "diamond"},
            error_x={"type": "data", "array": np.nan_to_num(1.96 * result.error), "thickness": 2},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="gate beta (1 is open)", range=[-0.02, 1.02])
    figure.update_yaxes(autorange="reversed", title_text="")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"})
    return finish(
        figure,
        title=f"Memory gate by domain, block {result.layer}",
        subtitle=f"mean over samples of the sample's mean; {counted(int(result.num_tokens.sum()), 'token')} of "
        f"{counted(int(result.num_samples.sum()), 'sample')}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=150 + 34 * len(labels),
    )


def top_tokens(
    result: TopTokens,
    labels: Sequence[str],
    *,
    path_use: PathUse | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """The tokens that read one row of the memory most.

    Args:
        labels: the text of each of `result.tokens`.

    Raises:
        ValueError: there are not as many labels as tokens.
    """
    if len(labels) != len(result.tokens):
        raise ValueError(f"{len(labels)} labels for {len(result.tokens)} tokens")
    shown = [f"{_visible(label)} (id {token})" for label, token in zip(labels, result.tokens, strict=True)]
    figure = go.Figure(
        go.Bar(
            x=result.weight,
            y=shown,
            orientation="h",
            marker={"color": colours(1, theme)[0]},
            text=[counted(int(count), "read") for count in result.count],
            textposition="auto",
            hovertemplate="%{y}: weight %{x:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="read weight, summed", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", title_text="token")
    empty = "" if len(shown) else "; no token reads it"
    return finish(
        figure,
        title=f"Tokens that read row {result.address}, block {result.layer}",
        subtitle=f"{counted(result.num_reads, 'read')} of the row among {counted(result.num_tokens, 'token')}{empty}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=110 + 28 * max(3, len(shown)),
    )


def _visible(text: str) -> str:
    """A token's text with its white space shown, so that " a" and "a" can be told apart."""
    return as_text(text).replace(" ", "␣")


def memory_map(result: MemoryMap, *, path_use: PathUse | None = None, theme: Theme = "light") -> go.Figure:
    """Heat map of the read weight over the grid of half keys (logarithmic colours)."""
    peak = max(result.peak, 1e-9)
    top = int(np.floor(np.log10(peak)))
    ticks = np.array([0.0, *(10.0**power for power in range(min(0, top), top + 1))])
    figure = go.Figure(
        go.Heatmap(
            z=result.level,
            x0=0,
            dx=result.cell[1],
            y0=0,
            dy=result.cell[0],
            zmin=0,
            zmax=255,
            colorscale=MAGNITUDE,
            colorbar={
                "title": {"text": "read<br>weight", "side": "top"},
                "tickvals": list(255 * np.log1p(ticks) / np.log1p(peak)),
                "ticktext": [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks],
            },
            hovertemplate="first key %{y}, second key %{x}: level %{z} of 255<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="second half key (index)", showgrid=False)
    figure.update_yaxes(title_text="first half key (index)", showgrid=False, autorange="reversed")
    figure.update_layout(margin=known_margin(_RIGHT))
    pooled = "" if result.cell == (1, 1) else f"; one cell sums {result.cell[0]} x {result.cell[1]} rows"
    return finish(
        figure,
        title=f"Memory map, block {result.layer}",
        subtitle=f"sum of read weights on {result.num_keys[0]} x {result.num_keys[1]} rows over "
        f"{counted(result.num_tokens, 'token')} of {counted(result.num_samples, 'sample')}{pooled}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=520,
    )


def dead_addresses(
    result: DeadAddresses, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat map of the share of rows that were never read over the grid of half keys."""
    figure = go.Figure(
        go.Heatmap(
            z=100 * result.map,
            x0=0,
            dx=result.cell[1],
            y0=0,
            dy=result.cell[0],
            zmin=0,
            zmax=100,
            colorscale=MAGNITUDE,
            colorbar={"title": {"text": "rows<br>unread<br>(%)", "side": "top"}},
            hovertemplate="first key %{y}, second key %{x}: %{z:.0f}% of the rows unread<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="second half key (index)", showgrid=False)
    figure.update_yaxes(title_text="first half key (index)", showgrid=False, autorange="reversed")
    figure.update_layout(margin=known_margin(_RIGHT))
    pooled = "" if result.cell == (1, 1) else f"; one cell is {result.cell[0]} x {result.cell[1]} rows"
    n1, n2 = result.num_keys
    return finish(
        figure,
        title=f"Rows of the memory that are never read, block {result.layer}",
        subtitle=f"{len(result.addresses):,} of {n1 * n2:,} ({100 * result.share:.1f}%; as many even reads would leave "
        f"{100 * result.share_if_uniform:.1f}%); half keys without a read: {len(result.dead_first_keys)} of {n1} "
        f"first, {len(result.dead_second_keys)} of {n2} second<br>{counted(result.num_reads, 'read')} by "
        f"{counted(result.num_tokens, 'token')} of {counted(result.num_samples, 'sample')}{pooled}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=480,
    )


def address_overlap(
    result: AddressOverlap, *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """Heat maps of the overlap of the rows that each pair of prompts reads, prompts sorted by fact."""
    order = np.argsort(np.array(result.facts), kind="stable")
    names = [f"{result.facts[n]} #{n}" for n in order]
    values = np.stack([result.jaccard, result.weighted])[:, order][:, :, order]
    figure, height = heat_map_grid(
        values,
        titles=[
            f"{name}: same fact {same:.2f}, different {different:.2f}, p {p:.3f}"
            for name, same, different, p in zip(
                ("Jaccard", "weighted"), result.same, result.different, result.p_value, strict=True
            )
        ],
        x=names,
        y=names,
        x_title="prompt",
        y_title="prompt",
        colour_title="overlap",
        colour_range=(0, 1),
        hover="%{y} and %{x}: %{z:.2f}",
        cell_height=max(3, min(26, 360 // len(names))),
    )
    figure.update_yaxes(autorange="reversed")
    if len(names) > 24:
        figure.update_xaxes(showticklabels=False)
    return finish(
        figure,
        title=f"Rows of the memory that prompts share, block {result.layer}",
        subtitle=f"{counted(result.num_samples, 'sample')} (one prompt each), {counted(result.num_pairs[0], 'pair')} "
        f"about the same fact, {result.num_pairs[1]:,} about different ones; {counted(result.num_tokens, 'token')}, "
        f"{float(result.num_rows.mean()):.0f} rows per prompt",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=height,
    )

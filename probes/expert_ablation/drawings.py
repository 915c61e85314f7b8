"""The study's figures."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.grid import heat_map_grid
from hydra_lab.figures.theme import DIVERGING, SYMBOLS, Theme, colours, finish, muted_colour
from probes.expert_ablation.analysis import domain_means

if TYPE_CHECKING:
    from probes.expert_ablation.run import Costs, Evidence


def draw(costs: "Costs", evidence: "Evidence", *, theme: Theme = "light") -> dict[str, go.Figure]:
    """Every figure of the study by name."""
    return {
        "cost_by_domain": cost_by_domain(costs, theme=theme),
        "interaction_of_pairs": interaction_of_pairs(costs, evidence, theme=theme),
        "cost_and_load": cost_and_load(costs, theme=theme),
    }


def cost_by_domain(costs: "Costs", *, theme: Theme) -> go.Figure:
    """What each expert's removal costs in each domain."""
    values_YZE = np.swapaxes(domain_means(costs.single, costs.domain, len(costs.domains)), 1, 2)
    largest = max(float(np.abs(values_YZE).max()), 1e-6)
    figure, height = heat_map_grid(
        values_YZE,
        titles=[f"block {layer}" for layer in costs.layers],
        x=[str(expert) for expert in range(values_YZE.shape[2])],
        y=list(costs.domains),
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
        subtitle=f"mean loss increase over n = {len(costs.domain)} samples of {len(costs.domains)} domains",
        theme=theme,
        height=height,
    )


def interaction_of_pairs(costs: "Costs", evidence: "Evidence", *, theme: Theme) -> go.Figure:
    """Cost of both less the two costs of one, by pair."""
    values_YEE = np.stack([test.interaction for test in evidence.pair_tests])
    known = np.abs(values_YEE[~np.isnan(values_YEE)])
    largest = max(float(known.max()) if known.size else 0.0, 1e-6)
    experts = [str(expert) for expert in range(values_YEE.shape[1])]
    figure, height = heat_map_grid(
        values_YEE,
        titles=[f"block {layer}" for layer in costs.layers],
        x=experts,
        y=experts,
        x_title="expert",
        y_title="expert",
        colour_title="nats per<br>token",
        colour_range=(-largest, largest),
        colour_scale=DIVERGING,
        hover="experts %{x} and %{y}: both cost %{z:.4f} nats per token more than the sum of each",
    )
    figure.update_yaxes(autorange="reversed")
    return finish(
        figure,
        title="Do experts stand in for each other?",
        subtitle="cost of removing both less the two costs of one, mean over the samples that use both "
        f"(of n = {len(costs.pair_rows)}); red: each makes up for the other; blank: no sample uses both",
        theme=theme,
        height=height,
    )


def cost_and_load(costs: "Costs", *, theme: Theme) -> go.Figure:
    """Each expert's cost against its load, beside choices removed at random."""
    figure = go.Figure()
    colour = colours(len(costs.layers), theme)
    for y, layer in enumerate(costs.layers):
        figure.add_trace(
            go.Scatter(
                x=100 * costs.load[y],
                y=costs.single[y].mean(axis=-1),
                mode="markers",
                name=f"block {layer}, an expert",
                text=[f"expert {expert}" for expert in range(costs.load.shape[1])],
                marker={"color": colour[y], "symbol": SYMBOLS[y % len(SYMBOLS)], "size": 10},
                hovertemplate="%{text}: %{x:.1f}% of the choices, costs %{y:.4f} nats per token<extra></extra>",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=np.full(costs.random.shape[1], 100 / costs.load.shape[1]),
                y=costs.random[y].mean(axis=-1),
                mode="markers",
                name=f"block {layer}, as many choices at random",
                marker={
                    "color": muted_colour(theme),
                    "symbol": f"{SYMBOLS[y % len(SYMBOLS)]}-open",
                    "size": 10,
                    "line": {"width": 2, "color": colour[y]},
                },
                hovertemplate="at random: %{x:.1f}% of the choices, cost %{y:.4f} nats per token<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="load: share of the chunks' choices (%)", rangemode="tozero")
    figure.update_yaxes(title_text="loss increase (nats per token)", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"})
    return finish(
        figure,
        title="Does an expert cost more than its load?",
        subtitle=f"mean over n = {len(costs.domain)} samples; open marks: choices removed at random, as many as a "
        "mean expert has",
        theme=theme,
        height=420,
    )

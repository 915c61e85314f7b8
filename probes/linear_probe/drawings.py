"""The study's figures."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.theme import SYMBOLS, Theme, colours, finish, muted_colour
from probes.linear_probe.features import KIND_NAMES, KINDS

if TYPE_CHECKING:
    from probes.linear_probe.run import TaskEvidence


def draw(evidence: "tuple[TaskEvidence, ...]", *, theme: Theme = "light") -> dict[str, go.Figure]:
    """Every figure of the study by name."""
    return {each.task.name: by_block(each, theme=theme) for each in evidence} | {
        "removal": removal(evidence, theme=theme)
    }


def by_block(evidence: "TaskEvidence", *, theme: Theme) -> go.Figure:
    """Score of each kind of site by block, with the control label and the null."""
    figure = go.Figure()
    task = evidence.task
    for number, kind in enumerate(KINDS):
        scores = evidence.of_kind(kind)
        if not scores:
            continue
        colour = colours(number + 1, theme)[number]
        layers = np.array([score.site.layer for score in scores]) + 0.08 * (number - 1.5)
        value = np.array([score.score for score in scores])
        low, high = np.array([score.interval for score in scores]).T
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=value,
                mode="markers+lines",
                name=KIND_NAMES[kind],
                legendgroup=kind,
                marker={"color": colour, "symbol": SYMBOLS[number], "size": 10},
                line={"color": colour, "width": 1},
                error_y={
                    "type": "data",
                    "array": np.maximum(high - value, 0),
                    "arrayminus": np.maximum(value - low, 0),
                    "color": colour,
                },
                hovertemplate=f"{KIND_NAMES[kind]}: %{{y:.3f}}<extra></extra>",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=[score.control for score in scores],
                mode="markers",
                name=f"{KIND_NAMES[kind]}, control label",
                legendgroup=kind,
                marker={
                    "color": colour,
                    "symbol": f"{SYMBOLS[number]}-open",
                    "size": 9,
                    "line": {"width": 2, "color": colour},
                },
                hovertemplate=f"{KIND_NAMES[kind]}, control: %{{y:.3f}}<extra></extra>",
            )
        )
    null_95 = max(float(np.quantile(score.null, 0.95)) for score in evidence.scores)
    figure.add_hline(
        y=null_95,
        line={"color": muted_colour(theme), "dash": "dot"},
        annotation={"text": "highest 95% point of the null", "font": {"color": muted_colour(theme)}},
    )
    figure.update_xaxes(title_text="block", dtick=1)
    lowest = min(0.0, *(min(score.score, score.control) for score in evidence.scores))
    figure.update_yaxes(
        title_text="balanced accuracy" if task.kind == "class" else "R squared",
        range=[max(lowest, -0.5) - 0.05, 1.05],
    )
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"})
    return finish(
        figure,
        title=f"What can be read off: {task.asks}",
        subtitle=f"on samples that the probe was not fitted on, n = {len(np.unique(task.row))}; bars: 95% over samples;"
        f"<br>open marks: {task.control_asks}",
        theme=theme,
        height=420,
    )


def removal(evidence: "tuple[TaskEvidence, ...]", *, theme: Theme) -> go.Figure:
    """What taking the probes' directions out costs, beside those of probes fitted to permuted labels."""
    first, second = colours(2, theme)
    names = [
        f"{each.task.name}<br>{each.removal.rank} after block {each.removal.site.layer}" for each in evidence
    ]
    figure = go.Figure(
        [
            go.Bar(
                x=names,
                y=[float(each.removal.cost.mean()) for each in evidence],
                name="the probe's directions",
                marker={"color": first},
            ),
            go.Bar(
                x=names,
                y=[float(each.removal.control.mean()) for each in evidence],
                name="those of probes fitted to permuted labels",
                marker={"color": second, "pattern": {"shape": "/"}},
            ),
        ]
    )
    figure.update_yaxes(title_text="rise of the loss (nats per token)")
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"})
    return finish(
        figure,
        title="Does the model use what the probe reads?",
        subtitle="directions taken out of the residual stream for every token; mean over the half of the samples that "
        "no probe was fitted on",
        theme=theme,
        height=380,
    )

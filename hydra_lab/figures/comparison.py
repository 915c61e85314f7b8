"""Figures of two captures of the same text beside each other."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.theme import DIVERGING, Theme, colours, counted, finish

if TYPE_CHECKING:
    from hydra_lab.capture.comparison import Comparison

_MOST_CELL_LABELS = 10  # domains up to which a cell shows its number

# Decisions that a comparison measures: attribute, and what it is.
_DECISIONS = (
    ("expert_set", "chunks with other experts"),
    ("first_expert", "chunks with another best expert"),
    ("addresses", "memory addresses replaced"),
    ("selected_blocks", "attention blocks replaced"),
    ("memory_gate", "memory gate beta, change"),
    ("read_gate", "workspace read gate, change"),
    ("write_gate", "workspace write gate, change"),
    ("state_norm", "ssm state norm, log ratio"),
)


def loss_change(result: "Comparison", *, theme: Theme = "light") -> go.Figure:
    """Mean change of the loss by domain, beside what the loss was."""
    colour = colours(1, theme)[0]
    figure = go.Figure(
        go.Bar(
            x=list(result.domains),
            y=result.loss_change,
            marker={"color": colour},
            customdata=result.loss,
            hovertemplate="%{x}: %{y:+.4f} nats per token, from %{customdata:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="domain")
    figure.update_yaxes(title_text="nats per token", tickformat="+.3~g", zeroline=True)
    return finish(
        figure,
        title="Change of the loss",
        subtitle=f"second minus first, mean over {counted(int(result.num_tokens.sum()), 'token')} of "
        f"{counted(int(result.num_samples.sum()), 'sample')}",
        theme=theme,
        height=260,
    )


def decision_changes(result: "Comparison", *, theme: Theme = "light") -> go.Figure:
    """How far each kind of decision moved, by block and domain: shares of decisions that differ, and mean changes."""
    figure = go.Figure()
    changes = {said: getattr(result, name) for name, said in _DECISIONS}
    changes |= {f"{path} share of the update, change": change for path, change in result.path_share.items()}
    rows: list[str] = []
    values: list[np.ndarray] = []
    for said, change in changes.items():
        for layer, means in zip(change.layers, change.mean, strict=True) if change is not None else ():
            if not np.isnan(means).all():  # a block that lacks the path
                rows.append(f"{said}, block {layer}")
                values.append(means)
    table = np.array(values) if values else np.zeros((0, len(result.domains)))
    largest = max(float(np.nanmax(np.abs(table), initial=0.0)), 1e-6)
    figure.add_trace(
        go.Heatmap(
            z=table,
            x=list(result.domains),
            y=rows,
            zmin=-largest,
            zmax=largest,
            colorscale=DIVERGING,
            colorbar={"title": {"text": "share or<br>change", "side": "top"}},
            text=np.vectorize(lambda value: "" if np.isnan(value) else f"{value:z.3f}")(table)
            if table.size
            else None,
            texttemplate="%{text}" if len(result.domains) <= _MOST_CELL_LABELS else None,
            hovertemplate="%{y}<br>%{x}: %{z:.4f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(title_text="domain", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return finish(
        figure,
        title="Decisions that moved",
        subtitle=f"second against first, means over {counted(int(result.num_samples.sum()), 'sample')}; a share of "
        "decisions that differ, or the mean change where it says so",
        theme=theme,
        height=90 + 22 * len(rows),
    )

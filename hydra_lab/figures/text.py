"""Figures of one text, token by token."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.theme import MAGNITUDE, Theme, colours, counted, finish
from hydra_lab.metrics import PathUse
from hydra_lab.metrics.text import BetaByToken, NextTokens


def next_tokens(
    result: NextTokens, labels: Sequence[str], *, largest: float | None = None, theme: Theme = "light"
) -> go.Figure:
    """The likeliest next tokens after one position; the one that follows in the text is hatched.

    Args:
        labels: the text of each of `result.tokens`.
        largest: probability at the end of the axis, where several figures are to share it.

    Raises:
        ValueError: there are not as many labels as tokens.
    """
    if len(labels) != len(result.tokens):
        raise ValueError(f"{len(labels)} labels for {len(result.tokens)} tokens")
    main, second = colours(2, theme)
    follows = result.tokens == result.actual if result.actual is not None else np.zeros(len(labels), bool)
    shown = [
        f"{_escaped(label)} ✓" if here else _escaped(label)
        for label, here in zip(labels, follows, strict=True)
    ]
    figure = go.Figure(
        go.Bar(
            x=100 * result.probability,
            y=np.arange(len(shown)),
            orientation="h",
            marker={
                "color": [second if here else main for here in follows],
                "pattern": {"shape": ["/" if here else "" for here in follows], "solidity": 0.25},
            },
            text=[f"{100 * p:.1f}%" for p in result.probability],
            textposition="auto",
            customdata=result.tokens,
            hovertemplate="token %{customdata}: %{x:.2f}%<extra></extra>",
        )
    )
    end = 115 * (float(result.probability.max()) if largest is None else largest)
    figure.update_xaxes(title_text="probability (%)", range=[0, min(100, end)])
    figure.update_yaxes(
        autorange="reversed", tickvals=list(range(len(shown))), ticktext=shown, showgrid=False, title_text=""
    )
    follow = ""
    if result.actual is not None:
        follow = f"; the token that follows (✓) has {100 * result.actual_probability:.2g}%"
    return finish(
        figure,
        title=f"Next token after token {result.position}",
        subtitle=f"one position (n = 1); entropy {result.entropy:.2f} nats{follow}",
        theme=theme,
        height=70 + 26 * len(shown),
    )


def beta_by_token(
    result: BetaByToken,
    labels: Sequence[str],
    *,
    path_use: PathUse | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """The memory gate along one text; the colour is the weight of the row that the token reads most.

    Args:
        labels: the text of each token.

    Raises:
        ValueError: there are not as many labels as tokens.
    """
    if len(labels) != len(result.beta):
        raise ValueError(f"{len(labels)} labels for {len(result.beta)} tokens")
    custom = np.empty((len(labels), 3), dtype=object)
    custom[:, 0] = [_escaped(label) for label in labels]
    custom[:, 1] = result.address
    custom[:, 2] = result.weight
    figure = go.Figure(
        go.Bar(
            x=np.arange(len(labels)),
            y=result.beta,
            customdata=custom,
            marker={
                "color": result.weight / result.num_heads,
                "cmin": 0,
                "colorscale": MAGNITUDE,
                "line": {"width": 0},
                "colorbar": {
                    "title": {"text": "share of<br>the top row"},
                    "thickness": 14,
                    "outlinewidth": 0,
                },
            },
            hovertemplate="token %{x} %{customdata[0]}: beta %{y:.3f}<br>reads row %{customdata[1]} most, weight "
            f"%{{customdata[2]:.2f}} of {result.num_heads}<extra></extra>",
        )
    )
    figure.update_layout(bargap=0.05)
    figure.update_xaxes(title_text="token (position)", showgrid=False)
    figure.update_yaxes(title_text="memory gate beta", range=[0, 1.02])
    return finish(
        figure,
        title=f"Memory gate by token, block {result.layer}",
        subtitle=f"one text of {counted(len(labels), 'token')} (n = 1); mean beta {result.beta.mean():.3f}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=260,
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")

"""Figure of the places of the text that an expert, a memory row or a workspace slot answers to most."""

from collections.abc import Sequence

import plotly.graph_objects as go

from hydra_lab.figures.theme import Theme, as_text, colours, counted, finish
from hydra_lab.metrics import PathUse, TopContexts
from hydra_lab.metrics.contexts import SCORES

_PATHS = {"expert": "moe", "memory row": "memory", "slot read": "workspace", "slot write": "workspace"}
_TITLES = {
    "expert": "Chunks of expert",
    "memory row": "Tokens that read row",
    "slot read": "Tokens that read slot",
    "slot write": "Tokens written to slot",
}


def top_contexts(
    result: TopContexts, texts: Sequence[str], *, path_use: PathUse | None = None, theme: Theme = "light"
) -> go.Figure:
    """The strongest contexts of one expert, row or slot.

    Args:
        texts: what stands at each of the contexts.

    Raises:
        ValueError: there are not as many texts as contexts.
    """
    if len(texts) != len(result.score):
        raise ValueError(f"{len(texts)} texts for {len(result.score)} contexts")
    places = [f"sample {s}, token {p}" for s, p in zip(result.sample, result.position, strict=True)]
    figure = go.Figure(
        go.Bar(
            x=result.score,
            y=[f"{as_text(text)}<br>{place}" for text, place in zip(texts, places, strict=True)],
            orientation="h",
            marker={"color": colours(1, theme)[0]},
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=SCORES[result.kind], range=[0, 1.02])
    figure.update_yaxes(autorange="reversed", title_text="", type="category")
    empty = "" if len(places) else "; none found"
    return finish(
        figure,
        title=f"{_TITLES[result.kind]} {result.item}, block {result.layer}",
        subtitle=f"the strongest of each sample, among {counted(result.num_tokens, 'token')} of "
        f"{counted(result.num_samples, 'sample')}{empty}",
        theme=theme,
        path=_PATHS[result.kind],
        layer=result.layer,
        path_use=path_use,
        height=110 + 42 * max(3, len(places)),
    )

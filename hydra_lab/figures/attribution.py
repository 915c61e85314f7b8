"""Figures of `hydra_lab.attribution`: what each part of the model does to its output."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from hydra_lab.figures.grid import heat_map_grid
from hydra_lab.figures.theme import (
    DIVERGING,
    MAGNITUDE,
    Theme,
    colours,
    counted,
    finish,
    hatching,
    muted_colour,
)
from hydra_lab.path_use import PathUse
from hydra_lab.taps import PATHS

if TYPE_CHECKING:  # figures import no torch
    from hydra_lab.attribution import (
        ActivationPatching,
        DecisionGradients,
        DirectLogitAttribution,
        FactEdit,
        FactSpecificity,
        LogitLens,
        PathPatching,
        SSMAttention,
    )

MOST_TOKENS = 512
"""Positions that a heat map of pairs shows at most: more are no use on a screen."""

_MOST_CELL_LABELS = 24  # columns up to which cells carry a number
_MOST_WORDS = 12  # columns up to which cells carry a token's text
_FIELD_AXES = {
    "moe.routing.logits": "expert",
    "moe.routing.weights": "rank",
    "memory.lookup.weights": "head . rank",
    "memory.lookup.gate": "gate",
    "workspace.read.address": "slot",
    "workspace.read.gate": "gate",
    "workspace.write.address": "slot . token of the chunk",
    "workspace.write.gate": "slot",
}
"""What the axes of a field after the first two count."""


def logit_lens(
    result: "LogitLens",
    label: Callable[[int], str],
    *,
    sample: int = 0,
    positions: range | None = None,
    colour: Literal["kl", "probability"] = "kl",
    theme: Theme = "light",
) -> go.Figure:
    """The likeliest next token at every depth and position.

    Args:
        label: the text of a token id.
        positions: tokens to show; None for the first 12.
        colour: "kl": how far the depth's distribution is from the final one; "probability": of its likeliest token.
    """
    length = _length(result.length, sample)
    shown = range(min(length, _MOST_WORDS)) if positions is None else positions
    columns = list(shown)
    if not columns or columns[0] < 0 or columns[-1] >= length:
        raise ValueError(f"positions {shown} are not among the {length} tokens of sample {sample}")
    guess = result.tokens[:, sample][:, columns, 0]
    probability = result.probability[:, sample][:, columns, 0]
    kl = result.kl[:, sample][:, columns]
    rank = result.actual_rank[:, sample][:, columns]
    texts = np.array([[_visible(label(int(token)))[:10] for token in row] for row in guess])
    right = rank == 1
    custom = np.empty((*guess.shape, 5), dtype=object)
    custom[..., 0], custom[..., 1], custom[..., 2] = texts, 100 * probability, kl
    custom[..., 3] = np.where(rank > 0, rank.astype(str), "not known")
    custom[..., 4] = np.array([_visible(label(int(token))) for token in result.ids[sample, columns]])
    by_kl = colour == "kl"
    figure = go.Figure(
        go.Heatmap(
            z=kl if by_kl else 100 * probability,
            x=list(range(len(columns))),
            y=list(result.depths),
            text=np.where(right, np.char.add("✓ ", texts), texts),
            texttemplate="%{text}" if len(columns) <= _MOST_WORDS else None,
            textfont={"size": 11},
            customdata=custom,
            colorscale=f"{MAGNITUDE}_r" if by_kl else MAGNITUDE,
            zmin=0,
            zmax=max(float(np.nanmax(kl[1:])), 1e-6)
            if by_kl
            else 100,  # the embedding alone is far from all others
            colorbar={
                "title": {"text": "KL to the<br>end (nats)" if by_kl else "probability<br>(%)", "side": "top"}
            },
            hovertemplate="%{y}, after %{customdata[4]}: %{customdata[0]} at %{customdata[1]:.1f}%<br>"
            "KL %{customdata[2]:.2f} nats; the token that follows has rank %{customdata[3]}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(
        title_text="token that was read",
        tickvals=list(range(len(columns))),
        ticktext=[f"{_visible(label(int(token)))}" for token in result.ids[sample, columns]],
        tickangle=-60 if len(columns) > _MOST_WORDS else 0,
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(title_text="", showgrid=False)
    known = result.actual_rank[:, sample, :length]
    counted_known = known[-1] > 0
    hits = (
        " → ".join(f"{100 * (row[counted_known] == 1).mean():.0f}%" for row in known)
        if counted_known.any()
        else ""
    )
    return finish(
        figure,
        title="Logit lens: the next token, guessed after every block",
        subtitle=f"✓: the token that follows; right by depth: {hits}<br>one text, {counted(len(columns), 'token')} "
        f"of {length} shown",
        theme=theme,
        height=110 + 34 * len(result.depths),
    )


def direct_logit_attribution(
    result: "DirectLogitAttribution",
    label: Callable[[int], str],
    *,
    sample: int = 0,
    position: int | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """What the embedding and each path add to a logit at one position.

    Args:
        label: the text of a token id.
        position: index in the row; None for the last one that is explained.
    """
    length = _length(result.length, sample)
    known = np.flatnonzero(result.tokens[sample, :length] >= 0)
    if not len(known):
        raise ValueError(f"no position of sample {sample} is explained")
    at = int(known[-1]) if position is None else position
    if at not in known:
        raise ValueError(f"position {at} of sample {sample} is not explained")
    effect = result.effect[:, sample, at]
    paths = [part.rsplit(".", 1)[-1] for part in result.parts]
    names = [_part_label(part) for part in result.parts]
    figure = go.Figure()
    categories = ("embedding", *PATHS)
    palette = [muted_colour(theme), *colours(len(PATHS), theme)]
    for index, category in enumerate(categories):
        rows = [row for row, path in enumerate(paths) if path == category]
        if not rows:
            continue
        figure.add_trace(
            go.Bar(
                x=effect[rows],
                y=[names[row] for row in rows],
                name=category,
                orientation="h",
                marker={"color": palette[index], "pattern": hatching(index, theme)},
                text=[f"{effect[row]:+.2f}" for row in rows],
                textposition="outside",
                cliponaxis=False,
                hovertemplate="%{y}: %{x:+.3f}<extra></extra>",
            )
        )
    reach = 1.25 * max(float(np.abs(effect).max()), 1e-6)
    figure.update_layout(barmode="overlay", bargap=0.25)
    figure.update_xaxes(title_text="added to the logit", range=[min(0.0, effect.min() * 1.25) - 0.08 * reach, reach]
                        if effect.max() > 0 else [-reach, 0.08 * reach], zeroline=True)  # fmt: skip
    figure.update_yaxes(title_text="", categoryorder="array", categoryarray=names[::-1], showgrid=False)
    token = _visible(label(int(result.tokens[sample, at])))
    what = f"the logit of {token}"
    if result.contrast is not None:
        what += f" minus that of {_visible(label(int(result.contrast[sample, at])))}"
    return finish(
        figure,
        title="Direct logit attribution",
        subtitle=f"{what} after token {at} ({_visible(label(int(result.ids[sample, at])))}): "
        f"{result.logit[sample, at]:+.2f}, the sum of the bars<br>one position (n = 1 token); the final norm's scale "
        "is held",
        theme=theme,
        height=90 + 24 * len(names),
    )


def ssm_attention(
    result: "SSMAttention",
    labels: Sequence[str] | None = None,
    *,
    sample: int = 0,
    view: Literal["normalised", "contribution", "matrix"] = "normalised",
    path_use: PathUse | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """How much each earlier token weighs in a head's output, one heat map per head.

    Args:
        labels: the text of each token; None for positions.
        view: "normalised": |M_ts| as a share of its row; "contribution": |M_ts x_s|; "matrix": M_ts itself.

    Raises:
        ValueError: the text is longer than `MOST_TOKENS`, or there are not as many labels as tokens.
    """
    length = _length(result.length, sample)
    if length > MOST_TOKENS:
        raise ValueError(
            f"{length} tokens do not fit a heat map of pairs (at most {MOST_TOKENS}): take a shorter text"
        )
    if labels is not None and len(labels) != length:
        raise ValueError(f"{len(labels)} labels for {length} tokens")
    values = {
        "normalised": result.normalised,
        "contribution": result.contribution,
        "matrix": lambda: result.matrix,
    }
    if view not in values:
        raise ValueError(f"view {view!r} is not one of {', '.join(values)}")
    pairs = values[view]()[sample, :, :length, :length].astype(np.float64)
    past = np.tril(np.ones((length, length), dtype=bool))
    seen = np.abs(pairs[:, past])
    # One heavy pair would darken all others: the scale ends where 1% of the pairs lie beyond.
    top = max(float(np.quantile(seen, 0.99)), 1e-9)
    pairs[:, ~past] = np.nan
    signed = view == "matrix"
    unit = {"normalised": "share of<br>the row", "contribution": "|M x|", "matrix": "M"}[view]
    figure, height = heat_map_grid(
        pairs,
        titles=[f"head {head}" for head in result.heads],
        x=list(range(length)),
        y=list(range(length)),
        x_title="token that was written",
        y_title="token that reads",
        colour_title=unit,
        colour_range=(-top, top) if signed else (0.0, top),
        colour_scale=DIVERGING if signed else MAGNITUDE,
        hover="token %{y} reads token %{x}: %{z:.3g}",
        cell_height=min(26, max(1, 300 // length)),
    )
    ticks = _ticks(length)
    text = [str(t) if labels is None else f"{_visible(labels[t])} {t}" for t in ticks]
    figure.update_xaxes(tickvals=ticks, tickangle=0, zeroline=False)
    figure.update_yaxes(type="linear", autorange="reversed", tickvals=ticks, ticktext=text, zeroline=False)
    return finish(
        figure,
        title=f"Effective attention of the ssm path, block {result.layer}",
        subtitle=f"the scan's output at a row is the sum of M x over its columns (and D x); colours end at the 99th "
        f"percentile<br>one text of {counted(length, 'token')}, after the convolution and before the gate",
        theme=theme,
        path="ssm",
        layer=result.layer,
        path_use=path_use,
        height=height,
    )


def activation_patching(
    result: "ActivationPatching", labels: Sequence[str] | None = None, *, theme: Theme = "light"
) -> go.Figure:
    """How far patching each site (and position) brings the metric from the corrupted run to the clean one.

    Args:
        labels: the text of each patched token; None for positions.

    Raises:
        ValueError: there are not as many labels as positions.
    """
    recovery = 100 * result.recovery()
    direction = "clean values into the corrupted run" if result.direction == "denoising" else (
        "corrupted values into the clean run"
    )  # fmt: skip
    names = [_part_label(site) for site in result.sites]
    figure = go.Figure()
    if result.positions is None:
        _add_recovery_bars(figure, recovery[:, 0], names, theme)
        height = 80 + 28 * len(names)
    else:
        ticks = [str(position) for position in result.positions]
        if labels is not None:
            if len(labels) != len(ticks):
                raise ValueError(f"{len(labels)} labels for {len(ticks)} positions")
            ticks = [_visible(text) for text in labels]
        _add_recovery_map(figure, recovery, names, ticks, "%{y}, token %{x}")
        figure.update_xaxes(title_text="patched token (position)" if labels is None else "patched token")
        figure.update_yaxes(autorange=True)
        height = 130 + 30 * len(names)
    return finish(
        figure,
        title="Activation patching",
        subtitle=f"{direction}; 0%: the corrupted run ({result.corrupted.mean():+.2f}), 100%: the clean one "
        f"({result.clean.mean():+.2f})<br>mean of the metric over {counted(len(result.clean), 'sample')} (pairs of "
        "texts)",
        theme=theme,
        height=height,
    )


def path_patching(result: "PathPatching", *, theme: Theme = "light") -> go.Figure:
    """How far each direct edge alone brings the metric from the corrupted run to the clean one."""
    figure = go.Figure()
    _add_recovery_map(
        figure,
        100 * result.recovery(),
        [_part_label(name) for name in result.senders],
        [_part_label(name) for name in result.receivers],
        "from %{y} to %{x}",
    )
    figure.update_xaxes(title_text="receiver")
    figure.update_yaxes(title_text="sender", autorange="reversed")
    return finish(
        figure,
        title="Path patching: direct edges",
        subtitle=f"the receiver hears the sender of the clean run; 0%: the corrupted run "
        f"({result.corrupted.mean():+.2f}), 100%: the clean one ({result.clean.mean():+.2f}); blank: no edge<br>"
        f"mean of the metric over {counted(len(result.clean), 'sample')} (pairs of texts)",
        theme=theme,
        height=140 + 30 * len(result.senders),
    )


def decision_gradients(
    result: "DecisionGradients",
    name: str,
    labels: Sequence[str] | None = None,
    *,
    sample: int = 0,
    path_use: PathUse | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """What each entry of one field of a decision does to the metric, to first order (gradient times value).

    Args:
        name: a field such as "layers.2.moe.routing.weights".
        labels: the text of each token, for a field with a row per token; None for indices.

    Raises:
        ValueError: there is no gradient of that name, or there are not as many labels as rows.
    """
    if name not in result.gradients:
        raise ValueError(f"no gradient {name!r}; there are {', '.join(result.gradients)}")
    effect = result.effect(name)
    size = effect.shape[1]
    per_token = size >= int(result.length.max())
    rows = _length(result.length, sample) if per_token else size
    values = effect[sample, :rows].reshape(rows, -1).astype(np.float64)
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{len(labels)} labels for {rows} rows")
    top = max(float(np.abs(values).max()), 1e-12)
    figure = go.Figure(
        go.Heatmap(
            z=values.T,
            x=list(range(rows)),
            y=[".".join(map(str, entry)) for entry in np.ndindex(*effect.shape[2:])],
            zmin=-top,
            zmax=top,
            colorscale=DIVERGING,
            colorbar={"title": {"text": "gradient<br>× value", "side": "top"}},
            hovertemplate="%{x}, entry %{y}: %{z:+.3g}<extra></extra>",
        )
    )
    ticks = _ticks(rows)
    text = [str(t) for t in ticks] if labels is None else [_visible(labels[t]) for t in ticks]
    figure.update_xaxes(
        title_text="token (position)" if per_token else "chunk", tickvals=ticks, ticktext=text, showgrid=False
    )
    _, layer, path, *_ = name.split(".")
    entry = _FIELD_AXES[name.split(".", 2)[2]]
    figure.update_yaxes(title_text=entry, type="category", autorange="reversed", showgrid=False)
    unit = "token" if per_token else "chunk"
    return finish(
        figure,
        title=f"What {name} does to the metric",
        subtitle=f"metric {result.metric:+.3f}; sum of all entries {values.sum():+.3f}<br>one text of "
        f"{counted(rows, unit)}; red raises the metric",
        theme=theme,
        path=path,
        layer=int(layer),
        path_use=path_use,
        height=max(220, min(520, 130 + 14 * values.shape[1])),
    )


def edit_fact(
    result: "FactEdit",
    label: Callable[[int], str],
    *,
    path_use: PathUse | None = None,
    theme: Theme = "light",
) -> go.Figure:
    """Which tokens of the prompt read which of the edited rows, and how far each row moved.

    Args:
        label: the text of a token id.
    """
    before = np.linalg.norm(result.previous_values, axis=1)
    moved = np.linalg.norm(result.values - result.previous_values, axis=1) / before
    tokens = [_visible(label(int(token))) for token in result.tokens]
    figure = go.Figure(
        go.Heatmap(
            z=result.reads.T,
            x=list(range(len(tokens))),
            y=[f"row {row}, moved {by:.1f}×" for row, by in zip(result.addresses, moved, strict=True)],
            zmin=0,
            colorscale=MAGNITUDE,
            colorbar={"title": {"text": "weight<br>× beta", "side": "top"}},
            hovertemplate="token %{x} reads %{y}: %{z:.3f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    ticks = [f"{token}<br>β {beta:.2f}" for token, beta in zip(tokens, result.beta, strict=True)]
    figure.update_xaxes(
        title_text="token of the prompt, and its memory gate", tickvals=list(range(len(tokens))), ticktext=ticks,
        tickangle=0, showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(title_text="", type="category", autorange="reversed", showgrid=False)
    state = "" if result.achieved else "NOT ACHIEVED. "
    chance = f"{100 * result.previous_probability:.2g}% → {100 * result.probability:.2g}%"
    return finish(
        figure,
        title=f"A fact edited in the memory of block {result.layer}",
        subtitle=f"{state}{_visible(result.prompt)} → {_visible(result.answer)}, with probability {chance} (was "
        f"{_visible(result.previous_answer)})<br>{counted(len(result.addresses), 'row')} edited in "
        f"{counted(result.num_steps, 'step')}, moved in lengths of the old row; one prompt of "
        f"{counted(len(tokens), 'token')}",
        theme=theme,
        path="memory",
        layer=result.layer,
        path_use=path_use,
        height=150 + 22 * len(result.addresses),
    )


def specificity(result: "FactSpecificity", *, theme: Theme = "light") -> go.Figure:
    """What an edit changes besides its own prompt: shares of what was asked and read."""
    phrasings, right = result.num_phrasings, result.others_right
    kept, changed = _share(result.others_kept, right), _share(result.others_changed, result.num_others)
    readers = _share(result.num_readers, result.num_tokens)
    shares = [
        ("other phrasings answered as edited", result.generality, f"of {phrasings}"),
        ("other facts still right", kept, f"of {right} right before"),
        ("other facts with another first token", changed, f"of {result.num_others}"),
        ("tokens that read an edited row", readers, f"of {result.num_tokens:,}"),
        ("read weight on edited rows", result.read_share, f"over {counted(result.num_tokens, 'token')}"),
    ]
    known = [(name, 100 * share, detail) for name, share, detail in shares if not np.isnan(share)]
    figure = go.Figure(
        go.Bar(
            x=[share for _, share, _ in known],
            y=[name for name, _, _ in known],
            orientation="h",
            marker={"color": colours(1, theme)[0]},
            text=[f"{share:.3g}% ({detail})" for _, share, detail in known],
            textposition="outside",
            hovertemplate="%{y}: %{x:.2f}%<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="share (%)", range=[0, 140], tickvals=list(range(0, 101, 20)))
    figure.update_yaxes(title_text="", autorange="reversed", showgrid=False)
    kl = (
        ""
        if np.isnan(result.kl)
        else f"next-token distributions of texts move by {result.kl:.2g} nats (mean KL)"
    )
    return finish(
        figure,
        title="What the edit changes elsewhere",
        subtitle=f"{kl}<br>{counted(result.num_others, 'other fact')}, {counted(result.num_tokens, 'token')} of text",
        theme=theme,
        height=90 + 34 * len(known),
    )


def _add_recovery_bars(
    figure: go.Figure, recovery: NDArray[np.float64], names: Sequence[str], theme: Theme
) -> None:
    figure.add_trace(
        go.Bar(
            x=recovery,
            y=list(names),
            orientation="h",
            marker={"color": colours(1, theme)[0]},
            text=[f"{value:.0f}%" for value in recovery],
            textposition="auto",
            hovertemplate="%{y}: %{x:.1f}%<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="recovered (% of the way from corrupted to clean)")
    figure.update_yaxes(title_text="", type="category", autorange="reversed", showgrid=False)


def _add_recovery_map(
    figure: go.Figure, recovery: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], where: str
) -> None:
    """Blue below the corrupted run (a true zero), red above it."""
    top = max(100.0, float(np.nanmax(np.abs(recovery), initial=0.0)))
    figure.add_trace(
        go.Heatmap(
            z=recovery,
            x=list(range(len(columns))),
            y=list(rows),
            zmin=-top,
            zmax=top,
            colorscale=DIVERGING,
            colorbar={"title": {"text": "recovered<br>(%)", "side": "top"}},
            text=np.where(np.isnan(recovery), "", np.char.mod("%.0f", np.nan_to_num(recovery).round() + 0.0)),
            texttemplate="%{text}" if len(columns) <= _MOST_CELL_LABELS else None,
            customdata=np.tile(np.array(columns, dtype=object), (len(rows), 1)),
            hovertemplate=where.replace("%{x}", "%{customdata}") + ": %{z:.1f}%<extra></extra>",
            hoverongaps=False,
            xgap=1,
            ygap=1,
        )
    )
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=list(columns), showgrid=False, zeroline=False
    )
    figure.update_yaxes(type="category", showgrid=False)


def _part_label(name: str) -> str:
    """ "layers.2.moe + logits" as "2 moe + logits"."""
    parts = [part.removeprefix("layers.").replace(".", " ", 1) for part in name.split(" + ")]
    return " + ".join(f"block {part}" if part[0].isdigit() else part for part in parts)


def _share(count: int, of: int) -> float:
    return count / of if of else float("nan")


def _length(length: NDArray[np.int64], sample: int) -> int:
    if not 0 <= sample < len(length):
        raise ValueError(f"sample {sample} is not among the {len(length)} of the result")
    return int(length[sample])


def _ticks(length: int) -> list[int]:
    """At most 24 positions, evenly spread."""
    step = max(1, -(-length // _MOST_CELL_LABELS))
    return list(range(0, length, step))


def _visible(text: str) -> str:
    """A token's text with its white space shown and no markup."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return shown.replace("&", "&amp;").replace("<", "&lt;")

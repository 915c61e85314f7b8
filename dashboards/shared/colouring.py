"""The tokens of a prompt, coloured by what the model decided at each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from dashboards.shared.charts import theme
from dashboards.shared.components import token_strip
from dashboards.shared.prompt import Trace
from dashboards.shared.selection import linked, pick
from hydra_lab import metrics
from hydra_lab.widgets import token_strip_payload

Signal = tuple[str, int]
"""Kind of a signal, and the block it is of."""


def signals_of(config: Any, *, changed: bool) -> dict[str, Signal]:
    """The signals that tokens can be coloured by, by what a visitor sees.

    Args:
        changed: whether there is a run with interventions, whose difference can be shown.
    """
    found: dict[str, Signal] = {
        f"experts, block {layer}": ("experts", layer) for layer in config.layers_with("moe")
    }
    found |= {f"memory gate, block {layer}": ("beta", layer) for layer in config.layers_with("memory")}
    found |= {
        f"workspace read gate, block {layer}": ("read", layer) for layer in config.layers_with("workspace")
    }
    found |= {"loss of the token": ("loss", 0), "entropy of the next token": ("entropy", 0)}
    if changed:
        found |= {"shift of the prediction": ("shift", 0), "change of the loss": ("loss change", 0)}
    return found


def choose_signal(config: Any, *, changed: bool, first: str | None = None) -> tuple[str, Signal]:
    """A choice among the signals; its name and what it is.

    Args:
        first: the one that is chosen at first.
    """
    signals = signals_of(config, changed=changed)
    name = st.selectbox("Colour the tokens by", list(signals), key=linked("colour", list(signals), first))
    return name, signals[name]


def choose_token(num_tokens: int) -> int:
    """The token that is looked at, the same on all pages; the last one at first."""
    return int(
        st.number_input(
            f"Look at token (0 to {num_tokens - 1}, outlined)", 0, num_tokens - 1, step=1,
            key=linked("token", range(num_tokens), num_tokens - 1),
        )
    )  # fmt: skip


def draw_tokens(
    runs: Sequence[Trace], index: int, texts: list[str], signal: tuple[str, Signal], position: int, key: str
) -> None:
    """Draw the tokens of `runs[index]`, with colours that mean the same in all runs; a click picks a token.

    Args:
        runs: the untouched one, from which differences are taken, and perhaps one with interventions.
        signal: name and what it is, of `choose_signal`.
        position: token to outline.
        key: of the element, unique on the page.
    """
    name, (kind, layer) = signal
    run = runs[index]
    options: dict[str, Any] = {"selected": position, "theme": theme(), "details": _details(run)}
    if kind == "experts":
        routed = metrics.routing_map(metrics.routing_record(run.capture))
        block = routed.layers.index(layer)
        used = [
            [int(expert) for expert, weight in zip(chosen, weights, strict=True) if weight > 0]
            for chosen, weights in zip(routed.experts[block], routed.weights[block], strict=True)
        ]
        first = np.array([each[0] if each else -1 for each in used])
        payload = token_strip_payload(
            texts,
            first[np.arange(len(texts)) // routed.chunk_size],
            label=f"first-choice expert, block {layer}",
            categories=[str(expert) for expert in range(routed.num_experts)],
            chunk_size=routed.chunk_size,
            chunk_labels=["+".join(map(str, dict.fromkeys(each))) or "none" for each in used],
            **options,
        )
    else:
        values, limits, diverging = _values(runs, index, kind, layer)
        payload = token_strip_payload(
            texts, values, label=name, limits=limits, diverging=diverging, **options
        )
    token_strip(payload, key, on_select=lambda token: pick(token=token))


def _values(
    runs: Sequence[Trace], index: int, kind: str, layer: int
) -> tuple[NDArray[Any], tuple[float, float], bool]:
    """Values of a signal [L], the ends of its colours, and whether it has a zero in the middle."""
    run = runs[index]
    if kind == "loss change":
        reach = max(0.5, float(np.nanmax(np.abs(runs[-1].loss - runs[0].loss), initial=0.0)))
        return run.loss - runs[0].loss, (-reach, reach), True
    if kind == "beta":
        return metrics.lookup_record(run.capture, layer).gate[0], (0.0, 1.0), False
    if kind == "read":
        return metrics.workspace_record(run.capture, layer).read_gate[0], (0.0, 1.0), False
    name = {"loss": "loss", "entropy": "entropy", "shift": "divergence"}[kind]
    smallest = 0.1 if kind == "shift" else 1.0
    largest = max(smallest, *(float(np.nanmax(getattr(each, name), initial=0.0)) for each in runs))
    return getattr(run, name), (0.0, largest), False


def _details(run: Trace) -> list[list[tuple[str, str]]]:
    """What hovering over a token shows besides its signal."""
    return [
        [
            ("loss", "none" if np.isnan(loss) else f"{loss:.3f} nats"),
            ("next token's entropy", f"{entropy:.3f} nats"),
        ]
        for loss, entropy in zip(run.loss, run.entropy, strict=True)
    ]

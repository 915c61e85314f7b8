"""The tokens of a prompt, coloured by what the model decided at each."""

from typing import Any

import numpy as np
import streamlit as st

from dashboards.shared import tokens
from dashboards.shared.charts import theme
from dashboards.shared.prompt import Trace
from dashboards.shared.selection import linked
from hydra_lab import metrics

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


def coloured(
    untouched: Trace, run: Trace, texts: list[str], signal: tuple[str, Signal], position: int
) -> str:
    """HTML of the tokens of `run` and of the key to their colours.

    Args:
        untouched: the run without interventions, from which differences are taken.
        signal: name and what it is, of `choose_signal`.
        position: token to outline.
    """
    what, (kind, layer) = signal
    if kind == "experts":
        routed = metrics.routing_map(metrics.routing_record(run.capture))
        block = routed.layers.index(layer)
        experts = [
            [int(expert) for expert, weight in zip(chosen, weights, strict=True) if weight > 0]
            for chosen, weights in zip(routed.experts[block], routed.weights[block], strict=True)
        ]
        legend = tokens.expert_legend(routed.num_experts, theme())
        spans = tokens.expert_spans(texts, experts, routed.num_experts, routed.chunk_size, theme(), position)
        return legend + spans
    limits, diverging = (0.0, 1.0), False
    if kind == "loss change":
        values = run.loss - untouched.loss
        reach = max(0.5, float(np.nanmax(np.abs(values), initial=0.0)))
        limits, diverging = (-reach, reach), True
    elif kind == "beta":
        values = metrics.lookup_record(run.capture, layer).gate[0]
    elif kind == "read":
        values = metrics.workspace_record(run.capture, layer).read_gate[0]
    else:
        values = {"loss": run.loss, "entropy": run.entropy, "shift": run.divergence}[kind]
        smallest = 0.1 if kind == "shift" else 1.0
        limits = (0.0, max(smallest, float(np.nanmax(values, initial=0.0))))
    values = values.astype(np.float64)
    legend = tokens.magnitude_legend(limits, what, diverging=diverging)
    return legend + tokens.magnitude_spans(texts, values, limits, what, diverging=diverging, chosen=position)

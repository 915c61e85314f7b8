"""Attribution of the shipped model on short texts, for the figures' tests and for looking at the figures.

python -m tests.figures.attribution_samples OUT      writes every figure as PNG, light and dark
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

import hydra_lab
from hydra_lab import attribution, figures
from tests.figures.samples import path_use

PROMPT = "Q: country of Osaka? A:"
OTHER = "Q: country of Cologne? A:"


def makers() -> dict[str, Callable[..., go.Figure]]:
    """Every figure by name; each takes `theme`, and those of one path's decisions take `path_use`."""
    model, tokenizer = hydra_lab.load("demo")

    def label(token: int) -> str:
        return str(tokenizer.decode([token]))

    def encode(text: str) -> torch.Tensor:
        return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])

    clean, corrupted = encode(PROMPT), encode(OTHER)
    japan, germany = (int(encode(name)[0, 0]) for name in (" Japan", " Germany"))
    metric = attribution.logit_difference(japan, germany)
    whole = encode(PROMPT + " Japan\nQ: country of Cairo? A: Egypt\n")
    labels = [label(int(token)) for token in whole[0]]
    paths = attribution.block_paths(model)

    def patched(**options: Any) -> Any:
        return attribution.activation_patching(model, clean, corrupted, metric, progress=False, **options)

    edges = attribution.path_patching(
        model, clean, corrupted, metric, ["embedding", *paths[:-2]], [*paths[2:], "logits"], progress=False
    )
    gradients = attribution.decision_gradients(model, clean, lambda logits: metric(logits).sum())
    edit = attribution.edit_fact(model, tokenizer, PROMPT, " Kenya")
    found = attribution.specificity(
        model,
        tokenizer,
        edit,
        phrasings=["country of Osaka:"],
        others=[(OTHER, " Germany"), ("Q: country of Cairo? A:", " Egypt")],
        texts=["def add(first, second):\n    return first + second\n" * 9],
    )
    attended = attribution.ssm_attention(model, whole, 0)
    return {
        "logit_lens": partial(figures.logit_lens, attribution.logit_lens(model, whole), label),
        "direct_logit_attribution": partial(
            figures.direct_logit_attribution,
            attribution.direct_logit_attribution(model, clean, japan, contrast=germany),
            label,
        ),
        "ssm_attention": partial(figures.ssm_attention, attended, labels),
        "ssm_attention_matrix": partial(figures.ssm_attention, attended, view="matrix"),
        "activation_patching": partial(
            figures.activation_patching,
            patched(positions=range(clean.shape[1]), sites=["embedding", *(f"layers.{i}" for i in range(6))]),
            [label(int(token)) for token in clean[0]],
        ),
        "activation_patching_whole": partial(figures.activation_patching, patched(sites=paths)),
        "path_patching": partial(figures.path_patching, edges),
        "decision_gradients": partial(
            figures.decision_gradients,
            gradients,
            "layers.3.memory.lookup.weights",
            [label(int(t)) for t in clean[0]],
        ),
        "decision_gradients_chunks": partial(
            figures.decision_gradients, gradients, "layers.2.moe.routing.logits"
        ),
        "edit_fact": partial(figures.edit_fact, edit, label),
        "specificity": partial(figures.specificity, found),
    }


OF_ONE_PATH = ("ssm_attention", "decision_gradients", "edit_fact")
"""Beginnings of the names of figures that speak of one path and take `path_use`."""


if __name__ == "__main__":
    out = Path(sys.argv[1])
    made = makers()
    for theme in ("light", "dark"):
        drawn = {
            f"{name}_{theme}": make(
                theme=theme, **({"path_use": path_use()} if name.startswith(OF_ONE_PATH) else {})
            )
            for name, make in made.items()
        }
        figures.write_png(drawn, out, width=900, scale=1.0)
        print(*sorted(drawn), sep="\n")

"""The texts that an expert, a memory row or a slot answers to most."""

from typing import Any

import streamlit as st

from dashboards.shared.charts import chart, theme
from dashboards.shared.sources import tokenizer_of
from dashboards.shared.view import OpenCapture, current_view
from hydra_lab import metrics
from hydra_lab.figures.contexts import top_contexts
from hydra_lab.metrics import ContextKind, TopContexts
from hydra_lab.widgets.text import token_texts

TOKENS_BEFORE = 8
"""Tokens shown before the one that is meant."""


def draw_contexts(opened: OpenCapture, kind: ContextKind, layer: int, item: int, *, after: int = 0) -> None:
    """Draw the strongest contexts of an expert, row or slot as text, with what is meant in brackets.

    Args:
        after: tokens that belong to it beside the one at its position: the rest of an expert's chunk.
    """
    if opened.whole is None:
        st.info(
            "The strongest contexts come from the running summary, which this capture was made without: "
            "capture again with "
            "`--signals summary` added."
        )
        return
    config = opened.capture.attributes["config"]
    top = metrics.top_contexts(opened.whole.summary, kind, layer, item, config=config)
    tokenizer = known_tokenizer(opened)
    texts = context_texts(opened, top, tokenizer, after)
    chart(
        top_contexts(top, texts, path_use=opened.path_use, theme=theme()),
        f"contexts-{kind.replace(' ', '-')}",
    )


def known_tokenizer(opened: OpenCapture) -> Any | None:
    """The tokenizer that made the capture; says so where no open model has it."""
    tokenizer = tokenizer_of(opened.capture, current_view().shown)
    if tokenizer is None:
        st.caption("The tokens' texts are unknown: open the capture together with the model that made it.")
    return tokenizer


def context_texts(opened: OpenCapture, top: TopContexts, tokenizer: Any | None, after: int = 0) -> list[str]:
    """The token of each context in brackets, with the `after` that belong to it, behind a few that stand before."""
    tokens = opened.capture["tokens"]
    ids_of_samples = tokens["token"].isel(sample=top.sample).to_numpy()
    lengths = tokens["length"].isel(sample=top.sample).to_numpy()
    texts: list[str] = []
    for ids, length, position in zip(ids_of_samples, lengths, top.position.tolist(), strict=True):
        if tokenizer is None:
            texts.append(f"token id {ids[position]}")
            continue
        start = max(0, position - TOKENS_BEFORE)
        words = token_texts(tokenizer, ids[start : min(position + 1 + after, int(length))].tolist())
        meant = position - start
        texts.append(("…" if start else "") + "".join(words[:meant]) + f"[{''.join(words[meant:])}]")
    return texts

"""Prompt: one text through the model, token by token, beside the same text with one thing changed."""

import numpy as np
import streamlit as st

from dashboards.shared import tokens
from dashboards.shared.changes import changes_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.page import introduce
from dashboards.shared.prompt import Trace, ask_for_prompt, describe_prompt, encode, trace
from dashboards.shared.selection import linked
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import choose_block, current_job, current_model, fragment
from hydra_lab import figures, metrics
from hydra_lab.figures import routing as routing_figures
from hydra_lab.figures import text as text_figures
from hydra_lab.metrics.text import beta_by_token
from hydra_lab.path_use import PathUse


@fragment
def show(loaded: LoadedModel, ids: tuple[int, ...], path_use: PathUse | None) -> None:
    """Both runs, side by side."""
    changes = changes_in_force()
    runs = [("Untouched", trace(loaded, ids))]
    if changes:
        runs.append(("With the intervention", trace(loaded, ids, changes)))
    show_numbers(runs, len(ids))
    texts = tokens.token_texts(loaded.tokenizer, ids)
    position = show_tokens(loaded, runs, texts)
    show_details(loaded, runs, ids, texts, position, path_use)


def show_numbers(runs: list[tuple[str, Trace]], num_tokens: int) -> None:
    """Loss of each run and how far the change moves the predictions."""
    untouched, changed = runs[0][1], runs[-1][1]
    with st.container(horizontal=True, gap="medium"):
        st.metric("tokens", f"{num_tokens:,}", width="content")
        if num_tokens > 1:
            st.metric("loss, nats per token", f"{untouched.mean_loss:.3f}", width="content")
        if len(runs) > 1 and num_tokens > 1:
            difference = changed.mean_loss - untouched.mean_loss
            st.metric(
                "loss with the change",
                f"{changed.mean_loss:.3f}",
                delta=f"{difference:+.3f}",
                delta_color="inverse",
                width="content",
            )
        if len(runs) > 1:
            st.metric(
                "shift of the predictions, nats",
                f"{changed.divergence.mean():.3f}",
                width="content",
                help="Mean over tokens of the KL divergence from the untouched next-token distribution to "
                "the changed one.",
            )


def show_tokens(loaded: LoadedModel, runs: list[tuple[str, Trace]], texts: list[str]) -> int:
    """The coloured tokens of every run; returns the position that is looked at."""
    config = loaded.model.config
    options = {f"experts, block {layer}": ("experts", layer) for layer in config.layers_with("moe")}
    options |= {f"memory gate, block {layer}": ("beta", layer) for layer in config.layers_with("memory")}
    options |= {
        f"workspace read gate, block {layer}": ("read", layer) for layer in config.layers_with("workspace")
    }
    options["loss of the token"] = ("loss", 0)
    if len(runs) > 1:
        options["change of the loss"] = ("loss change", 0)
    left, right = st.columns(2)
    with left:
        what = st.selectbox("Colour the tokens by", list(options), key=linked("colour", list(options)))
    with right:
        position = st.number_input(
            f"Look at token (0 to {len(texts) - 1}, outlined)", min_value=0, max_value=len(texts) - 1,
            step=1, key=linked("token", range(len(texts)), len(texts) - 1),
        )  # fmt: skip
    for column, (title, run) in zip(st.columns(len(runs)), runs, strict=True):
        with column:
            if len(runs) > 1:
                st.markdown(f"**{title}**")
            st.html(coloured(runs[0][1], run, texts, options[what], int(position), what))
    return int(position)


def coloured(
    untouched: Trace, run: Trace, texts: list[str], colour: tuple[str, int], position: int, what: str
) -> str:
    """HTML of the tokens of one run and of the key to their colours."""
    kind, layer = colour
    if kind == "experts":
        routed = metrics.routing_map(metrics.routing_record(run.capture))
        block = routed.layers.index(layer)
        experts = [
            [int(expert) for expert, weight in zip(chosen, weights, strict=True) if weight > 0]
            for chosen, weights in zip(routed.experts[block], routed.weights[block], strict=True)
        ]
        legend = tokens.expert_legend(routed.num_experts, theme())
        return legend + tokens.expert_spans(
            texts, experts, routed.num_experts, routed.chunk_size, theme(), position
        )
    if kind == "loss change":
        values = run.loss - untouched.loss
        reach = float(np.nanmax(np.abs(values), initial=0.5)) if len(values) > 1 else 0.5
        limits, diverging = (-reach, reach), True
    else:
        limits, diverging = (0.0, 1.0), False
        if kind == "beta":
            values = metrics.lookup_record(run.capture, layer).gate[0]
        elif kind == "read":
            values = metrics.workspace_record(run.capture, layer).read_gate[0]
        else:
            values = run.loss
            limits = (0.0, max(float(np.nanmax(untouched.loss[1:], initial=0.0)), 1.0))
    values = values.astype(np.float64)
    legend = tokens.magnitude_legend(limits, what, diverging=diverging)
    return legend + tokens.magnitude_spans(texts, values, limits, what, diverging=diverging, chosen=position)


def show_details(
    loaded: LoadedModel,
    runs: list[tuple[str, Trace]],
    ids: tuple[int, ...],
    texts: list[str],
    position: int,
    path_use: PathUse | None,
) -> None:
    """One kind of decision of every run."""
    config = loaded.model.config
    kinds = {
        "Next token": None,
        "Routing": "moe",
        "Memory": "memory",
        "Workspace": "workspace",
        "State": "ssm",
    }
    present = [name for name, path in kinds.items() if path is None or config.layers_with(path)]
    kind = st.segmented_control("Details", present, required=True, key=linked("details", present))
    layer = 0
    if kind in ("Memory", "Workspace", "State"):
        path = str(kinds[kind])
        layer = choose_block("Block", config.layers_with(path))
    for index, (column, (title, run)) in enumerate(zip(st.columns(len(runs)), runs, strict=True)):
        with column:
            if len(runs) > 1:
                st.markdown(f"**{title}**")
            key = f"{kind}-{index}"
            if kind == "Next token":
                result = run.next_tokens(position, ids)
                labels = [
                    tokens.visible(each)
                    for each in tokens.token_texts(loaded.tokenizer, result.tokens.tolist())
                ]
                largest = max(float(each.probability[position, 0]) for _, each in runs)
                chart(text_figures.next_tokens(result, labels, largest=largest, theme=theme()), key)
            elif kind == "Routing":
                routed = metrics.routing_map(metrics.routing_record(run.capture))
                size = routed.chunk_size
                words = [
                    tokens.visible("".join(texts[start : start + size]))[:80].replace("<", "&lt;")
                    for start in range(0, len(texts), size)
                ]
                figure = routing_figures.routing_map(
                    routed, path_use=path_use, theme=theme(), chunk_texts=words
                )
                chart(figure, key)
            elif kind == "Memory":
                show_memory(run, layer, texts, position, path_use, key)
            elif kind == "Workspace":
                reads = metrics.slot_reads(metrics.workspace_record(run.capture, layer), num_bins=256)
                chart(figures.slot_reads(reads, path_use=path_use, theme=theme()), key)
            else:
                record = metrics.state_record(run.capture, layer)
                norms, half_life = metrics.state_norms(record), metrics.half_life(record)
                chart(figures.state_norms(norms, path_use=path_use, theme=theme()), key)
                chart(figures.half_life(half_life, path_use=path_use, theme=theme()), f"{key}-half-life")


def show_memory(
    run: Trace, layer: int, texts: list[str], position: int, path_use: PathUse | None, key: str
) -> None:
    """The gate along the text, and the rows that one token reads."""
    record = metrics.lookup_record(run.capture, layer)
    figure = text_figures.beta_by_token(
        beta_by_token(record), [tokens.visible(text) for text in texts], path_use=path_use, theme=theme()
    )
    chart(figure, key)
    addresses, weights = record.addresses[0, position], record.weights[0, position]
    n2 = record.num_keys[1]
    st.caption(
        f"Rows that token {position} ({tokens.visible(texts[position])}) reads, beta {record.gate[0, position]:.3f}; "
        f"a head's weights sum to 1"
    )
    st.dataframe(
        {
            "head": np.repeat(np.arange(addresses.shape[0]), addresses.shape[1]),
            "row": addresses.ravel().astype(np.int64),
            "first key": addresses.ravel() // n2,
            "second key": addresses.ravel() % n2,
            "weight": weights.ravel().astype(np.float64).round(3),
        },
        hide_index=True,
        height=250,
        key=f"{key}-rows",
    )


introduce(
    "Prompt",
    "What comes next, and which decisions led there?",
    "Tokens are coloured by one signal; the token that you look at is outlined.",
    "09_traces_and_taps",
)
loaded = current_model()
text = ask_for_prompt(loaded)
ids = encode(loaded.tokenizer, text)
describe_prompt(loaded, ids)
show(loaded, ids, current_job().path_use)

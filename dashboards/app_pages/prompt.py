"""Prompt: one text through the model, token by token, beside the same text with one thing changed."""

import numpy as np
import streamlit as st

from dashboards.shared import tokens
from dashboards.shared.charts import chart, theme
from dashboards.shared.prompt import Change, Trace, decode_file, encode, trace
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import choose_block, current_job, current_model, fragment
from hydra_lab import figures, metrics
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.figures import routing as routing_figures
from hydra_lab.figures import text as text_figures
from hydra_lab.metrics.text import beta_by_token
from hydra_lab.path_use import PathUse

FIRST_PROMPT = """def mean(values):
    return sum(values) / len(values)

42+17: 2+7=9 4+1=5 =59

KING. What news? The army of the north is come.

country of Osaka: Japan
country of Lyon:"""
EXAMPLE_TOKENS = 200
LINKED_CHARACTERS = 1500  # prompts up to this length are part of the address

CHANGES = {"nothing": "none", "ablate an expert": "ablate", "force an expert": "force", "cut a path": "cut"}


def ask_for_text(loaded: LoadedModel) -> str:
    """The prompt: typed, an example, or a file."""
    if "prompt" not in st.session_state:
        st.session_state["prompt"] = st.query_params.get("prompt", FIRST_PROMPT)
    examples = {domain: texts[0] for domain, texts in read_sample_texts(loaded.directory).items()}

    def use_example() -> None:
        domain = st.session_state["example"]
        if domain is not None:
            ids = encode(loaded.tokenizer, examples[domain])[:EXAMPLE_TOKENS]
            st.session_state["prompt"] = "".join(tokens.token_texts(loaded.tokenizer, ids))

    text = st.text_area("Text", key="prompt", height=130, help="Ctrl+Enter, or a click elsewhere, runs it.")
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    with left:
        if examples:
            st.pills("Held-out examples", list(examples), key="example", on_change=use_example)
    with right, st.popover("From a file", width="stretch"):
        uploaded = st.file_uploader("A UTF-8 text file; it takes the place of the text", key="file")
    if uploaded is not None:
        text = decode_file(uploaded.name, uploaded.getvalue())
        st.caption(f"Running {uploaded.name}; remove the file to go back to the text above.")
    elif text and len(text) <= LINKED_CHARACTERS:
        st.query_params["prompt"] = text
    else:
        st.query_params.pop("prompt", None)
    return text


def ask_for_change(loaded: LoadedModel) -> Change:
    """What is different in the second run."""
    config = loaded.model.config
    labels = [
        label for label, kind in CHANGES.items() if kind in ("none", "cut") or config.layers_with("moe")
    ]
    columns = st.columns([3, 2, 2], vertical_alignment="bottom")
    with columns[0]:
        kind = CHANGES[st.selectbox("Change, and compare", labels, key="change", bind="query-params")]
    if kind == "none":
        return Change()
    if kind == "cut":
        present = [
            path for path in ("moe", "attention", "memory", "workspace", "ssm") if config.layers_with(path)
        ]
        with columns[1]:
            path = st.selectbox("Path", present, key="path", bind="query-params")
        where = ["every block", *map(str, config.layers_with(path))]
        with columns[2]:
            place = st.selectbox("Block", where, key=f"{path}_place", bind="query-params")
        return Change("cut", path=path, layer=None if place == "every block" else int(place))
    with columns[1]:
        layer = st.selectbox("Block", config.layers_with("moe"), key="expert_block", bind="query-params")
    with columns[2]:
        expert = st.selectbox("Expert", range(config.moe_num_experts), key="expert", bind="query-params")
    return Change(kind, layer=layer, expert=expert)


@fragment
def show(loaded: LoadedModel, ids: tuple[int, ...], path_use: PathUse | None) -> None:
    """Both runs, side by side."""
    change = ask_for_change(loaded)
    untouched = trace(loaded, ids, Change())
    runs = [("Untouched", untouched)]
    if change.kind != "none":
        runs.append((change.title, trace(loaded, ids, change)))
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
        what = st.selectbox("Colour the tokens by", list(options), key="colour", bind="query-params")
    with right:
        position = st.number_input(
            f"Look at token (0 to {len(texts) - 1}, outlined)", min_value=0, max_value=len(texts) - 1,
            value=len(texts) - 1, step=1, key=f"token_of_{len(texts)}",
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
    kind = st.segmented_control(
        "Details", present, default=present[0], required=True, key="details", bind="query-params"
    )
    layer = 0
    if kind in ("Memory", "Workspace", "State"):
        path = str(kinds[kind])
        layer = choose_block("Block", config.layers_with(path), f"{path}_block")
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


st.title("Prompt")
loaded = current_model()
text = ask_for_text(loaded)
show(loaded, encode(loaded.tokenizer, text), current_job().path_use)

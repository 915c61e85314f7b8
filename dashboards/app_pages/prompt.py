"""Prompt: one text through the model, token by token: what comes next, where it was decided, and which path
wrote it."""

import numpy as np
import streamlit as st
import torch

from dashboards.shared.changes import changes_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.colouring import choose_signal, choose_token, draw_tokens
from dashboards.shared.generation import Writer
from dashboards.shared.page import introduce
from dashboards.shared.prompt import Trace, ask_for_prompt, describe_prompt, encode, trace
from dashboards.shared.selection import linked, pick
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import choose_block, current_job, current_model, fragment
from hydra_lab import figures, metrics
from hydra_lab.attribution import direct_logit_attribution, logit_lens
from hydra_lab.figures import routing as routing_figures
from hydra_lab.figures import text as text_figures
from hydra_lab.interventions import intervened
from hydra_lab.locks import model_lock
from hydra_lab.metrics.text import beta_by_token
from hydra_lab.path_use import PathUse
from hydra_lab.widgets.text import token_texts, visible

LENS_TOKENS = 24
"""Tokens that the logit lens shows at a time."""
MOST_WRITTEN = 200


@fragment
def show(loaded: LoadedModel, ids: tuple[int, ...], path_use: PathUse | None) -> None:
    """Both runs, side by side."""
    changes = changes_in_force()
    runs = [("Untouched", trace(loaded, ids))]
    if changes:
        runs.append(("With the intervention", trace(loaded, ids, changes)))
    show_numbers(runs, len(ids))
    texts = token_texts(loaded.tokenizer, ids)
    position = show_tokens(loaded, runs, texts)
    show_generation(loaded, ids)
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
    left, right = st.columns(2)
    with left:
        signal = choose_signal(loaded.model.config, changed=len(runs) > 1)
    with right:
        position = choose_token(len(texts))
    traces = [run for _, run in runs]
    for index, (column, (title, _)) in enumerate(zip(st.columns(len(runs)), runs, strict=True)):
        with column:
            if len(runs) > 1:
                st.markdown(f"**{title}**")
            draw_tokens(traces, index, texts, signal, position, f"tokens-{index}")
    return position


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
        "Logit lens": None,
        "Written by": None,
        "Routing": "moe",
        "Memory": "memory",
        "Workspace": "workspace",
        "State": "ssm",
    }
    present = [name for name, path in kinds.items() if path is None or config.layers_with(path)]
    kind = st.segmented_control("Details", present, required=True, key=linked("details", present))
    if kind in ("Logit lens", "Written by"):
        show_attribution(loaded, ids, position, kind)
        return
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
                labels = [visible(each) for each in token_texts(loaded.tokenizer, result.tokens.tolist())]
                largest = max(float(each.probability[position, 0]) for _, each in runs)
                chart(text_figures.next_tokens(result, labels, largest=largest, theme=theme()), key)
            elif kind == "Routing":
                routed = metrics.routing_map(metrics.routing_record(run.capture))
                size = routed.chunk_size
                words = [
                    visible("".join(texts[start : start + size]))[:80].replace("<", "&lt;")
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


def show_attribution(loaded: LoadedModel, ids: tuple[int, ...], position: int, kind: str) -> None:
    """At which block the next token was decided, or which path wrote it; with the interventions in force."""

    def label(token: int) -> str:
        return visible(token_texts(loaded.tokenizer, [token])[0])

    model, input_ids = loaded.model, torch.tensor([ids])
    with model_lock(model), intervened(model, *changes_in_force()):
        if kind == "Logit lens":
            lens = logit_lens(model, input_ids)
            first = min(max(0, position - LENS_TOKENS + 1), max(0, len(ids) - LENS_TOKENS))
            shown = range(first, min(len(ids), first + LENS_TOKENS))
            chart(figures.logit_lens(lens, label, positions=shown, theme=theme()), "lens")
            st.caption(
                "Each cell is what the model would say next if it stopped there; pick a token to move along."
            )
        else:
            likeliest = torch.tensor(trace(loaded, ids, changes_in_force()).candidates[None, :, 0])
            written = direct_logit_attribution(model, input_ids, likeliest)
            figure = figures.direct_logit_attribution(written, label, position=position, theme=theme())
            chart(figure, "written-by")


def show_generation(loaded: LoadedModel, ids: tuple[int, ...]) -> None:
    """A continuation, written token by token; the button puts it behind the prompt, where its decisions show."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        count = st.number_input(
            "Tokens to write", 1, MOST_WRITTEN, step=1, key=linked("written", range(1, MOST_WRITTEN + 1), 40), width=160
        )  # fmt: skip
        asked = st.button("Write on", type="primary", icon=":material/play_arrow:", key="write-on")
    if asked:
        writer = Writer(loaded, ids, changes_in_force(), num_tokens=int(count), temperature=0.0, seed=0)
        place, written = st.empty(), ""
        for piece in writer:
            written += piece
            place.code(written, language=None, wrap_lines=True)
        st.session_state["written text"] = loaded.tokenizer.decode([*ids, *writer.ids])
    if "written text" in st.session_state:
        st.button(
            "Put it behind the prompt", key="keep-written",
            help="Then its decisions are shown like those of the prompt.",
            on_click=lambda: pick(prompt=st.session_state.pop("written text")),
        )  # fmt: skip


def show_memory(
    run: Trace, layer: int, texts: list[str], position: int, path_use: PathUse | None, key: str
) -> None:
    """The gate along the text, and the rows that one token reads."""
    record = metrics.lookup_record(run.capture, layer)
    figure = text_figures.beta_by_token(
        beta_by_token(record), [visible(text) for text in texts], path_use=path_use, theme=theme()
    )
    chart(figure, key)
    addresses, weights = record.addresses[0, position], record.weights[0, position]
    n2 = record.num_keys[1]
    st.caption(
        f"Rows that token {position} ({visible(texts[position])}) reads, beta {record.gate[0, position]:.3f}; "
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
    "What comes next, where was it decided, and which path wrote it?",
    "Tokens are coloured by one signal; the token that you look at is outlined.",
    "09_traces_and_taps",
)
loaded = current_model()
text = ask_for_prompt(loaded)
ids = encode(loaded.tokenizer, text)
describe_prompt(loaded, ids)
show(loaded, ids, current_job().path_use)

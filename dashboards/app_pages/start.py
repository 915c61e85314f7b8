"""Start: what is loaded, where its parameters and compute sit, and which of its paths it uses."""

import json
from pathlib import Path
from typing import Any

import streamlit as st

from dashboards.shared.changes import changes_in_force
from dashboards.shared.charts import chart, theme
from dashboards.shared.components import block_diagram
from dashboards.shared.page import introduce
from dashboards.shared.prompt import describe_prompt, prompt_ids, trace
from dashboards.shared.sample_capture import show_sample_job
from dashboards.shared.selection import linked
from dashboards.shared.sources import LoadedModel
from dashboards.shared.view import current_job, current_model, current_view, fragment
from hydra_lab.accounting import flops_per_token, parameter_table, state_bytes
from hydra_lab.capture import open_capture
from hydra_lab.figures.accounting import flops, parameters
from hydra_lab.figures.path_use import path_use
from hydra_lab.metrics import captured_path_use
from hydra_lab.taps import PATHS
from hydra_lab.widgets import block_diagram_payload

PAGE_OF_PATH = {
    "ssm": "state", "attention": "attention", "moe": "routing", "workspace": "workspace", "memory": "memory",
}  # fmt: skip
CONTEXTS = (1024, 8192, 65536)
WHAT_PATHS_DO = {
    "ssm": "a state of fixed size, carried from token to token (Mamba-2)",
    "attention": "the recent window, the first block and a few selected earlier blocks",
    "moe": "experts, chosen once for each chunk of tokens",
    "workspace": "slots that every chunk writes and later tokens read",
    "memory": "a table of learned values, read by product keys",
}


def show_model(loaded: LoadedModel) -> None:
    config = loaded.model.config
    table = parameter_table(config)
    st.markdown(f"**{loaded.name}** is a Hydra language model, read from `{loaded.directory}`.")
    numbers = {
        "parameters": f"{table.total / 1e6:,.2f} M",
        "active per token": f"{table.active / 1e6:,.2f} M",
        "blocks": str(config.num_hidden_layers),
        "width": str(config.hidden_size),
        "vocabulary": f"{config.vocab_size:,}",
    }
    with st.container(horizontal=True, gap="medium"):
        for label, value in numbers.items():
            st.metric(label, value, width="content")


def show_parts(config: Any) -> None:
    """The paths in words, and where parameters and compute sit."""
    rows = [
        {
            "path": path,
            "blocks": ", ".join(map(str, config.layers_with(path))),
            "what it is": WHAT_PATHS_DO[path],
        }
        for path in PATHS
        if config.layers_with(path)
    ]
    st.table(rows, hide_index=True, border="horizontal")
    left, right = st.columns(2)
    with left:
        chart(parameters(parameter_table(config), theme=theme()), "parameters")
    with right:
        show_compute(config)


@fragment
def show_paths(loaded: LoadedModel) -> None:
    """Each path's share of every block's update on the prompt; a click goes to the path's page."""
    ids = prompt_ids(loaded)
    describe_prompt(loaded, ids)
    run = trace(loaded, ids, changes_in_force())
    use = captured_path_use(run.capture)
    payload = block_diagram_payload(
        use.layers, use.paths, use.share, gates=gates_of(loaded.model), theme=theme()
    )
    st.caption("Click a path to open its page.")
    if chosen := block_diagram(payload, "blocks"):
        layer, path = chosen
        st.switch_page(f"app_pages/{PAGE_OF_PATH[path]}.py", query_params={"block": str(layer)})
    with st.container(horizontal=True):
        for path, page in PAGE_OF_PATH.items():
            if loaded.model.config.layers_with(path):
                st.page_link(f"app_pages/{page}.py", label=path)


def gates_of(model: Any) -> dict[tuple[int, str], float]:
    """Gate g of every block and path."""
    return {
        (index, path): block.gates[path].item()
        for index, block in enumerate(model.model.layers)
        for path in block.paths
    }


@fragment
def show_compute(config: Any) -> None:
    context = st.segmented_control(
        "Context", CONTEXTS, required=True, format_func="{:,} tokens".format, key=linked("context", CONTEXTS),
    )  # fmt: skip
    assert context is not None
    chart(flops(flops_per_token(config, context), theme=theme()), "flops")
    state = state_bytes(config, context)
    parts = ", ".join(f"{path} {size / 1024:,.0f} KiB" for path, size in state.by_component().items())
    st.caption(f"Decoding keeps {state.num_bytes / 1024:,.0f} KiB per sequence (fp32): {parts}.")


def show_path_use() -> None:
    job = current_job()
    if job.running:
        show_sample_job(job)
    if job.path_use is not None:
        figure = path_use(job.path_use, theme=theme())
        chart(figure, "path-use")
    elif not job.has_texts:
        st.info(
            f"Path use is not known for {job.loaded.name}: measure it with `hydra-lab info {job.loaded.name} "
            "--text FILE --record`."
        )
    elif job.error:
        show_sample_job(job)


def show_training(directory: Path) -> None:
    training, evaluation = (_read(directory / name) for name in ("training.json", "evaluation.json"))
    if training is not None:
        st.subheader("How it was trained")
        for run in (*training["earlier"], training):
            st.markdown(f"{run['steps']:,} steps on {run['tokens'] / 1e6:,.1f} M tokens, seed {run['seed']}:")
            st.code(run["command"], language="bash")
    if evaluation is not None:
        st.subheader("What it can do, on held-out text")
        left, right = st.columns(2)
        left.table(
            [
                {
                    "domain": row["domain"],
                    "bits per byte": f"{row['bits_per_byte']:.3f}",
                    "bytes": f"{row['num_bytes']:,}",
                }
                for row in evaluation["domains"]
            ],
            hide_index=True,
            border="horizontal",
        )
        right.table(
            [
                {
                    "questions": f"{row['task']}: {row['group']}",
                    "right": f"{row['accuracy']:.1%}",
                    "chance": f"{row['chance']:.1%}",
                    "n": f"{row['num_questions']:,}",
                }
                for row in evaluation["answers"]
            ],
            hide_index=True,
            border="horizontal",
        )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


introduce(
    "Hydra lab",
    "What is loaded, and where do its parameters, its compute and its updates sit?",
    "Look at how much a path is used before you believe a picture of its decisions.",
    "01_residual_stream",
)
view = current_view()
if view.model is not None:
    loaded = current_model()
    show_model(loaded)
    show_paths(loaded)
    show_parts(loaded.model.config)
    show_path_use()
    show_training(loaded.directory)
if view.shown.captures:
    st.subheader("Captures")
    opened = [open_capture(path) for path in view.shown.captures]
    st.table(
        [
            {
                "capture": str(each.path),
                "made by": each.attributes["model_name"],
                "tokens": f"{each.num_tokens:,}",
                "samples": f"{each.num_samples:,}",
                "holds": ", ".join(each.groups),
                "complete": "yes" if each.complete else "no",
            }
            for each in opened
        ],
        hide_index=True,
        border="horizontal",
    )

"""Training: a run's curves as it trains: losses, gates, expert load, use of the memory, norms of the states."""

from pathlib import Path

import streamlit as st

from dashboards.shared.charts import chart, theme
from dashboards.shared.page import introduce
from dashboards.shared.selection import linked_flag
from dashboards.shared.view import current_view, fragment
from hydra_lab import figures
from hydra_lab.loading import model_directory
from hydra_lab.training_log import LOG_FILE, TrainingLog, read_training_log

SECONDS = 5
"""Between two looks at a run that is going on."""


@st.cache_data(max_entries=8, show_spinner=False)
def read(directory: str, changed: int) -> TrainingLog:
    return read_training_log(directory)


@fragment
def show(directory: Path) -> None:
    """Everything the log says by now."""
    log = read(str(directory), (directory / LOG_FILE).stat().st_mtime_ns)
    with st.container(horizontal=True, gap="medium"):
        for label, value in {
            "step": f"{int(log.step[-1]):,}",
            "tokens": f"{log.tokens[-1] / 1e6:,.2f} M",
            "loss, nats per token": f"{log.language_loss[-1]:.3f}",
            "tokens per second": f"{log.tokens_per_second[-1]:,.0f}",
            "learning rate": f"{log.learning_rate[-1]:.2e}",
        }.items():
            st.metric(label, value, width="content")
    off = [path for path, scale in log.path_scales.items() if scale[-1] < 1]
    if off:
        st.caption(f"The curriculum holds back at this step: {', '.join(off)}.")
    left, right = st.columns(2)
    with left:
        chart(figures.training_loss(log, theme=theme()), "training-loss")
    with right:
        chart(figures.path_gates(log, theme=theme()), "path-gates")
    if not (log.expert_load or log.memory_use or log.state_norm):
        st.info(
            "This log was written before training reported expert load, use of the memory and state norms."
        )
        return
    left, right = st.columns(2)
    with left:
        if log.expert_load:
            chart(figures.expert_load_over_training(log, theme=theme()), "load-over-training")
    with right:
        if log.memory_use:
            chart(figures.memory_use_over_training(log, theme=theme()), "memory-over-training")
        if log.state_norm:
            chart(figures.state_norms_over_training(log, theme=theme()), "norms-over-training")


@st.fragment(run_every=SECONDS)
def follow(directory: Path) -> None:
    show(directory)


introduce(
    "Training",
    "What does the model learn, and do all its paths stay alive?",
    "A gate that falls to zero, an expert without load, or a memory that nothing reads is a path that dies.",
    "13_train_a_tiny_hydra",
)
run = current_view().run
if run is None:
    st.info(
        "No run is open: start one with `hydra-lab train --preset nano --corpus build/corpus --out "
        "build/run`, then open "
        "`build/run` in the sidebar, or start `hydra-lab dashboard demo build/run`."
    )
else:
    directory = Path(run) if (Path(run) / LOG_FILE).is_file() else model_directory(run)
    live = st.toggle(f"Follow it (every {SECONDS} s)", key=linked_flag("follow"))
    (follow if live else show)(directory)

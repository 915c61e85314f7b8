"""Kernels: which backend runs, and how fast and right it was measured to be, here and on the reference GPU."""

from pathlib import Path

import streamlit as st

from dashboards.shared.charts import chart, theme
from dashboards.shared.page import introduce
from dashboards.shared.selection import linked
from dashboards.shared.sources import loaded_model
from dashboards.shared.view import current_view, fragment
from hydra_lab.bench.plots import plot_result
from hydra_lab.bench.result import BenchResult
from hydra_lab.capture.engine import backends_of

RESULTS = Path(__file__).resolve().parents[2] / "hydra_lab" / "bench" / "results"
OWN_RESULTS = Path("build") / "bench"
"""Where `hydra-lab bench ... --out build/bench/NAME.json` leaves what was measured on this machine."""


def show_backends() -> None:
    """The backend of every operation of the chosen model."""
    view = current_view()
    if view.model is None:
        return
    model = loaded_model(view.model).model
    device = next(model.parameters()).device
    st.markdown(f"**{view.model}** runs on `{device}` with: `{backends_of(model)}`.")
    st.caption(
        "Another backend: `hydra_lab.ops.use_backend`, or `ops_backend` in the model's configuration. What "
        "was verified on "
        "a GPU, and what waits, stands in GPU.md."
    )


@fragment
def show_results() -> None:
    files = {path.stem: path for folder in (OWN_RESULTS, RESULTS) for path in sorted(folder.glob("*.json"))}
    names = list(files)
    if not names:
        st.info("No result file: measure with `hydra-lab bench kernels --out build/bench/kernels.json`.")
        return
    name = st.selectbox("Result file", names, key=linked("result", names))
    result = BenchResult.read(files[name])
    environment = result.environment
    versions = {key: value for key, value in environment["versions"].items() if value is not None}
    st.caption(
        f"`bench {result.bench}` on {environment['device']} ({environment['hardware']['cpu']}), commit "
        f"{(environment['commit'] or 'none')[:10]}; "
        + ", ".join(f"{key} {value}" for key, value in versions.items())
    )
    chart(plot_result(result, theme()), f"bench-{name}")
    if result.goals:
        st.markdown("**Goals of this run** (95% interval)")
        st.dataframe(
            [
                {
                    "measure": goal.measure,
                    "goal": goal.goal,
                    "measured": f"{goal.value:.3g} ({goal.low:.3g} to {goal.high:.3g})",
                    "reached": "yes" if goal.reached else "missed",
                }
                for goal in result.goals
            ],
            hide_index=True,
            key="goals",
        )
    if result.skipped:
        with st.expander(f"Not measured: {len(result.skipped)}"):
            st.dataframe(
                [{"what": what, "why": why} for what, why in result.skipped.items()],
                hide_index=True,
                key="skipped",
            )


introduce(
    "Kernels",
    "Which backend computes each operation, and how fast was it?",
    "Ratios within one run are what to compare; absolute times belong to the machine that they were taken on.",
    "12_triton_kernel",
)
show_backends()
st.caption(
    "To measure this machine: `hydra-lab bench kernels --quick --out build/bench/kernels-here.json`, then "
    "open this page "
    "from the same directory."
)
show_results()

"""Run a notebook and keep outputs that a code host can show: figures as JSON and as a picture, controls as a note."""

import base64
import re
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import plotly.io
import zmq
from nbclient import NotebookClient
from nbformat import NotebookNode

from hydra_lab.course.lesson import has_tag
from hydra_lab.figures.export import write_png

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
REPR = re.compile(r"[A-Z]\w*\(.*|<.* object at 0x.*>", re.DOTALL)
"""The Python expression that ipywidgets shows of a control where it cannot show the control."""
PROGRESS = re.compile(r"\d+%\|")
"""A progress bar, which stays at 0% without its kernel."""
RUN_ME = "Run this cell to use its controls."


class Client(NotebookClient):
    """A client that does not miss a cell's end where the cell draws into an output widget.

    The answer to such a widget is sent past the asyncio socket of the kernel's replies, whose wake-ups are edges: a
    reply that arrives meanwhile would wait for the next message, a minute or more.
    """

    def handle_comm_msg(self, outs: list[Any], msg: dict[str, Any], cell_index: int) -> None:
        super().handle_comm_msg(outs, msg, cell_index)
        if self.kc is not None:
            self.kc.shell_channel.socket.get(zmq.EVENTS)  # looks anew, and wakes who waits


def run(notebook: NotebookNode, *, seconds: float = 300, allow_errors: bool = False) -> NotebookNode:
    """Execute a notebook in place with the kernel of this environment, and return it.

    Args:
        seconds: what a single cell may take.
        allow_errors: go on after a cell that fails, as a student does who runs everything first.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed, without `allow_errors`.
    """
    client = Client(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        allow_errors=allow_errors,
        record_timing=False,
    )
    return client.execute()


def executed(notebook: NotebookNode) -> NotebookNode:
    """Execute a student's notebook in place for a code host.

    The exercises stay open: their cells and checks keep no output. A figure gets a PNG beside its JSON. A control,
    which needs a kernel, leaves the text that it shows without one.
    """
    metadata = deepcopy(notebook.metadata)
    run(notebook, allow_errors=True)
    notebook.metadata = (
        metadata  # without this machine's versions and the state of controls whose kernel is gone
    )
    figures: dict[str, dict[str, Any]] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if has_tag(cell, "exercise") or has_tag(cell, "check"):
            cell.outputs, cell.execution_count = [], None
        kept: list[NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "error":
                raise RuntimeError(
                    f"a cell that is no exercise failed: {output.ename}: {output.evalue}\n{cell.source}"
                )
            data = output.get("data", {})
            if WIDGET in data:
                del data[WIDGET]
                if "text/html" not in data and REPR.fullmatch(data["text/plain"]):
                    data["text/plain"] = RUN_ME
            if not PROGRESS.search(data.get("text/plain", "")) and output not in kept:
                kept.append(output)
        cell.outputs = kept
        for output in kept:
            if PLOTLY in output.get("data", {}):
                figures[f"figure-{len(figures)}"] = output.data
    _add_pictures(figures)
    return notebook


def _add_pictures(outputs: dict[str, dict[str, Any]]) -> None:
    """Draw every output that is a plotly figure as a PNG beside it."""
    if not outputs:
        return
    drawn: dict[str, Any] = {
        name: plotly.io.from_json(plotly.io.json.to_json_plotly(data[PLOTLY]))
        for name, data in outputs.items()
    }
    with tempfile.TemporaryDirectory() as directory:
        for name, path in write_png(drawn, Path(directory), width=800, scale=1.0).items():
            outputs[name]["image/png"] = base64.b64encode(path.read_bytes()).decode()
            outputs[name].pop("text/html", None)  # a copy of plotly's script, megabytes of it

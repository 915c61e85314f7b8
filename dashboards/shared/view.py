"""What every page needs to know: which model and capture are on show, and how to say that something is missing."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import streamlit as st
from numpy.typing import NDArray

from dashboards.shared.sample_capture import SampleJob, sample_job, show_sample_job
from dashboards.shared.selection import linked, page_is_stale, pick, picked, write_address
from dashboards.shared.sources import LoadedModel, Shown, loaded_model
from hydra_lab.capture import open_capture
from hydra_lab.capture.layout import SUMMARY
from hydra_lab.capture.store import Capture
from hydra_lab.interventions import from_dict
from hydra_lab.loading import model_directory
from hydra_lab.metrics import captured_path_use, summarized_path_use
from hydra_lab.metrics.arrays import domain_order
from hydra_lab.path_use import PathUse
from hydra_lab.summaries import Summary, layers_of
from hydra_lab.training_log import LOG_FILE

MAX_TOKENS_READ = 400_000
"""Tokens of a capture that a page reads raw arrays of at most; of a larger one, evenly spaced samples."""

SAMPLES_OF = "sample texts of "

Arguments = ParamSpec("Arguments")


def fragment(draw: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """`st.fragment` that turns what a user can mend into one sentence, also when it runs without its page."""

    @st.fragment
    @wraps(draw)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if page_is_stale():
            st.rerun()
        try:
            draw(*args, **kwargs)
        except (ValueError, OSError) as error:
            st.error(str(error), icon=":material/error:")
        write_address()

    return guarded


@dataclass(frozen=True)
class View:
    """The selection in the sidebar.

    Attributes:
        shown: what the command line named, and what was opened since.
        model: chosen model; None where there is none.
        capture: chosen capture, a path, or `SAMPLES_OF` and a model's name; None where there is none.
        run: chosen training run, a run directory or a model that brings its log; None where there is none.
    """

    shown: Shown
    model: str | None
    capture: str | None
    run: str | None


def choose_view(given: Shown) -> View:
    """Draw the sidebar's choices; they are part of the address, so a link shows the same.

    Args:
        given: what the command line named.
    """
    shown = given
    for name in _opened():
        shown = shown.with_added(name)
    choices = {
        "model": ("Model", list(shown.models)),
        "capture": ("Capture", [*shown.captures, *(SAMPLES_OF + name for name in shown.models)]),
        "run": ("Training run", [*shown.runs, *_with_log(shown.models)]),
    }
    with st.sidebar:
        chosen = {key: _choose(label, options, key) for key, (label, options) in choices.items()}
        alone = [f"{label}: {options[0]}" for label, options in choices.values() if len(options) == 1]
        if alone:
            st.caption("  \n".join(alone))
        st.text_input(
            "Open another", key="to_open", placeholder="path of a model, capture or run", on_change=_open_another,
            help="A directory written by save_pretrained, `hydra-lab capture` or `hydra-lab train`.",
        )  # fmt: skip
        if problem := st.session_state.pop("not_opened", None):
            st.error(problem, icon=":material/error:")
    view = View(shown, **chosen)
    st.session_state["view"] = view
    return view


def _choose(label: str, options: list[str], key: str) -> str | None:
    if len(options) > 1:
        return st.selectbox(label, options, key=linked(key, options))
    return options[0] if options else None


def _opened() -> list[str]:
    """What was opened in the sidebar; from an address, only what is there."""
    names = picked("open", [])
    return [names] if isinstance(names, str) else names


def _open_another() -> None:
    name = st.session_state["to_open"].strip()
    if not name:
        return
    added = Shown().with_added(name)
    try:
        added.check()
    except ValueError as error:
        st.session_state["not_opened"] = f"{error}; or the path of a capture, or of a training run."
        return
    pick(open=[*_opened(), name], to_open="")
    if added.models:
        pick(model=name, capture=SAMPLES_OF + name)
    elif added.captures:
        pick(capture=name)
    else:
        pick(run=name)


def _with_log(models: Sequence[str]) -> list[str]:
    """Those that bring the log of their training."""
    return [name for name in models if (model_directory(name) / LOG_FILE).is_file()]


def current_view() -> View:
    """The selection that `choose_view` made in this run."""
    return st.session_state["view"]


def current_model() -> LoadedModel:
    """The chosen model.

    Raises:
        ValueError: only captures were given.
    """
    view = current_view()
    if view.model is None:
        raise ValueError(
            "Only a capture is open, and this page runs a model: start `hydra-lab dashboard MODEL "
            f"{view.shown.captures[0]}`."
        )
    return loaded_model(view.model)


def current_job() -> SampleJob:
    """The sample job of the chosen model, started if it was not."""
    return sample_job(current_model())


CaptureKey = tuple[str, str, int]
"""Path, hash of the weights and number of samples of a capture: changes when the capture changes; for caches."""


@dataclass(frozen=True, eq=False)
class WholeCapture:
    """What is known of all samples of a capture without any raw array; the `summarized_...` functions of
    `hydra_lab.metrics` take it.

    Attributes:
        attributes: of the capture.
        summary: its running summary.
    """

    attributes: dict[str, Any]
    summary: Summary

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains in order of first appearance."""
        names = self.attributes["domains"]
        return tuple(names[z] for z in domain_order(self.summary["tokens"]["first_sample"]))


@dataclass(frozen=True, eq=False)
class OpenCapture:
    """A capture with what a page says about it.

    Attributes:
        whole: its summary; None where it keeps none, and pages read raw arrays.
        rows: samples of which pages read raw arrays, in order.
        path_use: of the model that made it: measured where that is known, else shares alone.
        key: for caches.
    """

    capture: Capture
    whole: WholeCapture | None
    rows: NDArray[np.int64]
    path_use: PathUse | None
    key: CaptureKey

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains in order of first appearance."""
        return self.whole.domains if self.whole is not None else tuple(dict.fromkeys(self.capture.domains))

    def layers_of(self, group: str) -> tuple[int, ...]:
        """The blocks that have a group."""
        return layers_of(self.capture.attributes["config"], group)


def current_capture() -> OpenCapture:
    """The chosen capture; draws progress and ends this run of the page while it is being made.

    Raises:
        ValueError: there is none.
    """
    view = current_view()
    assert (
        view.capture is not None
    )  # there is always a capture or a model, and a model has sample texts or an error
    if not view.capture.startswith(SAMPLES_OF):
        return _open(view.capture, _path_use_of(view, view.capture))
    name = view.capture.removeprefix(SAMPLES_OF)
    job = sample_job(loaded_model(name))
    if not job.has_texts:
        raise ValueError(
            f"{name} brings no sample texts, so there is nothing to draw: `hydra-lab capture {name} FILE... "
            f"--out run.zarr`, then `hydra-lab dashboard {name} run.zarr`."
        )
    if job.capture is None:
        show_sample_job(job)
        st.stop()
    return _open(str(job.capture), job.path_use)


def open_captures() -> dict[str, OpenCapture]:
    """The captures that were named or opened, by path, without those of sample texts."""
    view = current_view()
    return {path: _open(path, _path_use_of(view, path)) for path in view.shown.captures}


def _open(path: str, path_use: PathUse | None) -> OpenCapture:
    capture = open_capture(path)
    if capture.num_samples == 0:
        raise ValueError(
            f"{path} holds no committed sample yet: finish it with `hydra-lab capture ... --resume`."
        )
    key = (str(Path(path).resolve()), str(capture.attributes["weights_sha256"]), capture.num_samples)
    whole = whole_capture(key) if SUMMARY in capture.attributes["signals"] else None
    if path_use is None and whole is not None and "paths" in whole.summary:
        path_use = summarized_path_use(whole)
    elif path_use is None and "paths" in capture.groups:
        path_use = _shares(key)
    return OpenCapture(capture, whole, _rows(key, MAX_TOKENS_READ), path_use, key)


@st.cache_resource(max_entries=4, show_spinner="Reading the summary …")
def whole_capture(key: CaptureKey) -> WholeCapture:
    """The summary of a capture that keeps one; shared, not copied, because it may be large."""
    capture = open_capture(key[0])
    return WholeCapture(capture.attributes, capture.summary)


def _path_use_of(view: View, path: str) -> PathUse | None:
    """Measured path use, where one of the shown models made the capture."""
    weights = open_capture(path).attributes["weights_sha256"]
    for name in view.shown.models:
        loaded = loaded_model(name)
        if loaded.weights_hash == weights:
            return sample_job(loaded).path_use
    return None


@st.cache_data(max_entries=16, show_spinner=False)
def _shares(key: CaptureKey) -> PathUse:
    return captured_path_use(open_capture(key[0]))


@st.cache_data(max_entries=16, show_spinner=False)
def _rows(key: CaptureKey, max_tokens: int) -> NDArray[np.int64]:
    """All samples, or as many evenly spaced ones as hold about `max_tokens` tokens."""
    capture = open_capture(key[0])
    keep = min(1.0, max_tokens / max(1, capture.num_tokens))
    count = max(1, int(capture.num_samples * keep))
    return np.unique(np.linspace(0, capture.num_samples - 1, count).round().astype(np.int64))


def describe_capture(opened: OpenCapture) -> None:
    """One line under the page's title: what the figures are drawn from."""
    capture = opened.capture
    part = (
        ""
        if opened.whole is not None or len(opened.rows) == capture.num_samples
        else f", of which {len(opened.rows):,} evenly spaced are read"
    )
    state = "" if capture.complete else " (interrupted: `hydra-lab capture ... --resume` goes on with it)"
    st.caption(
        f"{capture.num_tokens:,} tokens in {capture.num_samples:,} samples{part}, {len(opened.domains)} domains; "
        f"made by {capture.attributes['model_name'] or 'a model without a name'} with the "
        f"{capture.attributes['backend']} backend in {capture.attributes['dtype']}{state}"
    )


def choose_block(label: str, layers: Sequence[int], key: str = "block") -> int:
    """A choice among the blocks that have a path; the same on every page, as far as the blocks have the path."""
    options: Any = [int(layer) for layer in layers]
    if len(options) == 1:
        return options[0]
    chosen = st.segmented_control(label, options, required=True, key=linked(key, options))
    assert chosen is not None
    return chosen


def has_group(opened: OpenCapture, group: str, path: str) -> bool:
    """Whether the capture holds `group`, in full or in its summary; says what to do where it does not."""
    if group in opened.capture.groups or (opened.whole is not None and group in opened.whole.summary):
        return True
    if not opened.layers_of(group):
        st.info(f"This model has no {path} path.")
    else:
        st.info(
            f"This capture was made without the signal {group}: capture it again with {capture_again(opened, group)}"
        )
    return False


def has_raw(opened: OpenCapture, group: str, what: str) -> bool:
    """Whether the capture holds `group` in full; says what to do where it does not.

    Args:
        what: what needs it, the subject of a sentence in the singular.
    """
    if group in opened.capture.groups:
        return True
    st.info(
        f"{what} needs the raw arrays of {group}, of which this capture keeps the summary alone: capture it again with "
        f"{capture_again(opened, group)}"
    )
    return False


def capture_again(opened: OpenCapture, group: str) -> str:
    """The command that made this capture, with the signal `group`."""
    attributes = opened.capture.attributes
    files = " ".join(shlex.quote(str(source["path"])) for source in attributes["sources"][:3])
    more = " ..." if len(attributes["sources"]) > 3 else ""
    changes = [str(from_dict(change)) for change in attributes.get("interventions", [])]
    options = [f"--sequence-length {attributes['sequence_length']}"]
    if attributes["limit_tokens"] is not None:
        options.append(f"--limit-tokens {attributes['limit_tokens']}")
    options += [f"--intervene {shlex.quote(change)}" for change in changes]
    options += [f"--signal {name}" for name in dict.fromkeys([*attributes["signals"], group])]
    return (
        f"`hydra-lab capture {attributes['model_name'] or 'MODEL'} {files}{more} --out NEW.zarr "
        f"{' '.join(options)}`"
    )

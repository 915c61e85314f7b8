"""The capture and the path use of a model on its own sample texts: made once in the background, then kept on disk."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import streamlit as st

from dashboards.shared.jobs import Job, show_job
from dashboards.shared.sources import LoadedModel, cache_directory
from hydra_lab.capture import capture_files
from hydra_lab.capture.engine import CaptureProgress
from hydra_lab.capture.path_use import measure_path_use
from hydra_lab.data.sample_texts import SAMPLES_FILE, read_sample_texts
from hydra_lab.path_use import PATH_USE_FILE, PathUse, read_path_use

_SAMPLES_FOR_PATH_USE = 4
"""Texts per domain on which path use is measured where the model brings no measurement."""


class SampleJob(Job):
    """What is made of a model's sample texts, by one thread for all sessions.

    Attributes:
        has_texts: whether the model brings sample texts at all.
        capture: the finished capture; None before.
        path_use: of the model; None before it is known, and where there are no texts to measure it on.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.has_texts = (loaded.directory / SAMPLES_FILE).is_file()
        self.capture: Path | None = None
        self.path_use = _recorded(loaded.directory)
        super().__init__(f"Sample texts of {loaded.name}", SampleJob._make)

    def _make(self) -> None:
        if not self.has_texts:
            return
        folder = cache_directory() / self._key()
        folder.mkdir(parents=True, exist_ok=True)
        self._make_capture(folder / "capture.zarr")
        if self.path_use is None:
            self._measure_path_use(folder)

    def _key(self) -> str:
        texts = hashlib.sha256((self.loaded.directory / SAMPLES_FILE).read_bytes()).hexdigest()
        return f"{self.loaded.weights_hash[:16]}-{texts[:16]}"

    def _make_capture(self, path: Path) -> None:
        if not path.exists():
            # Built under a name of its own and renamed when whole, so that two servers do not meet in one directory.
            building = path.with_name(f"building-{os.getpid()}.zarr")
            shutil.rmtree(building, ignore_errors=True)
            capture_files(
                self.loaded.model,
                self.loaded.tokenizer,
                [self.loaded.directory / SAMPLES_FILE],
                building,
                progress=self._note_capture,
            )
            if path.exists():
                shutil.rmtree(building)
            else:
                building.rename(path)
        self.capture = path

    def _note_capture(self, done: CaptureProgress) -> None:
        self.note(
            done.bytes_read / max(1, done.bytes_total),
            f"captured once for this model, {done.tokens:,} tokens",
        )

    def _measure_path_use(self, folder: Path) -> None:
        self.path_use = _recorded(folder)
        if self.path_use is None:
            passes = 0

            def note(line: str) -> None:
                nonlocal passes
                self.note(passes / 6, line)
                passes += 1

            self.path_use = measure_path_use(
                self.loaded.model,
                self.loaded.tokenizer,
                read_sample_texts(self.loaded.directory),
                num_samples=_SAMPLES_FOR_PATH_USE,
                progress=note,
            )
            (folder / PATH_USE_FILE).write_text(json.dumps(self.path_use.to_dict()), encoding="utf-8")


def _recorded(directory: Path) -> PathUse | None:
    return read_path_use(directory) if (directory / PATH_USE_FILE).is_file() else None


def sample_job(loaded: LoadedModel) -> SampleJob:
    """The job of a model; started by the first caller."""
    return _job(loaded.weights_hash, str(loaded.directory), loaded)


@st.cache_resource(max_entries=4, show_spinner=False)
def _job(weights_hash: str, directory: str, _loaded: LoadedModel) -> SampleJob:
    return SampleJob(_loaded)


def show_sample_job(job: SampleJob) -> None:
    """Draw how far `job` is; a button starts it again where it was cancelled or failed."""
    show_job(job)
    if job.cancelled or job.error:
        st.caption(f"What was made of the sample texts lies in {cache_directory()}, and can be deleted.")
        st.button("Start again", key="samples-again", on_click=_job.clear)

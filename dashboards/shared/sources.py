"""What the dashboard shows: models by name or directory, captures by their Zarr directory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import streamlit as st

import hydra_lab
from hydra_lab.capture.engine import describe_model
from hydra_lab.capture.store import Capture
from hydra_lab.loading import model_directory
from hydra_lab.training_log import LOG_FILE


@dataclass(frozen=True)
class Shown:
    """What was named on the command line or opened in the sidebar, sorted.

    Attributes:
        models: names or directories of models.
        captures: directories of captures.
        runs: directories of training runs.
    """

    models: tuple[str, ...] = ()
    captures: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()

    @classmethod
    def of_arguments(cls, arguments: Sequence[str]) -> "Shown":
        """A directory with a zarr.json is a capture, one with a training log and no model a run, everything else a
        model; nothing at all is the demo."""
        shown = cls()
        for each in arguments:
            shown = shown.with_added(each)
        return shown if arguments else cls(models=("demo",))

    def with_added(self, name: str) -> "Shown":
        """These and one more."""
        kind = _kind_of(name)
        have = getattr(self, kind)
        return self if name in have else replace(self, **{kind: (*have, name)})

    def check(self) -> None:
        """Raise ValueError where a model is none."""
        for name in self.models:
            model_directory(name)


def _kind_of(name: str) -> str:
    directory = Path(name)
    if (directory / "zarr.json").is_file():
        return "captures"
    if (directory / LOG_FILE).is_file() and not (directory / "config.json").is_file():
        return "runs"
    return "models"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is in memory, shared by all sessions; use it under `hydra_lab.locks.model_lock`.

    Attributes:
        name: as given on the command line.
        directory: where its files are.
    """

    name: str
    directory: Path
    model: Any
    tokenizer: Any

    @cached_property
    def description(self) -> dict[str, Any]:
        """Hashes, names and versions, as a capture notes them."""
        return describe_model(self.model, self.tokenizer)

    @property
    def weights_hash(self) -> str:
        return self.description["weights_sha256"]


def loaded_model(name: str) -> LoadedModel:
    """The model `name`, loaded once for all sessions and anew when its files change.

    Raises:
        ValueError: there is no such model.
    """
    directory = model_directory(name)
    changed = max((file.stat().st_mtime_ns for file in directory.glob("*.safetensors")), default=0)
    return _load(name, str(directory.resolve()), changed)


@st.cache_resource(max_entries=3, show_spinner="Loading the model …")
def _load(name: str, directory: str, changed: int) -> LoadedModel:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = hydra_lab.load(name)
    return LoadedModel(name, Path(directory), model, tokenizer)


def cache_directory() -> Path:
    """Where sample captures are kept between runs; safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hydra_lab"


def tokenizer_of(capture: Capture, shown: Shown) -> Any | None:
    """The tokenizer of one of the shown models if it is the one that made `capture`, else None."""
    for name in shown.models:
        loaded = loaded_model(name)
        if loaded.description["tokenizer_sha256"] == capture.attributes["tokenizer_sha256"]:
            return loaded.tokenizer
    return None

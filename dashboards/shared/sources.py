"""What the dashboard shows: models by name or directory, captures by their Zarr directory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import streamlit as st

import hydra_lab
from hydra_lab.capture.engine import describe_model
from hydra_lab.capture.store import Capture
from hydra_lab.loading import model_directory


@dataclass(frozen=True)
class Shown:
    """The command line's arguments, sorted.

    Attributes:
        models: names or directories of models.
        captures: directories of captures.
    """

    models: tuple[str, ...]
    captures: tuple[str, ...]

    @classmethod
    def of_arguments(cls, arguments: Sequence[str]) -> "Shown":
        """A directory with a zarr.json is a capture, everything else a model; nothing at all is the demo."""
        captures = tuple(each for each in arguments if (Path(each) / "zarr.json").is_file())
        models = tuple(each for each in arguments if each not in captures)
        return cls(models or (() if captures else ("demo",)), captures)


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

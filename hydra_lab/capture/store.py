"""A capture on disk: a Zarr directory of xarray groups that grows by whole commits.

Zarr's chunks along `sample` are as large as one commit, so a commit writes new files only; the counter `committed` of
the root group is raised last (Zarr replaces files atomically). Whatever was written after the last commit is ignored
by `open_capture` and cut off when the capture is resumed.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec

from hydra_lab.capture.layout import KINDS, Rows, Specs
from hydra_lab.taps import PATHS

FORMAT = "hydra-lab-capture"
VERSION = 1
_COUNTERS = ("committed", "num_tokens", "complete")
_NOT_COMPARED = (*_COUNTERS, "versions", "model_name", "sources")


class CaptureWriter:
    """Appends commits to a capture.

    Attributes:
        committed: samples on disk.
        num_tokens: tokens on disk.
        complete: whether the capture has all that it was to have.
        commit_size: samples per commit; only the last one may be smaller.
    """

    def __init__(self, path: Path, root: zarr.Group) -> None:
        self.path = path
        self.root = root
        attributes: dict[str, Any] = dict(root.attrs)
        self.committed: int = attributes["committed"]
        self.num_tokens: int = attributes["num_tokens"]
        self.complete: bool = attributes["complete"]
        self.commit_size: int = attributes["commit_size"]
        self._arrays = {
            (group, name): array for group, node in root.groups() for name, array in node.arrays()
        }

    @classmethod
    def create(
        cls,
        path: Path,
        specs: Specs,
        *,
        attributes: dict[str, Any],
        group_attributes: dict[str, dict[str, Any]],
        commit_size: int,
    ) -> "CaptureWriter":
        """Start an empty capture at `path`, which must not exist.

        Raises:
            ValueError: something is at `path` already.
        """
        if path.exists():
            raise ValueError(f"{path} exists already; resume it, or choose another place")
        building = path.with_name(
            path.name + ".new"
        )  # renamed when it is whole: a kill leaves no half capture
        shutil.rmtree(building, ignore_errors=True)
        root = zarr.create_group(
            building,
            attributes={
                "format": FORMAT,
                "format_version": VERSION,
                **attributes,
                "commit_size": commit_size,
                "committed": 0,
                "num_tokens": 0,
                "complete": False,
            },
        )
        for group, arrays in specs.items():
            node = root.create_group(group, attributes=group_attributes.get(group, {}))
            for name, spec in arrays.items():
                node.create_array(
                    name,
                    shape=(0, *spec.shape),
                    chunks=(commit_size, *(max(1, size) for size in spec.shape)),
                    dtype=spec.dtype,
                    fill_value=spec.fill,
                    dimension_names=("sample", *spec.dims),
                    compressors=ZstdCodec(level=3),
                )
        building.rename(path)
        return cls(path, zarr.open_group(path, mode="r+"))

    @classmethod
    def resume(cls, path: Path, attributes: dict[str, Any]) -> "CaptureWriter":
        """Reopen the capture at `path` after its last commit.

        Raises:
            ValueError: it is no capture, or was made with other settings than `attributes`; the message names them.
        """
        found = _read_attributes(path)
        differing = [
            name for name in attributes if name not in _NOT_COMPARED and found.get(name) != attributes[name]
        ]
        if differing:
            raise ValueError(f"{path} cannot be resumed: it was made with another {', '.join(differing)}")
        writer = cls(path, zarr.open_group(path, mode="r+"))
        for array in writer._arrays.values():
            array.resize((writer.committed, *array.shape[1:]))
        return writer

    def append(self, rows: Rows, num_tokens: int) -> None:
        """Write one commit: `commit_size` samples, or fewer for the last one."""
        assert not self.complete and self.committed % self.commit_size == 0
        sizes = {array.shape[0] for array in rows.values()}
        assert len(sizes) == 1 and max(sizes) <= self.commit_size
        end = self.committed + sizes.pop()
        for key, array in self._arrays.items():
            array.resize((end, *array.shape[1:]))
            array[self.committed : end] = rows[key]
        self.committed, self.num_tokens = end, self.num_tokens + num_tokens
        self._note()

    def finish(self) -> None:
        """Mark the capture complete."""
        self.complete = True
        self._note()

    def _note(self) -> None:
        self.root.attrs.update({name: getattr(self, name) for name in _COUNTERS})


class Capture(Mapping[str, xr.Dataset]):
    """A capture opened for reading: a mapping from a group's name to its dataset, read lazily.

    Attributes:
        path: the directory.
        attributes: what the capture was made from and how (see `hydra_lab.capture.engine.capture_files`).
        num_samples, num_tokens: what is committed.
        complete: False where the capture was interrupted.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.attributes = attributes
        self.num_samples: int = attributes["committed"]
        self.num_tokens: int = attributes["num_tokens"]
        self.complete: bool = attributes["complete"]

    def __getitem__(self, group: str) -> xr.Dataset:
        if group not in self.groups:
            raise KeyError(f"{self.path} has no group {group!r}; it has {', '.join(self.groups)}")
        dataset = xr.open_dataset(
            self.path, group=group, engine="zarr", consolidated=False, chunks=None, mask_and_scale=False
        ).isel(sample=slice(0, self.num_samples))
        if "layers" in dataset.attrs:
            dataset = dataset.assign_coords(layer=np.array(dataset.attrs["layers"], dtype=np.int64))
        if "path" in dataset.dims:
            dataset = dataset.assign_coords(path=list(PATHS))
        if "kind" in dataset.dims:
            dataset = dataset.assign_coords(kind=list(KINDS))
        return dataset

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups: `tokens` and the captured signals."""
        return ("tokens", *self.attributes["signals"])

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain label of each sample."""
        names = self.attributes["domains"]
        return tuple(names[code] for code in self["tokens"]["domain"].values)


def open_capture(path: str | Path) -> Capture:
    """Open a capture, complete or interrupted.

    Raises:
        ValueError: there is no capture at `path`, or one of another format version.
    """
    return Capture(Path(path), _read_attributes(Path(path)))


def _read_attributes(path: Path) -> dict[str, Any]:
    if not (path / "zarr.json").is_file():
        raise ValueError(
            f"{path} is not a capture" if path.exists() else f"{path}: no such file or directory"
        )
    attributes: dict[str, Any] = dict(zarr.open_group(path, mode="r").attrs)
    if attributes.get("format") != FORMAT:
        raise ValueError(f"{path} is not a capture")
    if attributes["format_version"] != VERSION:
        raise ValueError(
            f"{path} has format version {attributes['format_version']}; this program reads {VERSION}"
        )
    return attributes

"""A capture on disk: a Zarr directory of xarray groups that grows by whole commits.

Zarr's chunks along `sample` are as large as one commit, so every commit writes files of its own, and several processes
may write different commits at once. What is committed stands in the attributes of the root group, which are raised
last and replaced atomically: the counter `committed`, and `summary_slot`, that one of two slots that holds the summary
of the committed samples (the other one is written next). Whatever was written beyond is ignored by `open_capture` and
cut off when the capture is resumed.
"""

import importlib.util
import io
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, ZstdCodec

from hydra_lab.capture.layout import KINDS, SUMMARY, Rows, Specs
from hydra_lab.summaries import Summary, merge
from hydra_lab.taps import PATHS

FORMAT = "hydra-lab-capture"
VERSION = 2
VERSIONS_READ = (1, 2)
"""Version 1 had neither summary nor interventions, one chunk for all layers, and said nothing of threads."""

_PROGRESS = ("committed", "num_tokens", "complete", "summary_slot")
_NOT_COMPARED = (*_PROGRESS, "versions", "model_name", "sources")


class CaptureWriter:
    """Appends commits to a capture: `reserve` their room, let `write_rows` fill it, in any order and any process, and
    `commit` them in the order of their samples.

    Attributes:
        committed: samples on disk.
        num_tokens: tokens on disk.
        complete: whether the capture has all that it was to have.
        commit_size: samples per commit; only the last one may be smaller.
        summary: of what is committed; None before the first commit, and where none is kept.
    """

    def __init__(self, path: Path, root: zarr.Group) -> None:
        self.path = path
        self.root = root
        attributes: dict[str, Any] = dict(root.attrs)
        self.committed: int = attributes["committed"]
        self.num_tokens: int = attributes["num_tokens"]
        self.complete: bool = attributes["complete"]
        self.commit_size: int = attributes["commit_size"]
        self.summary_slot: str | None = attributes["summary_slot"]
        self.summary = None if self.summary_slot is None else _read_summary(root, self.summary_slot)
        self._arrays = _arrays(root)

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
        # Renamed when it is whole: a kill leaves no half capture.
        building = path.with_name(path.name + ".new")
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
                "summary_slot": None,
            },
        )
        for group, arrays in specs.items():
            node = root.create_group(group, attributes=group_attributes.get(group, {}))
            for name, spec in arrays.items():
                # One block of large arrays is read at a time, and everything of small ones.
                per_layer = "position" in spec.dims
                sizes = [
                    1 if dim == "layer" and per_layer else max(1, size)
                    for dim, size in zip(spec.dims, spec.shape, strict=True)
                ]
                node.create_array(
                    name,
                    shape=(0, *spec.shape),
                    chunks=(commit_size, *sizes),
                    dtype=spec.dtype,
                    fill_value=spec.fill,
                    dimension_names=("sample", *spec.dims),
                    compressors=_compressor(spec.dtype),
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
        attributes = {"format_version": VERSION} | attributes
        differing = [
            name for name in attributes if name not in _NOT_COMPARED and found.get(name) != attributes[name]
        ]
        if differing:
            raise ValueError(f"{path} cannot be resumed: it was made with another {', '.join(differing)}")
        writer = cls(path, zarr.open_group(path, mode="r+"))
        writer._resize(writer.committed)
        return writer

    def reserve(self, end: int) -> None:
        """Make room for samples up to `end`."""
        self._resize(end)

    def commit(self, num_samples: int, num_tokens: int, summary: Summary | None) -> None:
        """Count in the next `num_samples` samples, whose rows are written, and the summary of them."""
        assert (
            not self.complete and self.committed % self.commit_size == 0 and num_samples <= self.commit_size
        )
        if summary is not None:
            self.summary = summary if self.summary is None else merge(self.summary, summary)
            self.summary_slot = "b" if self.summary_slot == "a" else "a"
            _write_summary(self.root, self.summary_slot, self.summary)
        self.committed, self.num_tokens = self.committed + num_samples, self.num_tokens + num_tokens
        self._note()

    def finish(self) -> None:
        """Mark the capture complete."""
        self.complete = True
        self._note()

    def _resize(self, num_samples: int) -> None:
        for array in self._arrays.values():
            if array.shape[0] != num_samples:
                array.resize((num_samples, *array.shape[1:]))

    def _note(self) -> None:
        self.root.attrs.update({name: getattr(self, name) for name in _PROGRESS})


def _compressor(dtype: str) -> BytesBytesCodec:
    """The smallest of what was measured at no more than 4% of a capture's time.

    Demo, 131,072 tokens of source code, bytes per token of all arrays and share of the time: zstd at level 3 283.4, 0.6%;
    at 9 276.0, 1.8%; bytes shuffled and zstd at 3 268.4, 1.5%, at 5 247.9, 3.4%, at 9 239.1, 55%. Integers are smaller
    without the shuffle: 245.4 in all.
    """
    if np.dtype(dtype).kind == "f":
        return BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=np.dtype(dtype).itemsize)
    return ZstdCodec(level=9)


def write_rows(path: Path, first_sample: int, rows: Rows) -> None:
    """Write one commit's rows, all arrays of the capture at `path`, which have room for them."""
    arrays = _arrays(zarr.open_group(path, mode="r+"))
    assert arrays.keys() == rows.keys()
    for key, array in arrays.items():
        array[first_sample : first_sample + len(rows[key])] = rows[key]


def _arrays(root: zarr.Group) -> dict[tuple[str, str], zarr.Array]:
    """The raw arrays by (group, name)."""
    return {
        (group, name): array
        for group, node in root.groups()
        if group != SUMMARY
        for name, array in node.arrays()
    }


def _write_summary(root: zarr.Group, slot: str, summary: Summary) -> None:
    """Write a slot: one array that holds the bytes of an npz file, in one chunk, so that a reader finds it whole."""
    packed = io.BytesIO()
    named = {f"{group}/{name}": array for group, arrays in summary.items() for name, array in arrays.items()}
    np.savez(packed, **named)
    data = np.frombuffer(packed.getbuffer(), dtype=np.uint8)
    slots = root.require_group(SUMMARY)
    array = slots.get(slot)
    if not isinstance(array, zarr.Array) or array.shape != data.shape:
        array = slots.create_array(
            slot,
            shape=data.shape,
            dtype=data.dtype,
            chunks=data.shape,
            compressors=ZstdCodec(level=1),
            overwrite=True,
        )
    array[...] = data


def _read_summary(root: zarr.Group, slot: str) -> Summary:
    array = root[f"{SUMMARY}/{slot}"]
    assert isinstance(array, zarr.Array)
    summary: Summary = {}
    with np.load(io.BytesIO(np.asarray(array[...]).tobytes()), allow_pickle=False) as packed:
        for key in packed.files:
            group, name = key.split("/")
            summary.setdefault(group, {})[name] = packed[key]
    return summary


class Capture(Mapping[str, xr.Dataset]):
    """A capture opened for reading: a mapping from a group's name to its dataset, read lazily (in Dask's chunks where
    dask is installed, the extra `scale`).

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
        chunks = {} if importlib.util.find_spec("dask") else None
        dataset = xr.open_dataset(
            self.path, group=group, engine="zarr", consolidated=False, chunks=chunks, mask_and_scale=False
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
        """Names of the groups that are kept in full: `tokens` and the captured signals."""
        return ("tokens", *(name for name in self.attributes["signals"] if name != SUMMARY))

    @property
    def summary(self) -> Summary:
        """Counts, norms, histograms and top contexts of everything that is committed by now (`hydra_lab.summaries`),
        read anew at each call.

        Raises:
            ValueError: the capture keeps no summary, or nothing is committed yet.
        """
        if SUMMARY not in self.attributes["signals"]:
            raise ValueError(f"{self.path} keeps no summary: it was captured without the signal {SUMMARY!r}")
        root = zarr.open_group(self.path, mode="r")
        if root.attrs["summary_slot"] is None:
            raise ValueError(f"{self.path} has no summary yet: nothing is committed")
        return _read_summary(root, str(root.attrs["summary_slot"]))

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
    if attributes["format_version"] not in VERSIONS_READ:
        raise ValueError(
            f"{path} has format version {attributes['format_version']}; this program reads "
            f"{' and '.join(map(str, VERSIONS_READ))}"
        )
    return attributes

"""Capture the decisions of a model over files of any size, one process."""

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hydra_lab.capture.layout import (
    Rows,
    Specs,
    chunk_size_of,
    layers_of,
    rows_of,
    signals_of,
    specs_of,
    taps_of,
)
from hydra_lab.capture.record import record
from hydra_lab.capture.sources import Inspection, Source, Window, find_sources, inspect, windows
from hydra_lab.capture.store import Capture, CaptureWriter, open_capture
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.ops.backend import current_backends, default_backend

COMMIT_TOKENS = 1 << 15
"""Tokens per commit, about: the work that a kill can lose, and the size of the arrays' chunks."""


class CaptureProgress(NamedTuple):
    """How far a capture is.

    Attributes:
        samples, tokens: captured so far (earlier runs included), committed or not.
        bytes_read, bytes_total: of the input.
    """

    samples: int
    tokens: int
    bytes_read: int
    bytes_total: int


def capture_files(
    model: HydraForCausalLM,
    tokenizer: Any,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    batch_size: int = 8,
    sequence_length: int = 512,
    signals: Sequence[str] | None = None,
    resume: bool = False,
    limit_tokens: int | None = None,
    progress: bool | Callable[[CaptureProgress], None] = True,
) -> Capture:
    """Record the model's decisions on all texts of `paths` into a capture at `out`.

    Each text is cut into windows of `sequence_length` tokens, every window a sample that the model sees on its own
    (the last window of a text may be shorter). The arrays and their dims are listed in `hydra_lab.capture.layout`;
    they do not depend on `batch_size`, but for the rounding of sums whose order depends on the shape of the batch.
    The work is committed every 32,768 tokens or so; after a kill, `resume=True` goes on from the last commit.

    Attributes of the result: format, format_version, model_name, model_class, config (a dict), config_sha256,
    weights_sha256, tokenizer_name, tokenizer_sha256, backend, dtype, versions, sequence_length, signals,
    limit_tokens, domains (labels that `tokens.domain` indexes), sources (path, sha256, bytes), sources_sha256,
    commit_size, committed, num_tokens, complete. Groups have `layers` and, where they have chunks, `chunk_size`;
    `memory` has `num_keys`, `attention` `window` and `block_size`.

    Args:
        paths: text files, JSONL files (`text` and optionally `domain` per line), or directories (see
            `hydra_lab.capture.sources.find_sources`).
        out: directory to make, usually called `<name>.zarr`.
        batch_size: windows per forward pass.
        signals: groups to capture besides `tokens`; None for all that the model has.
        resume: go on with `out` if it is there; start it if not.
        limit_tokens: stop after this many tokens.
        progress: True for a progress bar on standard error, or a function called after each batch.

    Raises:
        ValueError: one line that names the argument, or the file and line, that is wrong.
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if limit_tokens is not None and limit_tokens < 1:
        raise ValueError(f"limit_tokens must be at least 1, got {limit_tokens}")
    out = Path(out)
    groups = signals_of(model.config, signals)
    if out.exists() and not resume:
        raise ValueError(f"{out} exists already; resume it, or choose another place")
    sources = find_sources(paths)
    inspection = inspect(sources)
    attributes = describe_model(model, tokenizer) | {
        "sequence_length": sequence_length,
        "signals": list(groups),
        "limit_tokens": limit_tokens,
        "domains": list(inspection.domains),
        **_describe_sources(sources, inspection),
    }
    job = _Job(
        model,
        groups,
        specs_of(model.config, groups, sequence_length, len(inspection.domains)),
        inspection.domains,
    )
    if out.exists():
        writer = CaptureWriter.resume(out, attributes)
    else:
        writer = CaptureWriter.create(
            out,
            job.specs,
            attributes=attributes,
            group_attributes={group: _group_attributes(model, group) for group in groups},
            commit_size=max(1, COMMIT_TOKENS // sequence_length),
        )
    if not writer.complete:
        samples = windows(sources, tokenizer, sequence_length, limit_tokens)
        with _reporter(progress) as report:
            _run(job, writer, samples, batch_size, sum(inspection.sizes), report)
    return open_capture(out)


@dataclass(frozen=True)
class _Job:
    """What stays the same from batch to batch."""

    model: HydraForCausalLM
    groups: tuple[str, ...]
    specs: Specs
    domains: tuple[str, ...]

    def rows(self, batch: list[Window]) -> Rows:
        """Run the model on a batch of windows."""
        size = max(len(window.ids) for window in batch)
        ids = torch.zeros(len(batch), size, dtype=torch.long)
        mask = torch.zeros(len(batch), size, dtype=torch.long)
        for row, window in enumerate(batch):
            ids[row, : len(window.ids)] = torch.from_numpy(window.ids)
            mask[row, : len(window.ids)] = 1
        ids = ids.to(self.model.device)
        recording = record(
            self.model, ids, mask, taps=taps_of(self.groups), contributions="paths" in self.groups
        )
        rows = rows_of(recording, ids, self.specs, self.model.config)
        for name, values in (
            ("domain", [self.domains.index(window.domain) for window in batch]),
            ("document", [window.document for window in batch]),
            ("offset", [window.offset for window in batch]),
        ):
            rows["tokens", name] = np.array(values, dtype=self.specs["tokens"][name].dtype)
        return rows


def _run(
    job: _Job,
    writer: CaptureWriter,
    samples: Iterator[Window],
    batch_size: int,
    bytes_total: int,
    report: Callable[[CaptureProgress], None],
) -> None:
    """Capture the samples that `writer` does not have yet. What is committed does not depend on the batches: samples
    wait until a commit is full."""
    num_samples, num_tokens = writer.committed, writer.num_tokens
    held: list[Rows] = []
    remaining = islice(samples, writer.committed, None)

    def commit(size: int) -> None:
        nonlocal held
        merged = {key: np.concatenate([rows[key] for rows in held]) for key in held[0]}
        first = {key: array[:size] for key, array in merged.items()}
        writer.append(first, int(first["tokens", "mask"].sum()))
        held = [{key: array[size:] for key, array in merged.items()}]

    while batch := list(islice(remaining, batch_size)):
        held.append(job.rows(batch))
        num_samples += len(batch)
        num_tokens += sum(len(window.ids) for window in batch)
        while num_samples - writer.committed >= writer.commit_size:
            commit(writer.commit_size)
        report(CaptureProgress(num_samples, num_tokens, batch[-1].bytes_read, bytes_total))
    if num_samples > writer.committed:
        commit(num_samples - writer.committed)
    writer.finish()


def describe_model(model: HydraForCausalLM, tokenizer: Any) -> dict[str, Any]:
    """Names, hashes and versions that say which model, tokenizer and program made a capture."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    config = json.loads(json.dumps(config, default=str))
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "model_name": model.name_or_path,
        "model_class": type(model).__name__,
        "config": config,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
        "tokenizer_name": tokenizer.name_or_path,
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "backend": _backends(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("hydra-lab", "torch", "transformers", "numpy", "xarray", "zarr")
            },
        },
    }


def _backends(model: HydraForCausalLM) -> str:
    """The backends that the model's operations run on, such as "torch" or "torch, triton"."""
    with default_backend(cast(Any, model.config.ops_backend)):
        return ", ".join(sorted(set(current_backends(next(model.parameters())).values())))


def _describe_sources(sources: Sequence[Source], inspection: Inspection) -> dict[str, Any]:
    files = list(zip(inspection.digests, inspection.sizes, sources, strict=True))
    return {
        "sources": [{"path": str(s.path), "sha256": digest, "bytes": size} for digest, size, s in files],
        "sources_sha256": hashlib.sha256(
            json.dumps([[digest, s.is_jsonl, s.domain] for digest, _, s in files]).encode()
        ).hexdigest(),
    }


def _group_attributes(model: HydraForCausalLM, group: str) -> dict[str, Any]:
    config = model.config
    attributes: dict[str, Any] = {"layers": layers_of(config, group)}
    chunk_size = chunk_size_of(config, group)
    if chunk_size is not None:
        attributes["chunk_size"] = chunk_size
    if group == "memory":
        attributes["num_keys"] = list(config.memory_num_keys)
    if group == "attention":
        attributes |= {"window": config.attention_window, "block_size": config.attention_block_size}
    return attributes


@contextmanager
def _reporter(
    progress: bool | Callable[[CaptureProgress], None],
) -> Iterator[Callable[[CaptureProgress], None]]:
    if callable(progress):
        yield progress
        return
    columns = (TextColumn("capture"), BarColumn(), TextColumn("{task.fields[tokens]:,} tokens"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not progress
    ) as bar:
        task = bar.add_task("capture", total=None, tokens=0)

        def update(done: CaptureProgress) -> None:
            bar.update(task, total=done.bytes_total, completed=done.bytes_read, tokens=done.tokens)

        yield update

"""Capture the decisions of a model over files of any size, in one process or on a cluster."""

import errno
import hashlib
import json
import os
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hydra_lab.capture.layout import (
    REQUESTED_SIGNALS,
    SIGNALS,
    SUMMARY,
    chunk_size_of,
    layers_of,
    signals_of,
    specs_of,
)
from hydra_lab.capture.sources import Inspection, Source, Window, find_sources, inspect, windows
from hydra_lab.capture.store import Capture, CaptureWriter, open_capture
from hydra_lab.capture.work import Commit, Job, commits, perform
from hydra_lab.interventions import Intervention, in_force, intervened
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.ops.backend import current_backends, default_backend
from hydra_lab.summaries import Summary

COMMIT_TOKENS = 1 << 15
"""Tokens per commit, about: the work that a kill can lose, and the size of the arrays' chunks."""

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    interventions: Sequence[str | Intervention] = (),
    workers: int | None = None,
    scheduler: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    limit_tokens: int | None = None,
    progress: bool | Callable[[CaptureProgress], None] = True,
) -> Capture:
    """Record the model's decisions on all texts of `paths` into a capture at `out`.

    Each text is cut into windows of `sequence_length` tokens, every window a sample that the model sees on its own
    (the last window of a text may be shorter). The arrays and their dims are listed in `hydra_lab.capture.layout`.
    The work is committed every 32,768 tokens or so; after a kill, `resume=True` goes on from the last commit, in one
    process or on a cluster, whichever began it.

    **What is identical.** One process and any number of workers write the same bytes, whatever the order in which
    commits end, because a commit's batches are cut within it and run by one process with `threads` threads. That
    rests on one build of torch on one kind of processor, and on one `batch_size` and `threads`: with others,
    decisions stay what they are but for ties, and floats may differ in their last bits, because the order of a sum
    depends on the shape of a batch and on how many threads share it.

    Attributes of the result: format, format_version, model_name, model_class, config (a dict), config_sha256,
    weights_sha256, tokenizer_name, tokenizer_sha256, backend, dtype, threads, versions, sequence_length, signals,
    limit_tokens, interventions (dicts), domains (labels that `tokens.domain` indexes), sources (path, sha256, bytes),
    sources_sha256, commit_size, committed, num_tokens, complete, summary_slot. Groups have `layers` and, where they
    have chunks, `chunk_size`; `memory` has `num_keys`, `attention` `window` and `block_size`.

    Args:
        paths: text files, JSONL files (`text` and optionally `domain` per line), or directories (see
            `hydra_lab.capture.sources.find_sources`).
        out: directory to make, usually called `<name>.zarr`.
        batch_size: windows per forward pass.
        signals: groups to keep besides `tokens`, and "summary" for the running summary of all groups; None for all of
            these. "summary" alone keeps no raw array but the tokens.
        interventions: changes that the model runs with (`hydra_lab.interventions`), besides those that are in force on
            it already, which do not travel to workers.
        workers: run on this many processes of this machine (needs the extra `scale`). A script that does so starts
            under `if __name__ == "__main__":`.
        scheduler: or on the Dask cluster at this address, whose workers see the file system of `out`.
        threads: CPU threads of a forward pass; None for those that the resumed capture used, else for torch's
            setting in one process, and on a cluster for a worker's share of its cores.
        resume: go on with `out` if it is there; start it if not.
        limit_tokens: stop after this many tokens.
        progress: True for a progress bar on standard error, or a function called after each batch (on a cluster,
            each commit).

    Raises:
        ValueError: one line that names the argument, or the file and line, that is wrong.
        OSError: one line, where the disk is full or workers keep dying. What is committed is kept.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("sequence_length", sequence_length),
        ("limit_tokens", limit_tokens),
        ("workers", workers),
        ("threads", threads),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if workers is not None and scheduler is not None:
        raise ValueError("workers starts a cluster and scheduler names one: give one of them")
    with intervened(model, *interventions) as changes:
        in_all = in_force(model)
    out = Path(out)
    groups, summarized = _split_signals(model, signals)
    if out.exists() and not resume:
        raise ValueError(f"{out} exists already; resume it, or choose another place")
    sources = find_sources(paths)
    inspection = inspect(sources)
    if threads is None:
        threads = _default_threads(out, workers, scheduler)
    attributes = describe_model(model, tokenizer) | {
        "threads": threads,
        "sequence_length": sequence_length,
        "signals": [*groups, SUMMARY] if summarized else list(groups),
        "limit_tokens": limit_tokens,
        "interventions": [json.loads(json.dumps(change.to_dict())) for change in in_all],
        "domains": list(inspection.domains),
        **_describe_sources(sources, inspection),
    }
    recorded = signals_of(model.config, None) if summarized else groups
    job = Job(
        path=out.resolve(),
        specs=specs_of(model.config, recorded, sequence_length, len(inspection.domains)),
        kept=("tokens", *groups),
        summarized=summarized,
        config=attributes["config"],
        interventions=changes,
        domains=inspection.domains,
        batch_size=batch_size,
        threads=threads,
    )
    with _full_disk_explained(out):
        writer = _open_writer(model, job, attributes, out, sequence_length)
        if not writer.complete:
            samples = _unchanged(windows(sources, tokenizer, sequence_length, limit_tokens))
            todo = commits(samples, writer.committed, writer.commit_size)
            with _reporter(progress) as report, ExitStack() as stack:
                tally = _Tally(writer.committed, writer.num_tokens, sum(inspection.sizes), report)
                if workers is None and scheduler is None:
                    done = _perform_here(job, model, todo, writer.reserve, tally.add)
                else:
                    from hydra_lab.capture.cluster import on_cluster  # needs dask, the extra `scale`

                    perform_there = stack.enter_context(on_cluster(model, job, workers, scheduler))
                    done = perform_there(todo, writer.reserve, tally.add)
                for commit, summary in stack.enter_context(closing(done)):
                    writer.commit(len(commit.windows), commit.num_tokens, summary)
            writer.finish()
    return open_capture(out)


def _split_signals(model: HydraForCausalLM, signals: Sequence[str] | None) -> tuple[tuple[str, ...], bool]:
    """The groups to keep in full, and whether there is a summary."""
    if signals is None:
        return signals_of(model.config, None), True
    known = (*SIGNALS, *REQUESTED_SIGNALS, SUMMARY)
    for name in signals:
        if name not in known:
            raise ValueError(f"signal {name!r} is not one of {', '.join(known)}")
    groups = [name for name in signals if name != SUMMARY]
    return signals_of(model.config, groups), SUMMARY in signals


def _default_threads(out: Path, workers: int | None, scheduler: str | None) -> int:
    if out.exists():
        return open_capture(out).attributes.get("threads", 1)
    if scheduler is not None:
        return 1
    if workers is not None:
        return max(1, len(os.sched_getaffinity(0)) // workers)
    return torch.get_num_threads()


def _open_writer(
    model: HydraForCausalLM, job: Job, attributes: dict[str, Any], out: Path, sequence_length: int
) -> CaptureWriter:
    if out.exists():
        return CaptureWriter.resume(out, attributes)
    return CaptureWriter.create(
        out,
        {group: job.specs[group] for group in job.kept},
        attributes=attributes,
        group_attributes={group: _group_attributes(model, group) for group in job.kept if group != "tokens"},
        commit_size=max(1, COMMIT_TOKENS // sequence_length),
    )


def _perform_here(
    job: Job,
    model: HydraForCausalLM,
    todo: Iterable[Commit],
    reserve: Callable[[int], None],
    seen: Callable[[Sequence[Window]], None],
) -> Generator[tuple[Commit, Summary | None]]:
    """Each commit and its summary, when its rows are written."""
    for commit in todo:
        reserve(commit.end)
        yield commit, perform(job, model, commit, after_batch=seen)


def _unchanged(samples: Iterator[Window]) -> Iterator[Window]:
    """`samples`, of which `inspect` has read every line once: one that cannot be read now has changed since."""
    try:
        yield from samples
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error}; the file changed while it was captured: put it back as it was, and resume"
        ) from error


@contextmanager
def _full_disk_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        kept = f"; its {open_capture(out).num_samples:,} committed samples are kept" if out.exists() else ""
        reason = os.strerror(error.errno).lower()
        raise OSError(f"{out} cannot grow: {reason}{kept}; make room, and resume") from error


class _Tally:
    """Counts the windows that the model has seen, for the progress bar."""

    def __init__(
        self, samples: int, tokens: int, bytes_total: int, report: Callable[[CaptureProgress], None]
    ) -> None:
        self._now = CaptureProgress(samples, tokens, 0, bytes_total)
        self._report = report

    def add(self, batch: Sequence[Window]) -> None:
        now = self._now
        self._now = now._replace(
            samples=now.samples + len(batch),
            tokens=now.tokens + sum(len(window.ids) for window in batch),
            bytes_read=max(now.bytes_read, *(window.bytes_read for window in batch)),
        )
        self._report(self._now)


def describe_model(model: HydraForCausalLM, tokenizer: Any) -> dict[str, Any]:
    """Names, hashes and versions that say which model, tokenizer and program made a capture."""
    config = model.config.to_dict()
    # What `save_pretrained` writes into it says nothing of the model that is not said below.
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype"):
        config.pop(name, None)
    config = json.loads(json.dumps(config, default=str))
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "model_name": model.name_or_path,
        "model_class": type(model).__name__,
        "config": config,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "weights_sha256": hash_weights(model),
        "tokenizer_name": tokenizer.name_or_path,
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "backend": backends_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("hydra-lab", "torch", "transformers", "numpy", "xarray", "zarr")
            },
        },
    }


def hash_weights(model: HydraForCausalLM) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def backends_of(model: HydraForCausalLM) -> str:
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

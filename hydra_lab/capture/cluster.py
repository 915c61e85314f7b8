"""A capture's commits on a Dask cluster: workers run and write them in any order, the client counts them in in order.

The client reads and tokenizes the text once and keeps a bounded number of commits under way. Each worker process
loads the model once, from safetensors that lie beside the capture for as long as it runs, and writes its commits'
regions of the Zarr arrays itself; only their summaries come back. Dask gives the commit of a worker that dies to
another one: it writes the same bytes to the same place, and so does a worker that was thought dead and is not.
"""

import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from distributed import Client, Future, KilledWorker, LocalCluster
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from hydra_lab.capture.engine import backends_of, hash_weights
from hydra_lab.capture.sources import Window
from hydra_lab.capture.work import Commit, Job, perform
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.summaries import Summary

COMMITS_AHEAD = 3
"""Commits under way per worker: one that runs, and enough behind it that a slow one holds nobody up."""

WAIT_SECONDS = 60
"""How long to wait for the scheduler, and for its first worker."""

_WORKER_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_MMAP_THRESHOLD_": str(4 << 30)}
"""Dask has glibc give large buffers back after each forward pass, which then faults them in again."""

_SAME_VERSIONS = ("hydra_lab", "torch", "transformers", "numpy", "zarr")


@dataclass(frozen=True)
class StoredModel:
    """A model as workers find it.

    Attributes:
        directory: what `save_pretrained` wrote.
        dtype: of the weights.
        device: type of the device to run on.
        weights_sha256, backend: what the worker's model must have, as the capture says.
    """

    directory: Path
    dtype: torch.dtype
    device: str
    weights_sha256: str
    backend: str


class PerformAll(Protocol):
    """Yields each commit, in order, and its summary when its rows are written."""

    def __call__(
        self,
        todo: Iterator[Commit],
        reserve: Callable[[int], None],
        seen: Callable[[Sequence[Window]], None],
    ) -> Generator[tuple[Commit, Summary | None]]: ...


@contextmanager
def on_cluster(
    model: HydraForCausalLM, job: Job, workers: int | None, scheduler: str | None
) -> Iterator[PerformAll]:
    """A cluster that has `model`: `workers` processes of this machine, or those of the Dask scheduler at an address.

    Raises:
        ValueError: the model cannot be sent to another process as it is, or the cluster's workers run other versions.
        OSError: there is no scheduler at the address, or it has no worker.
    """
    _check_portable(model)
    with ExitStack() as stack:
        directory = job.path.with_name(f".{job.path.name}.model-for-workers")
        stored = stack.enter_context(_stored(model, directory))
        if scheduler is None:
            start: Any = LocalCluster  # its parameters are typed by their defaults
            cluster = start(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                scheduler_kwargs={
                    "dashboard_address": "127.0.0.1:0"
                },  # else it wants one port, which may be taken
                memory_limit=None,
                silence_logs=logging.CRITICAL,  # a death is retried, and a failure is raised here
                env=_WORKER_ENVIRONMENT,
            )
            stack.enter_context(cluster)
        else:
            cluster = scheduler
        client: Any = stack.enter_context(Client(cluster, timeout=WAIT_SECONDS, set_as_default=False))
        client.wait_for_workers(1, timeout=WAIT_SECONDS)
        if scheduler is not None:
            _check_versions(client, scheduler)

        def perform_all(
            todo: Iterator[Commit],
            reserve: Callable[[int], None],
            seen: Callable[[Sequence[Window]], None],
        ) -> Generator[tuple[Commit, Summary | None]]:
            return _in_order(client, job, stored, todo, reserve, seen)

        yield perform_all


def _in_order(
    client: Any,
    job: Job,
    stored: StoredModel,
    todo: Iterator[Commit],
    reserve: Callable[[int], None],
    seen: Callable[[Sequence[Window]], None],
) -> Generator[tuple[Commit, Summary | None]]:
    underway: deque[tuple[Commit, Future]] = deque()
    try:
        while True:
            bound = COMMITS_AHEAD * max(1, len(client.nthreads()))
            while len(underway) < bound and (commit := next(todo, None)) is not None:
                reserve(commit.end)
                underway.append((commit, client.submit(_perform, job, stored, commit, pure=False)))
            if not underway:
                return
            commit, future = underway.popleft()
            try:
                summary = future.result()
            except KilledWorker as error:
                raise OSError(
                    f"samples {commit.first_sample} to {commit.end - 1} killed every worker that ran them "
                    "(a machine's memory may be full: try fewer workers or a smaller batch_size)"
                ) from error
            seen(commit.windows)
            yield commit, summary
    finally:
        client.cancel([future for _, future in underway])


def _check_portable(model: HydraForCausalLM) -> None:
    """Weights and configuration travel; what was put on the model besides does not."""
    hooked = [
        name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]
    if hooked:
        raise ValueError(
            f"the model has hooks on {', '.join(hooked)}, which do not travel to workers: "
            "name what they do as interventions, or capture in one process"
        )
    scaled = {
        path for block in model.model.blocks for path, scale in block.path_scale.items() if scale != 1.0
    }
    if scaled:
        raise ValueError(
            f"set_path_scale holds for {', '.join(sorted(scaled))}, and does not travel to workers"
        )


@contextmanager
def _stored(model: HydraForCausalLM, directory: Path) -> Iterator[StoredModel]:
    """The model in `directory`, removed again afterwards."""
    shutil.rmtree(directory, ignore_errors=True)  # left by a capture that was killed
    try:
        try:
            with _no_bars():
                model.save_pretrained(directory)
        except SafetensorError as error:
            raise OSError(f"{directory}: the model cannot be written for the workers: {error}") from error
        yield StoredModel(directory, model.dtype, model.device.type, hash_weights(model), backends_of(model))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _check_versions(client: Client, scheduler: str) -> None:
    versions: Any = client.get_versions(packages=list(_SAME_VERSIONS))
    ours = versions["client"]["packages"]
    for address, theirs in versions["workers"].items():
        for name in _SAME_VERSIONS:
            if theirs["packages"].get(name) != ours[name]:
                raise ValueError(
                    f"worker {address} of {scheduler} has {name} {theirs['packages'].get(name)}, this program "
                    f"{ours[name]}: results would not be identical"
                )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bars, one per file; a capture has one of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


# --- in the worker -----------------------------------------------------------------------------------------------

_loading = threading.Lock()
_loaded: tuple[StoredModel, HydraForCausalLM] | None = None
"""The one model that this process holds."""


def _perform(job: Job, stored: StoredModel, commit: Commit) -> Summary | None:
    return perform(job, _load(stored), commit)


def _load(stored: StoredModel) -> HydraForCausalLM:
    global _loaded
    with _loading:
        if _loaded is None or _loaded[0] != stored:
            _loaded = None  # before the next one needs its memory
            if not (stored.directory / "config.json").is_file():
                raise ValueError(f"a worker of process {os.getpid()} does not see {stored.directory}")
            with _no_bars():
                model: HydraForCausalLM = HydraForCausalLM.from_pretrained(
                    stored.directory, dtype=stored.dtype, local_files_only=True
                )
            model = cast(Any, model).to(stored.device).eval()
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()  # not mapped to a file that goes when the capture is done
            if hash_weights(model) != stored.weights_sha256:
                raise ValueError(f"{stored.directory} does not hold the weights that are captured")
            if backends_of(model) != stored.backend:
                raise ValueError(
                    f"a worker would run {backends_of(model)}, the capture says {stored.backend}"
                )
            _loaded = stored, model
        return _loaded[1]

"""The unit of a capture's work, one commit: what it needs, and what any process makes of it.

A commit is run and written by one process from beginning to end. Its batches are cut within the commit, so they do
not depend on who runs it, on what ran before, or on the order in which commits end.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hydra_lab.capture.layout import Rows, Specs, rows_of, taps_of
from hydra_lab.capture.record import record
from hydra_lab.capture.sources import Window
from hydra_lab.capture.store import write_rows
from hydra_lab.interventions import Intervention, intervened
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.summaries import Summary, summarize


class Commit(NamedTuple):
    """Samples that are committed together.

    Attributes:
        first_sample: index of the first of them in the capture.
        windows: their tokens.
    """

    first_sample: int
    windows: tuple[Window, ...]

    @property
    def end(self) -> int:
        """Index behind the last sample."""
        return self.first_sample + len(self.windows)

    @property
    def num_tokens(self) -> int:
        return sum(len(window.ids) for window in self.windows)


@dataclass(frozen=True)
class Job:
    """What stays the same from commit to commit; it travels with every task, so it is small.

    Attributes:
        path: the capture.
        specs: arrays of every group that is recorded.
        kept: groups that are written in full.
        summarized: whether commits are summarized.
        config: of the model, as a dict.
        interventions: changes that the model runs with.
        domains: labels that `tokens.domain` indexes.
        batch_size: windows per forward pass.
        threads: CPU threads of a forward pass.
    """

    path: Path
    specs: Specs
    kept: tuple[str, ...]
    summarized: bool
    config: dict[str, Any]
    interventions: tuple[Intervention, ...]
    domains: tuple[str, ...]
    batch_size: int
    threads: int


def commits(windows: Iterable[Window], first_sample: int, size: int) -> Iterator[Commit]:
    """Cut the windows from `first_sample` on into commits of `size` samples; the last one may be smaller."""
    remaining = islice(windows, first_sample, None)
    while batch := tuple(islice(remaining, size)):
        yield Commit(first_sample, batch)
        first_sample += size


def perform(
    job: Job,
    model: HydraForCausalLM,
    commit: Commit,
    after_batch: Callable[[list[Window]], None] = lambda _batch: None,
) -> Summary | None:
    """Run the model on a commit and write its rows, for which the capture's arrays must be long enough already.

    Doing it twice, or twice at once, writes the same bytes twice.

    Args:
        after_batch: called with each batch that the model has seen.

    Returns:
        The commit's summary, where one is wanted.
    """
    rows = _rows(job, model, commit, after_batch)
    write_rows(
        job.path, commit.first_sample, {key: array for key, array in rows.items() if key[0] in job.kept}
    )
    if not job.summarized:
        return None
    return summarize(rows, config=job.config, domains=job.domains, first_sample=commit.first_sample)


def _rows(
    job: Job, model: HydraForCausalLM, commit: Commit, after_batch: Callable[[list[Window]], None]
) -> Rows:
    """Rows of all groups. Windows of like length share a batch, so that little is computed for padding."""
    order = sorted(range(len(commit.windows)), key=lambda row: len(commit.windows[row].ids))
    parts: list[Rows] = []
    with _threads(job.threads):
        for start in range(0, len(order), job.batch_size):
            batch = [commit.windows[row] for row in order[start : start + job.batch_size]]
            parts.append(_batch_rows(job, model, batch))
            after_batch(batch)
    places = np.argsort(order)
    return {key: np.concatenate([part[key] for part in parts])[places] for key in parts[0]}


def _batch_rows(job: Job, model: HydraForCausalLM, batch: list[Window]) -> Rows:
    size = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), size, dtype=torch.long)
    mask = torch.zeros(len(batch), size, dtype=torch.long)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.from_numpy(window.ids)
        mask[row, : len(window.ids)] = 1
    ids = ids.to(model.device)
    groups = [group for group in job.specs if group != "tokens"]
    with intervened(model, *job.interventions):  # which holds the model's lock
        recording = record(model, ids, mask, taps=taps_of(groups), contributions="paths" in groups)
    rows = rows_of(recording, ids, job.specs, model.config)
    for name, values in (
        ("domain", [job.domains.index(window.domain) for window in batch]),
        ("document", [window.document for window in batch]),
        ("offset", [window.offset for window in batch]),
    ):
        rows["tokens", name] = np.array(values, dtype=job.specs["tokens"][name].dtype)
    return rows


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within the context, this thread's forward passes use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

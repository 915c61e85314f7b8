"""Long work in a thread of its own: a progress bar, a cancel button, one job for all visitors who ask for the same."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

import streamlit as st


class Cancelled(Exception):
    """A visitor cancelled the job."""


class Job:
    """One piece of work.

    Attributes:
        fraction, line: how far it is, 0..1 and in words.
        result: what the work returned; None before.
        error: one sentence if it failed, else "".
        cancelled: whether it was cancelled.
    """

    def __init__(self, name: str, work: "Callable[[Any], Any]") -> None:
        """Start `work(job)`; it calls `job.note` now and then, and stops there when it is cancelled."""
        self.name, self._work = name, work
        self.fraction, self.line, self.error = 0.0, "waiting", ""
        self.result: Any = None
        self.cancelled = False
        self.thread = threading.Thread(target=self._run, daemon=True, name=name)
        self.thread.start()

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    def note(self, fraction: float, line: str) -> None:
        """Say how far the work is.

        Raises:
            Cancelled: a visitor asked for it; let it pass.
        """
        self.fraction, self.line = min(1.0, max(0.0, fraction)), line
        if self.cancelled:
            raise Cancelled

    def cancel(self) -> None:
        """Stop the work at its next note."""
        self.cancelled = True

    def _run(self) -> None:
        try:
            self.result = self._work(self)
            self.cancelled = False  # it came too late
        except Cancelled:
            self.line = "cancelled"
        except (OSError, ValueError) as error:
            self.error = str(error)
        except BaseException:
            self.error = "an internal error, which the terminal of the server shows"
            raise


class _Jobs:
    """The jobs of this server by what they compute; the oldest finished ones are forgotten."""

    MOST = 32

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs: dict[Hashable, Job] = {}

    def find(self, key: Hashable) -> Job | None:
        with self.lock:
            return self.jobs.get(key)

    def start(self, key: Hashable, name: str, work: Callable[[Job], Any]) -> None:
        with self.lock:
            job = self.jobs.get(key)
            if job is None or (not job.running and (job.error or job.cancelled)):
                finished = [each for each, old in self.jobs.items() if not old.running]
                for old in finished[: max(0, len(self.jobs) - self.MOST)]:
                    del self.jobs[old]
                self.jobs[key] = Job(name, work)


@st.cache_resource(show_spinner=False)
def _jobs() -> _Jobs:
    return _Jobs()


def find_job(key: Hashable) -> Job | None:
    """The job that computes `key`, if it was started."""
    return _jobs().find(key)


def start_job(key: Hashable, name: str, work: Callable[[Job], Any]) -> None:
    """Start the job that computes `key`, unless it is running or done; for callbacks.

    Args:
        key: everything that the result depends on.
        name: of the thread, and of the job to its visitors.
        work: gets the job, and returns the result; it must not draw.
    """
    _jobs().start(key, name, work)


@st.fragment(run_every=0.5)
def show_job(job: Job) -> None:
    """A progress bar that follows `job` with a button that cancels it, and one new run of the page when it is done."""
    if job.running:
        with st.container(horizontal=True, vertical_alignment="center"):
            st.progress(job.fraction, text=f"{job.name}: {job.line}", width="stretch")
            st.button("Cancel", key=f"cancel-{job.name}", on_click=job.cancel, disabled=job.cancelled)
    elif job.error:
        st.error(f"{job.name} failed: {job.error}", icon=":material/error:")
    elif job.cancelled:
        st.info(f"{job.name} was cancelled.")
    else:
        st.rerun()

"""A cluster writes what one process writes, whatever dies meanwhile. Real processes, real signals, a real full disk."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hydra_lab.capture import Capture, CaptureProgress, open_capture
from tests.capture.shared import ByteTokenizer, assert_identical, run, write_texts
from tests.helpers import lively_model

distributed = pytest.importorskip("distributed", reason="the extra `scale` is not installed")

COMMIT = 2  # samples; twelve of them make six commits
QUIET: dict[str, Any] = {"dashboard_address": None, "scheduler_kwargs": {"dashboard_address": "127.0.0.1:0"}}
PATIENCE = 120  # seconds
CHANGES = ("moe[0].ablate(expert=2)", "memory[2].beta(value=0.5)")
"""All captures here run with these, so workers must make them too."""


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def alone(model: Any, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """What one process writes."""
    return run(
        model, texts, tmp_path_factory.mktemp("out") / "run.zarr", commit=COMMIT, interventions=CHANGES
    )


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of a cluster of two worker processes, for the tests that need not start their own."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, silence_logs=logging.CRITICAL, **QUIET
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def address(client: Any) -> str:
    client.wait_for_workers(2, timeout=PATIENCE)
    return client.scheduler.address


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "this should have happened by now"
        time.sleep(0.05)


def test_a_cluster_writes_what_one_process_writes(
    client: Any, alone: Capture, model: Any, texts: Path, tmp_path: Path
) -> None:
    told: list[CaptureProgress] = []
    out = tmp_path / "run.zarr"
    shared = run(
        model,
        texts,
        out,
        commit=COMMIT,
        interventions=CHANGES,
        scheduler=address(client),
        progress=told.append,
    )
    assert_identical(shared, alone)
    assert [done.samples for done in told] == [2, 4, 6, 8, 10, 12]
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"], (
        "the workers' copy of the model was left"
    )


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
def test_a_worker_that_stands_still(
    client: Any, alone: Capture, model: Any, texts: Path, tmp_path: Path, then: signal.Signals
) -> None:
    """One worker is stopped with commits in its hands, while the other one writes later ones: none of these counts.
    Then it goes on, or is killed and its commits go to the other one."""
    out = tmp_path / "run.zarr"
    where = address(client)
    stopped = next(iter(client.run(os.getpid).values()))
    finished: list[Capture] = []

    class StoppingTokenizer(ByteTokenizer):
        """The first text is read when the workers are there and have nothing to do yet."""

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            os.kill(stopped, signal.SIGSTOP)
            return super().__call__(text, **options)

    def capture() -> None:
        tokenizer = StoppingTokenizer()
        finished.append(
            run(model, texts, out, tokenizer=tokenizer, commit=COMMIT, interventions=CHANGES, scheduler=where)
        )

    thread = threading.Thread(target=capture)
    try:
        thread.start()

        def out_of_order() -> bool:
            written = sorted(int(chunk.name) for chunk in (out / "tokens" / "token" / "c").glob("*"))
            return written != list(range(len(written)))

        wait_for(out_of_order)
        missing = next(n for n in range(6) if not (out / "tokens" / "token" / "c" / str(n)).exists())
        time.sleep(0.5)
        assert open_capture(out).num_samples == missing * COMMIT
    finally:
        os.kill(stopped, then)
        thread.join(PATIENCE)
    assert_identical(finished[0], alone)
    assert (stopped in client.run(os.getpid).values()) == (then == signal.SIGCONT)


def test_the_whole_capture_is_killed(
    client: Any, alone: Capture, model: Any, texts: Path, tmp_path: Path
) -> None:
    """The process that leads two workers of its own dies; either kind of run goes on from its last commit."""
    code = f"""
import os, signal
from pathlib import Path
from tests.capture.shared import run
from tests.helpers import lively_model
if __name__ == "__main__":
    kill = lambda done: done.samples > 4 and os.kill(os.getpid(), signal.SIGKILL)
    run(lively_model(), Path({str(texts)!r}), Path({str(tmp_path / "run.zarr")!r}), commit={COMMIT},
        interventions={CHANGES}, workers=2, threads=1, progress=kill)
"""
    died = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    partial = open_capture(tmp_path / "run.zarr")
    assert partial.num_samples == 4 and not partial.complete
    shutil.copytree(tmp_path / "run.zarr", tmp_path / "again.zarr")
    assert_identical(
        run(model, texts, tmp_path / "run.zarr", commit=COMMIT, interventions=CHANGES, resume=True), alone
    )
    where = address(client)
    resumed = run(
        model,
        texts,
        tmp_path / "again.zarr",
        commit=COMMIT,
        interventions=CHANGES,
        resume=True,
        scheduler=where,
    )
    assert_identical(resumed, alone)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many bytes, or one that is grown to so many."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        option = f"remount,size={size}" if os.path.ismount(place) else f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"this user may not mount a file system: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def size_on_disk(path: Path) -> int:
    """Bytes that the files below `path` take in pages of 4 KiB."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("on_cluster", [False, True])
def test_a_full_disk(
    client: Any,
    alone: Capture,
    model: Any,
    texts: Path,
    small_disk: Callable[[int], Path],
    on_cluster: bool,
) -> None:
    options: dict[str, Any] = {
        "commit": COMMIT,
        "interventions": CHANGES,
        "scheduler": address(client) if on_cluster else None,
    }
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) if on_cluster else 0
    disk = small_disk(int(0.85 * size_on_disk(alone.path)) + weights)
    with pytest.raises(
        OSError, match=r"cannot grow: no space left on device; its .* are kept; make room"
    ) as error:
        run(model, texts, disk / "run.zarr", **options)
    assert "\n" not in str(error.value)
    partial = open_capture(disk / "run.zarr")
    assert 0 < partial.num_samples < 12 and not partial.complete
    small_disk(1 << 26)
    assert_identical(run(model, texts, disk / "run.zarr", resume=True, **options), alone)


def test_what_does_not_travel_is_refused(model: Any, texts: Path, tmp_path: Path) -> None:
    with (
        model.cut("memory"),
        pytest.raises(ValueError, match=r"hooks on .*memory.*, which do not travel to workers"),
    ):
        run(model, texts, tmp_path / "run.zarr", workers=1)
    model.set_path_scale("moe", 0.5)
    try:
        with pytest.raises(ValueError, match="set_path_scale holds for moe"):
            run(model, texts, tmp_path / "other.zarr", workers=1)
    finally:
        model.set_path_scale("moe", 1.0)


def test_no_scheduler_there(model: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra_lab.capture import cluster

    monkeypatch.setattr(cluster, "WAIT_SECONDS", 1)
    with pytest.raises(OSError, match=r"tcp://127\.0\.0\.1:9"):
        run(model, texts, tmp_path / "run.zarr", scheduler="tcp://127.0.0.1:9")

"""Kill a capture half-way with SIGKILL, resume it, and compare it with an undisturbed one, array by array.

    python tests/capture/kill_and_resume.py build/kill_and_resume --tokens 2000000 --workers 2

The text is the Python sources of the standard library, the model the one that ships. The first capture runs on
workers, is killed when half of the tokens are committed, and is resumed; the second runs in one process from beginning
to end. Prints, as JSON, whether all arrays and the summary are equal to the bit, sizes in bytes per token, tokens per
second and the largest resident memory of each process. Exit code 1 if anything differs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hydra_lab.capture import Capture, open_capture


def write_corpus(path: Path) -> None:
    """The standard library as JSONL, a domain per large package."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    package = {file: file.relative_to(library).parts[0] for file in files}
    size = Counter(package.values())
    with path.open("w", encoding="utf-8") as out:
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few tests hold other encodings on purpose
                continue
            domain = package[file] if size[package[file]] >= 20 else "other"
            out.write(json.dumps({"text": text, "domain": domain}) + "\n")


def capture(arguments: list[str], kill_at: int | None = None) -> dict[str, Any]:
    """Run `hydra-lab capture` and watch it.

    Args:
        kill_at: send SIGKILL when this many tokens are committed.

    Returns:
        seconds, tokens added, and peak resident memory (MiB) of the leading process and of the largest other one.
    """
    out = Path(arguments[arguments.index("--out") + 1])
    before = open_capture(out).num_tokens if out.exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "hydra_lab", "capture", *arguments, "--json"], stdout=subprocess.DEVNULL
    )
    peaks: dict[int, int] = {}
    first_commit = None
    start = time.monotonic()
    while process.poll() is None:
        for pid in (process.pid, *descendants(process.pid)):
            peaks[pid] = max(peaks.get(pid, 0), peak_memory(pid))
        committed = open_capture(out).num_tokens if out.exists() else 0
        if first_commit is None and committed > before:
            first_commit = time.monotonic(), committed
        if kill_at is not None and committed >= kill_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.5)
    end = time.monotonic()
    expected = 0 if kill_at is None else -signal.SIGKILL
    if process.returncode != expected:
        raise SystemExit(f"the capture ended with exit code {process.returncode}, expected {expected}")
    leader = peaks.pop(process.pid) / 2**20
    tokens = open_capture(out).num_tokens
    assert first_commit is not None
    return {
        "seconds": round(end - start, 1),
        "tokens": tokens - before,
        # From the first commit on: loading the model and reading the text once are not the work that repeats.
        "tokens_per_second": round((tokens - first_commit[1]) / (end - first_commit[0])),
        "leader_peak_MiB": round(leader),
        "worker_peak_MiB": round(max(peaks.values(), default=0) / 2**20),
    }


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, now."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended meanwhile
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def peak_memory(pid: int) -> int:
    """Largest resident memory so far, bytes; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return 0 if line is None else int(line.split()[1]) * 1024


def differences(first: Capture, second: Capture) -> list[str]:
    """Names of the arrays that are not equal to the bit."""
    found = [f"{group} is missing" for group in set(first.groups) ^ set(second.groups)]
    for group in first:
        for name in first[group].data_vars:
            ours, theirs = first[group][name], second[group][name]
            for start in range(0, first.num_samples, 512):
                rows = slice(start, start + 512)
                a, b = ours.isel(sample=rows).to_numpy(), theirs.isel(sample=rows).to_numpy()
                if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
                    found.append(f"{group}.{name}, samples {start} to {start + 511}")
    ours, theirs = first.summary, second.summary
    for group in sorted(set(ours) | set(theirs)):
        for name in sorted(set(ours.get(group, {})) | set(theirs.get(group, {}))):
            if not np.array_equal(ours[group][name], theirs[group][name], equal_nan=True):
                found.append(f"summary.{group}.{name}")
    return found


def bytes_per_token(path: Path) -> dict[str, float]:
    """Bytes on disk per token, by group, the summary and everything."""
    num_tokens = open_capture(path).num_tokens
    sizes = {
        part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file()) / num_tokens
        for part in sorted(path.iterdir())
        if part.is_dir()
    }
    return {name: round(size, 2) for name, size in {**sizes, "all": sum(sizes.values())}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="to work in; what an earlier run left there is removed")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a forward pass, in both captures")
    options = parser.parse_args()

    shutil.rmtree(options.directory, ignore_errors=True)
    options.directory.mkdir(parents=True)
    corpus = options.directory / "library.jsonl"
    write_corpus(corpus)
    killed, undisturbed = options.directory / "killed.zarr", options.directory / "undisturbed.zarr"
    common = ["demo", str(corpus), "--limit-tokens", str(options.tokens), "--threads", str(options.threads)]
    on_workers = [*common, "--out", str(killed), "--workers", str(options.workers)]

    result: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "workers": options.workers}
    result["killed"] = capture(on_workers, kill_at=options.tokens // 2)
    result["resumed"] = capture([*on_workers, "--resume"])
    result["one_process"] = capture([*common, "--out", str(undisturbed)])
    first, second = open_capture(killed), open_capture(undisturbed)
    result["tokens"] = first.num_tokens
    result["differences"] = differences(first, second)
    if first.attributes != second.attributes:
        result["differences"].append("attributes")
    start = time.monotonic()
    _ = open_capture(killed).summary
    result["summary_opens_in_seconds"] = round(time.monotonic() - start, 3)
    result["bytes_per_token"] = bytes_per_token(killed)
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["differences"] else 0)


if __name__ == "__main__":
    main()

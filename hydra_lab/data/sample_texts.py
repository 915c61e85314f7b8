"""A few held-out texts by domain that travel with a model, so that it can be looked at without its corpus."""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hydra_lab.data.samples import samples_from_corpus

SAMPLES_FILE = "samples.jsonl"
"""Name of the file in the model's directory; one object with `text` and `domain` per line, as `capture` reads them."""


def write_sample_texts(
    corpus_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    model_dir: str | Path,
    *,
    num_samples: int = 12,
    num_tokens: int = 512,
) -> Path:
    """Write `samples.jsonl` from the held-out documents of a corpus that `build_corpus` wrote.

    A line holds the documents of one row, each closed by the end-of-text token as in training. Tokenized again it gives
    the row's tokens back; a row whose last token ends inside a character is cut before it.

    Args:
        num_samples: rows per domain.
        num_tokens: most tokens per row.

    Returns:
        the file.
    """
    samples = samples_from_corpus(corpus_dir, num_tokens=num_tokens, num_samples=num_samples)
    path = Path(model_dir) / SAMPLES_FILE
    with path.open("w", encoding="utf-8") as file:
        for row, domain in enumerate(samples.domains):
            ids = samples.tokens[row, : samples.length[row]].tolist()
            text = _text_of(tokenizer, ids)
            file.write(json.dumps({"text": text, "domain": domain}, ensure_ascii=False) + "\n")
    return path


def read_sample_texts(model_dir: str | Path) -> dict[str, list[str]]:
    """Sample texts by domain of the model in `model_dir`; empty where none came with it.

    Raises:
        ValueError: a line is not an object with `text` and `domain`.
    """
    path = Path(model_dir) / SAMPLES_FILE
    texts: dict[str, list[str]] = {}
    if not path.is_file():
        return texts
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
                texts.setdefault(entry["domain"], []).append(entry["text"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: needs an object with `text` and `domain`") from None
    return texts


def _text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text whose tokens are `ids`, or all but the last few of them where a character is cut."""
    for end in range(len(ids), max(len(ids) - 4, 0), -1):
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if tokenizer(text, add_special_tokens=False)["input_ids"] == ids[:end]:
            return text
    raise ValueError("the tokenizer does not give a held-out row back from its text")


def main(arguments: list[str] | None = None) -> int:
    """Write the sample texts of a model from the command line."""
    parser = argparse.ArgumentParser(prog="python -m hydra_lab.data.sample_texts", description=__doc__)
    parser.add_argument("corpus", type=Path, help="corpus directory")
    parser.add_argument("model", type=Path, help="model directory, with its tokenizer")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    print(write_sample_texts(options.corpus, tokenizer, options.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())

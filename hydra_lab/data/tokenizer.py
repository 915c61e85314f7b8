"""The byte-level BPE tokenizer: every digit one token, a letter with its leading space one token."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hydra_lab.data.document import END_OF_TEXT, PADDING

VOCABULARY_SIZE = 4096

# A word takes one leading space or punctuation mark with it; a digit always stands alone, so that arithmetic has a
# fixed alphabet; runs of punctuation take the line end with them; indentation stays in one piece up to its last space.
_SPLIT = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str], *, symbols: Sequence[str] = (), vocabulary_size: int = VOCABULARY_SIZE
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        texts: training texts (never held-out ones).
        symbols: pieces such as " k" that must be single tokens at the start of a line or after a word; each is made
            frequent enough to be merged.
        vocabulary_size: number of tokens, the two special ones and the 256 bytes included.

    Raises:
        ValueError: where a symbol did not become a single token (the vocabulary is too small for it).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    repeated = (symbol for _ in range(4_000) for symbol in symbols)
    tokenizer.train_from_iterator((text for source in (repeated, texts) for text in source), trainer=trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    for symbol in symbols:
        if len(wrapped.encode(symbol)) != 1:
            raise ValueError(f"symbol {symbol!r} is not a single token at vocabulary size {vocabulary_size}")
    return wrapped


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """Reads a tokenizer that `save_pretrained` wrote, such as a corpus's `tokenizer` folder."""
    return PreTrainedTokenizerFast.from_pretrained(directory)
